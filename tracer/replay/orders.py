"""Orders in which a graph may be executed, and what they would do to a memory that all nodes shared."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

from truedag.tracer.replay.memory import Mask, StorageKey
from truedag.tracer.replay.program import Program, Step


class Orders:
    """Random orders of a program's steps: each comes after those that bring it bytes, and waits for nothing else."""

    def __init__(self, program: Program, seed: int = 0) -> None:
        self._random = random.Random(seed)  # noqa: S311
        self._after: dict[int, list[int]] = {node: [] for node in program.steps}
        self._waiting: dict[int, int] = dict.fromkeys(program.steps, 0)
        for src, dst in program.feeds:
            if src in self._after:
                self._after[src].append(dst)
                self._waiting[dst] += 1

    def draw(self) -> list[int]:
        """Return another order: every step gets a random turn, and waits for it as well."""
        waiting = dict(self._waiting)
        turn = {node: self._random.random() for node in waiting}  # a late one holds back what nothing else would
        ready = [(turn[node], node) for node, count in waiting.items() if count == 0]
        heapq.heapify(ready)
        order = []
        while ready:
            _, node = heapq.heappop(ready)
            order.append(node)
            for other in self._after[node]:
                waiting[other] -= 1
                if waiting[other] == 0:
                    heapq.heappush(ready, (turn[other], other))
        return order


def find_overwrites(program: Program) -> list[tuple[int, int]]:
    """Return (reader, writer) for each value that a step read, and that another then overwrote in the program's memory.

    A shared memory has to keep the two in order; among values that flow along edges there is nothing to keep.
    """
    reading: dict[StorageKey, list[tuple[int, Mask]]] = {}
    found = set()
    for node, step in sorted(program.steps.items()):
        for key, mask in program.writes(node):
            kept = []
            for reader, read in reading.get(key, []):
                if bool((read & mask).any()):
                    found.add((reader, node))
                    read = read & ~mask
                if bool(read.any()):
                    kept.append((reader, read))
            reading[key] = kept
        for key, mask in _reads(step):
            reading.setdefault(key, []).append((node, mask))
    return sorted((reader, writer) for reader, writer in found if reader != writer)


def _reads(step: Step) -> Iterator[tuple[StorageKey, Mask]]:
    for one in step.supplies:
        yield one.need.key, one.need.mask


def find_reversed(order: Sequence[int], pairs: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    """Return the pairs of which the second comes first in this order."""
    place: Mapping[int, int] = {node: number for number, node in enumerate(order)}
    return {(first, second) for first, second in pairs if place[second] < place[first]}
