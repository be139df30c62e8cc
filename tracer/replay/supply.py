"""Which bytes of a node's arguments each of its in-edges brings, from the edges' bytes and types alone.

Theory of operation. An edge names a producer, and how many bytes of a tensor of which dtype and shape it brings. The
producer has written some bytes of the argument's storage; several producers may have written the same ones, and the
last of them counts. Nobody has to know who that was: of the last one, all that it wrote of the arguments of that type
is read, so its edges bring exactly as many bytes as it wrote there. So whoever brings all that it could bring, does;
then its bytes are out of the question for the others, of whom again one was the last. That the producers come out in
turn is no assumption: where they do not, the edges are wrong or one is missing, and what is left is undetermined.

An argument may have no content for its operator (`copy_` overwrites it, `zeros_like` asks for its shape): the edges of
its type then bring less than the arguments of that type have. Arguments that the operator writes are left out first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import TypeAlias

from truedag.tracer.replay.memory import Mask, StorageKey

TensorType: TypeAlias = tuple[str, tuple[int, ...]]  # dtype and shape, as an edge has them

_MOST_SUBSETS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """An argument that may have to be filled."""

    number: int  # among the node's inputs
    key: StorageKey
    mask: Mask
    type: TensorType
    is_written: bool  # as the operator's schema says


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """A data edge into the node: its row in the graph's edges, and what it says."""

    row: int
    src: int
    num_bytes: int
    type: TensorType


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """What the edges bring to one argument."""

    need: Need
    parts: Mapping[int, Mask]  # by producer
    missing: Mask

    @property
    def is_whole(self) -> bool:
        """Whether no byte is missing."""
        return not self.missing.any()


Produces: TypeAlias = Callable[[int, StorageKey], Mask | None]  # what a node wrote of a storage; None: nothing


def supply(needs: Sequence[Need], edges: Sequence[Edge], produces: Produces) -> list[Supply] | None:
    """Return what the edges bring to the arguments that they are for; None: the edges contradict each other.

    Arguments without content for the operator are not among those returned.
    """
    found: list[Supply] = []
    for kind in sorted({edge.type for edge in edges}):
        brought = totals([edge for edge in edges if edge.type == kind])
        for chosen in choices([need for need in needs if need.type == kind], brought.total()):
            parts = deliver(chosen, brought, produces)
            if all(one.is_whole for one in parts):
                found.extend(parts)
                break
        else:
            return None
    return found


def totals(edges: Iterable[Edge]) -> Counter[int]:
    """Return how many bytes each producer brings."""
    sums: Counter[int] = Counter()
    for edge in edges:
        sums[edge.src] += edge.num_bytes
    return sums


def deliver(needs: Sequence[Need], brought: Mapping[int, int], produces: Produces) -> list[Supply]:
    """Share out what producers bring, by their bytes in total, among arguments of one type; the rest is missing."""
    left = [need.mask.copy() for need in needs]
    parts: list[dict[int, Mask]] = [{} for _ in needs]
    waiting = {src: [produces(src, need.key) for need in needs] for src, count in brought.items() if count}
    is_enough = sum(brought.values()) == sum(int(need.mask.sum()) for need in needs)
    is_moving = True
    while waiting and is_moving:
        is_moving = False
        for src, made in list(waiting.items()):
            could = [None if one is None else one & rest for one, rest in zip(made, left, strict=True)]
            # Where nothing is missing, what only one producer can bring is that one's.
            alone = _alone(src, waiting, could) if is_enough else could
            for candidate in (could, alone):
                if sum(int(one.sum()) for one in candidate if one is not None) != brought[src]:
                    continue
                for number, one in enumerate(candidate):
                    if one is not None and one.any():
                        parts[number][src] = one
                        left[number] &= ~one
                del waiting[src]
                is_moving = True
                break
    return [
        Supply(need=need, parts=part, missing=missing) for need, part, missing in zip(needs, parts, left, strict=True)
    ]


def _alone(src: int, waiting: Mapping[int, list[Mask | None]], could: list[Mask | None]) -> list[Mask | None]:
    alone: list[Mask | None] = []
    for number, one in enumerate(could):
        if one is not None:
            for other, made in waiting.items():
                theirs = made[number]
                if other != src and theirs is not None:
                    one = one & ~theirs
        alone.append(one)
    return alone


def choices(needs: Sequence[Need], wanted: int) -> Iterator[list[Need]]:
    """Arguments that have so many bytes together: all of them, those that are not written, then what else fits.

    Arguments that are one and the same tensor are left out together.
    """
    same: dict[tuple[object, ...], list[Need]] = {}
    for need in needs:
        same.setdefault((need.key, need.mask.tobytes(), need.is_written), []).append(need)
    groups = list(same.values())
    sizes = [len(group) * int(group[0].mask.sum()) for group in groups]
    read = tuple(number for number, group in enumerate(groups) if not group[0].is_written)
    subsets = (subset for count in range(len(groups), 0, -1) for subset in combinations(range(len(groups)), count))
    tried = [tuple(range(len(groups))), read, *islice(subsets, _MOST_SUBSETS)]
    for subset in dict.fromkeys(tried):
        if sum(sizes[number] for number in subset) == wanted:
            yield [need for number in subset for need in groups[number]]
