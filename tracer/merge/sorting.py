"""Orders and numberings of whole columns: stable orders, pairs of numbers as one number, lists of numbers as one.

Everything here is exact: two rows get the same number if and only if they are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Lists longer than this are told apart by their bytes, one by one: there are few.
_LONG_LIST = 24
# Numbers below this, or below a few times the rows, are renumbered through a table.
_SMALL_TABLE = 1 << 16


def stable_order(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the order that sorts `keys`, equal ones in the order in which they are.

    Keys and places are sorted together as one number where they fit into 63 bits: ten times as fast.
    """
    count = len(keys)
    if count < 2:
        return np.arange(count)
    low, high = int(keys.min()), int(keys.max())
    bits = (count - 1).bit_length()
    if (high - low).bit_length() + bits > 63:
        return np.argsort(keys, kind="stable")
    packed = keys - low
    packed <<= bits
    packed |= np.arange(count)
    packed.sort()
    packed &= (1 << bits) - 1
    return packed


def order_by(*keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the order that sorts by the first key, then the second and so on; what is wholly equal stays as it is."""
    order = stable_order(keys[-1])
    for key in keys[-2::-1]:
        order = order[stable_order(key[order])]
    return order


def order_edges(src: NDArray[np.int64], dst: NDArray[np.int64], *rest: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the order that sorts by `src`, `dst` and then the rest, where few have `src` and `dst` alike."""
    if not len(src):
        return np.zeros(0, np.int64)
    low, width = int(src.min()), int(dst.max()) + 1
    if int(src.max()) - low + 1 >= (1 << 62) // width:
        return order_by(src, dst, *rest)
    key = (src.astype(np.int64) - low) * width + dst
    bits = int(key.max()).bit_length() + len(key).bit_length()
    order = stable_order(key) if bits < 64 else np.argsort(key)
    key = key[order]
    several = np.zeros(len(order), bool)
    several[1:] = key[1:] == key[:-1]
    several[:-1] |= several[1:]
    places = np.flatnonzero(several)
    rows = np.sort(order[places])
    rows = rows[order_by(src[rows], dst[rows], *(column[rows] for column in rest))]
    order[places] = rows
    return order


def ramp(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0, 1, ... count - 1 for each of the counts, one after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - counts, counts)


def renumber(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number values (from 0 on) in their order; return the different ones, and each one's number."""
    if not len(values):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    low, high = int(values.min()), int(values.max())
    if high - low >= max(_SMALL_TABLE, 4 * len(values)):
        return np.unique(values, return_inverse=True)
    here = np.zeros(high - low + 1, bool)
    shifted = values - low
    here[shifted] = True
    number = np.cumsum(here) - 1
    return np.flatnonzero(here) + low, number[shifted]


def pair_numbers(left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give each pair of numbers (from 0 on) one number, dense and in the pairs' order."""
    if not len(left):
        return np.zeros(0, np.int64)
    width = int(right.max()) + 1
    if int(left.max()) >= (1 << 62) // width:
        left = renumber(left)[1]
        values, right = renumber(right)
        width = len(values)
    return renumber(left.astype(np.int64) * width + right)[1]


def first_places(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a place where each of the dense numbers stands: the last one."""
    places = np.zeros(int(numbers.max(initial=-1)) + 1, np.int64)
    places[numbers] = np.arange(len(numbers))
    return places


def number_lists(values: NDArray[np.int64], begins: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give each list of numbers one number (from 0 on), the same to equal lists.

    Args:
        values: all lists, one after the other; from 0 on.
        begins: [lists + 1] where each begins, and where the last one ends.

    Theory of operation. Lists are numbered by their first values, place by place: a list's number so far and its next
    value make its next number, and lists of one length never meet those of another.
    """
    lengths = np.diff(begins)
    found = np.zeros(len(lengths), np.int64)
    first_free = 1
    going = np.flatnonzero((lengths > 0) & (lengths <= _LONG_LIST))
    place = 0
    while len(going):
        number = pair_numbers(found[going], values[begins[going] + place])
        found[going] = number + first_free
        first_free += int(number.max()) + 1
        place += 1
        going = going[lengths[going] > place]
    known: dict[bytes, int] = {}
    for one in np.flatnonzero(lengths > _LONG_LIST).tolist():
        text = values[begins[one] : begins[one + 1]].tobytes()
        found[one] = first_free + known.setdefault(text, len(known))
    return renumber(found)[1]


def lay_out(nodes: Sequence[NDArray[np.int64]], count: int) -> list[NDArray[np.int64]]:
    """Return where the rows of several lists go in one, by node, and within a node one list after the other.

    Args:
        nodes: each list's nodes, ascending.
        count: nodes are below this.
    """
    counts = [np.bincount(one, minlength=count) for one in nodes]
    total = np.sum(counts, axis=0) if counts else np.zeros(count, np.int64)
    begin = np.cumsum(total) - total
    places = []
    for one, mine in zip(nodes, counts, strict=True):
        first = np.cumsum(mine) - mine
        places.append(np.repeat(begin - first, mine) + np.arange(len(one)))
        begin += mine
    return places


def number_by_appearance(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Number values (from 0 on) in the order in which they first appear; return each one's number."""
    if not len(values):
        return np.zeros(0, np.int64)
    near = values - values.min()
    bits = int(np.bitwise_or.reduce(near))
    near = (near >> np.uint64((bits & -bits).bit_length() - 1 if bits else 0)).astype(np.int64)  # addresses are aligned
    order = stable_order(near)
    begins = np.diff(near[order], prepend=near[order[0]] - 1) != 0
    first = order[begins]
    number = np.empty(len(first), np.int64)
    number[stable_order(first)] = np.arange(len(first))
    found = np.empty(len(values), np.int64)
    found[order] = number[np.cumsum(begins) - 1]
    return found
