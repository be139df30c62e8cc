"""Who leads to whom, as arrays: ancestors, descendants and paths in time linear in the edges between.

Node numbers are a topological order, so one pass over the edges in that order finds what a node reaches: no queue, and
stretches of edges that begin at nothing reached are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.errors import GraphError

_STRETCH = 4096  # edges looked at together


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjacency:
    """Edges between places in `ids`; parallel edges are one.

    Attributes:
        ids: [nodes] the graph's numbers, rising.
        src, dst: [edges] places, sorted by src and then dst.
        into_dst, into_src: [edges] the same edges, sorted by dst and then src.
    """

    ids: NDArray[np.int64]
    src: NDArray[np.int64]
    dst: NDArray[np.int64]
    into_dst: NDArray[np.int64]
    into_src: NDArray[np.int64]

    @classmethod
    def build(cls, ids: NDArray[np.int64], src: NDArray[np.int64], dst: NDArray[np.int64]) -> Adjacency:
        """Sort edges, given by the graph's numbers; `ids` need not be sorted."""
        ids = np.sort(ids)
        pairs = np.unique(np.searchsorted(ids, src) * max(len(ids), 1) + np.searchsorted(ids, dst))
        first, second = np.divmod(pairs, max(len(ids), 1))
        back = np.argsort(second, kind="stable")
        return cls(ids=ids, src=first, dst=second, into_dst=second[back], into_src=first[back])

    def successors(self, node: int) -> list[int]:
        """Return the nodes that a node leads to.

        Raises:
            GraphError: there is no such node.
        """
        return self._numbers(_slice(self.src, self.dst, self._place(node)))

    def predecessors(self, node: int) -> list[int]:
        """Return the nodes that lead to a node.

        Raises:
            GraphError: there is no such node.
        """
        return self._numbers(_slice(self.into_dst, self.into_src, self._place(node)))

    def descendants(self, node: int) -> list[int]:
        """Return what follows from a node, in topological order.

        Raises:
            GraphError: there is no such node.
        """
        place = self._place(node)
        reached = _reach(place, self.src, self.dst, len(self.ids))
        reached[place] = 0
        return self._numbers(np.flatnonzero(np.frombuffer(reached, np.uint8)))

    def ancestors(self, node: int) -> list[int]:
        """Return what a node follows from, in topological order.

        Raises:
            GraphError: there is no such node.
        """
        place = self._place(node)
        reached = self._reach_back(place)
        reached[place] = 0
        return self._numbers(np.flatnonzero(np.frombuffer(reached, np.uint8)))

    def between(self, first: int, last: int) -> list[int]:
        """Return the nodes on all paths from one to another, both in it; none where there is no path.

        Raises:
            GraphError: one of them is no node.
        """
        return self._numbers(self._between(first, last))

    def count_paths(self, first: int, last: int) -> int:
        """Return how many paths lead from one node to another: exactly, however many there are.

        Raises:
            GraphError: one of them is no node.
        """
        start, end = self._place(first), self._place(last)
        counts = dict.fromkeys(self._between(first, last).tolist(), 0)
        if not counts:
            return 0
        counts[start] = 1
        for place in counts:
            for after in _slice(self.src, self.dst, place).tolist():
                if after in counts:
                    counts[after] += counts[place]
        return counts[end]

    def paths(self, first: int, last: int) -> Iterator[tuple[int, ...]]:
        """Yield the paths from one node to another, one by one; there may be very many.

        Raises:
            GraphError: one of them is no node.
        """
        inside = set(self._between(first, last).tolist())
        start, end = self._place(first), self._place(last)
        if not inside:
            return
        path, choices = [start], [iter(_slice(self.src, self.dst, start).tolist())]
        if start == end:
            yield (first,)
            return
        while choices:
            after = next(choices[-1], None)
            if after is None:
                choices.pop()
                path.pop()
            elif after == end:
                yield tuple(int(self.ids[place]) for place in (*path, end))
            elif after in inside:
                path.append(after)
                choices.append(iter(_slice(self.src, self.dst, after).tolist()))

    def shortest_path(self, first: int, last: int) -> tuple[int, ...]:
        """Return a path of the fewest edges from one node to another; nothing where there is none.

        Raises:
            GraphError: one of them is no node.
        """
        start, end = self._place(first), self._place(last)
        before: dict[int, tuple[int, int]] = {start: (0, -1)}  # how many edges from the first, and over whom
        for place in self._between(first, last).tolist():
            hops = before[place][0] + 1
            for after in _slice(self.src, self.dst, place).tolist():
                if after not in before or hops < before[after][0]:
                    before[after] = (hops, place)
        if end not in before:
            return ()
        path = [end]
        while path[-1] != start:
            path.append(before[path[-1]][1])
        return tuple(int(self.ids[place]) for place in reversed(path))

    def _between(self, first: int, last: int) -> NDArray[np.int64]:
        start, end = self._place(first), self._place(last)
        forward = np.frombuffer(_reach(start, self.src, self.dst, len(self.ids)), np.uint8)
        return np.flatnonzero(forward & np.frombuffer(self._reach_back(end), np.uint8))

    def _reach_back(self, place: int) -> bytearray:
        """Reach backwards: the same pass over the reversed graph, in which places count from the end."""
        last = len(self.ids) - 1
        reached = _reach(last - place, last - self.into_dst[::-1], last - self.into_src[::-1], len(self.ids))
        return reached[::-1]

    def _place(self, node: int) -> int:
        place = int(np.searchsorted(self.ids, node))
        if place == len(self.ids) or self.ids[place] != node:
            raise GraphError(f"node {node} is not in this graph")
        return place

    def _numbers(self, places: NDArray[np.int64]) -> list[int]:
        numbers: list[int] = self.ids[places].tolist()
        return numbers


def _slice(keys: NDArray[np.int64], values: NDArray[np.int64], key: int) -> NDArray[np.int64]:
    begin, end = np.searchsorted(keys, (key, key + 1))
    return values[begin:end]


def _reach(start: int, src: NDArray[np.int64], dst: NDArray[np.int64], count: int) -> bytearray:
    """Mark what a place reaches, itself too; edges lead upwards and are sorted by src."""
    reached = bytearray(count)
    reached[start] = 1
    for begin in range(int(np.searchsorted(src, start)), len(src), _STRETCH):
        tails = src[begin : begin + _STRETCH]
        if reached.find(1, int(tails[0]), int(tails[-1]) + 1) < 0:
            continue
        for one, other in zip(tails.tolist(), dst[begin : begin + _STRETCH].tolist(), strict=True):
            if reached[one]:
                reached[other] = 1
    return reached
