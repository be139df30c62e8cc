"""What an operator does to its arguments, from the schema that its trace carries.

The alias annotations of a schema say which arguments it writes and which results are views: `Tensor(a!) self` is
written, `-> Tensor(a)` shares memory with the argument of the same letter. What they do not say is in tables
here: which operators overwrite what they write without reading it first, which look at an argument's shape only, and
what c10d's operators do (theirs carry no annotations).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSchema:
    """An operator's effect on memory, by argument position."""

    name: str
    writes: frozenset[int]  # arguments written
    unread: frozenset[int]  # arguments whose content does not matter: overwritten, or asked for their shape only
    is_view: bool  # aliases and moves nothing: no node
    fresh: frozenset[int]  # results that are new tensors by contract


# In place, without reading what was there. Out-variants are recognised by their schema.
_OVERWRITING = frozenset(
    f"aten::{name}"
    for name in (
        "copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "uniform_", "normal_", "random_", "bernoulli_",
        "exponential_", "geometric_", "log_normal_", "cauchy_", "eye_",
    )
)  # fmt: skip

# Makes a tensor like another one: looks at its shape, dtype and device.
_LIKE = frozenset(
    f"aten::{name}"
    for name in (
        "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "empty_like", "full_like", "ones_like",
        "zeros_like", "rand_like", "randn_like", "randint_like",
    )
)  # fmt: skip

# c10d: the arguments it writes, and those of them that it reads as well. Source: torch/csrc/distributed/c10d/Ops.cpp.
_C10D_WRITES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "allreduce_": ((0,), (0,)),
    "allreduce_coalesced_": ((0,), (0,)),
    "broadcast_": ((0,), (0,)),
    "reduce_": ((0,), (0,)),
    "allgather_": ((0,), ()),
    "_allgather_base_": ((0,), ()),
    "allgather_coalesced_": ((0,), ()),
    "allgather_into_tensor_coalesced_": ((0,), ()),
    "reduce_scatter_": ((0,), ()),
    "_reduce_scatter_base_": ((0,), ()),
    "reduce_scatter_tensor_coalesced_": ((0,), ()),
    "alltoall_": ((0,), ()),
    "alltoall_base_": ((0,), ()),
    "gather_": ((0,), ()),
    "scatter_": ((0,), ()),
    "recv_": ((0,), ()),
    "recv_any_source_": ((0,), ()),
    "send": ((), ()),
    "barrier": ((), ()),
    "monitored_barrier_": ((), ()),
    "check_for_nan": ((), ()),
}


@functools.cache
def parse_schema(text: str, *, name: str, inplace_view: bool) -> OpSchema:
    """Read a schema as PyTorch prints it. An operator without one reads its arguments and gives fresh results."""
    if name.startswith("c10d::"):
        return _c10d_schema(name)
    arguments, results = _split(text)
    letters = [_alias(argument) for argument in arguments]
    written = frozenset(i for i, (_, is_written) in enumerate(letters) if is_written)
    keyword_only = arguments.index("*") if "*" in arguments else len(arguments)
    positions = [i for i, argument in enumerate(arguments) if argument != "*"]
    place = {i: position for position, i in enumerate(positions)}  # the star takes no position
    out = frozenset(i for i in written if i > keyword_only)
    unread = written if name in _OVERWRITING else out
    result_letters = [_alias(result) for result in results]
    fresh = frozenset(i for i, (letter, _) in enumerate(result_letters) if letter is None)
    return OpSchema(
        name=name,
        writes=frozenset(place[i] for i in written),
        unread=frozenset({0}) if name in _LIKE else frozenset(place[i] for i in unread),
        is_view=inplace_view or (bool(results) and not written and not fresh),
        fresh=fresh,
    )


def _c10d_schema(name: str) -> OpSchema:
    # An operation of c10d that is not in the table is taken to read and write its first argument.
    writes, reads_too = _C10D_WRITES.get(name.removeprefix("c10d::"), ((0,), (0,)))
    return OpSchema(
        name=name,
        writes=frozenset(writes),
        unread=frozenset(writes) - frozenset(reads_too),
        is_view=False,
        fresh=frozenset(),
    )


def _split(text: str) -> tuple[list[str], list[str]]:
    """Split `ns::op.overload(arguments) -> results` into the texts of arguments and of results."""
    begin = text.find("(")
    if begin < 0:
        return [], []
    end = _closing(text, begin)
    results = text[end + 1 :].partition("->")[2].strip()
    if results.startswith("(") and _closing(results, 0) == len(results) - 1:
        results = results[1:-1]
    return _commas(text[begin + 1 : end]), _commas(results)


def _closing(text: str, begin: int) -> int:
    depth = 0
    for i in range(begin, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _commas(text: str) -> list[str]:
    parts, depth, begin = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            parts.append(text[begin:i].strip())
            begin = i + 1
    last = text[begin:].strip()
    return [*parts, last] if last else parts


_ALIAS = re.compile(r"^Tensor(?:\[\])?\(([\w|*]+)(!?)(?:\s*->\s*[\w*|]+)?(!?)\)")


def _alias(declaration: str) -> tuple[str | None, bool]:
    """Return the alias letter of a declaration (None: none) and whether it is written."""
    found = _ALIAS.match(declaration)
    if found is None:
        return None, False
    return found.group(1), bool(found.group(2) or found.group(3))
