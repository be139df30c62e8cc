"""Number the nodes of all ranks so that every edge leads from a lower to a higher number (DESIGN rule 7).

Theory of operation. Nodes are taken by time; at one time collectives first, then by rank and local number. Within a
rank every edge leads forward in time already: program order does, and so does what was written before it was read.
Only what touches a collective, which began when its last participant came, or a message can lead backwards, so only
that is checked. Where it does, what depends on the later node is lifted behind it: a node's level is the latest place
in time of all that it depends on, itself included. Levels are found by walking from the latest of such nodes to what
follows them, once each; within a level nodes are taken as their predecessors allow, earliest first. That is the order
in which one takes, of all nodes whose predecessors have been taken, always the earliest, at a cost that goes with
what was lifted. If a level cannot be ordered, there is a cycle in it, and it is shown.

Ranks are merged window by window of time, so that what is in memory at once does not grow with the graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.joining import ALL_RANKS, Joined
from truedag.tracer.merge.sorting import ramp, stable_order

_SAMPLE = 4096
_WINDOW = 1 << 20  # nodes

Node = tuple[int, int]  # rank (or ALL_RANKS) and local number (or the collective's place)
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOrder:
    """What numbering needs of a rank's nodes."""

    time_ns: Ints  # [nodes] on the graph's clock
    collective: Ints  # [nodes] which collective took the node's place, -1: none
    edges: Callable[[], tuple[Ints, Ints]]  # src and dst of all the rank's edges, by src
    touching: tuple[Ints, Ints]  # src and dst of those that begin or end at a joined collective


def number_all(
    ranks: Mapping[int, RankOrder], joined: Joined, allocate: Callable[[int], Ints]
) -> tuple[dict[int, Ints], Ints, list[Node]]:
    """Return each rank's nodes' numbers, the collectives', and a cycle (empty where there is none).

    A node whose place a collective took has the collective's number.

    Args:
        ranks: by rank, ascending.
        joined: the communications.
        allocate: gives room for so many numbers, in memory or on disk.
    """
    numbers = {rank: allocate(len(one.time_ns)) for rank, one in ranks.items()}
    collectives = _by_time(ranks, joined, numbers, allocate)
    for rank, one in ranks.items():
        taken = one.collective >= 0
        numbers[rank][taken] = collectives[one.collective[taken]]
    seeds = _backward_edges(ranks, joined, numbers)
    if not seeds:
        return numbers, collectives, []
    cycle = _Lifting(ranks, joined, numbers, collectives).lift(seeds)
    return numbers, collectives, cycle


def _by_time(
    ranks: Mapping[int, RankOrder], joined: Joined, numbers: Mapping[int, Ints], allocate: Callable[[int], Ints]
) -> Ints:
    collective_times = np.array([one.sort_ns for one in joined.collectives], np.int64)
    collectives = np.empty(len(collective_times), np.int64)
    lists = [(collective_times, stable_order(collective_times), collectives)]
    for rank, one in ranks.items():
        order = stable_order(one.time_ns)
        order = order[one.collective[order] < 0]
        kept = allocate(len(order))
        kept[:] = order
        lists.append((one.time_ns, kept, numbers[rank]))
    samples = np.sort(np.concatenate([times[order[::_SAMPLE]] for times, order, _ in lists]))
    bounds = np.unique(samples[:: _WINDOW // _SAMPLE])[1:]
    begins = [0] * len(lists)
    done = 0
    for bound in [*bounds.tolist(), None]:
        pieces = []
        for place, (times, order, _) in enumerate(lists):
            begin = begins[place]
            end = len(order) if bound is None else begin + _first_from(times, order[begin:], bound)
            pieces.append((place, order[begin:end]))
            begins[place] = end
        times = np.concatenate([lists[place][0][nodes] for place, nodes in pieces])
        number = np.empty(len(times), np.int64)
        number[stable_order(times)] = np.arange(done, done + len(times))
        done += len(times)
        at = 0
        for place, nodes in pieces:
            lists[place][2][nodes] = number[at : at + len(nodes)]
            at += len(nodes)
    return collectives


def _first_from(times: Ints, order: Ints, bound: int) -> int:
    """How many of a sorted list are below a time."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if times[order[middle]] < bound:
            low = middle + 1
        else:
            high = middle
    return low


def _backward_edges(
    ranks: Mapping[int, RankOrder], joined: Joined, numbers: Mapping[int, Ints]
) -> list[tuple[int, Node]]:
    """The edges that lead backwards in time, as (the number of what they lead from, what they lead to)."""
    found: list[tuple[int, Node]] = []
    for rank, one in ranks.items():
        src, dst = one.touching
        number = numbers[rank]
        backward = number[src] > number[dst]
        found.extend(
            (int(number[before]), _node(one, rank, after))
            for before, after in zip(src[backward].tolist(), dst[backward].tolist(), strict=True)
        )
    for message in joined.messages:
        before, after = int(numbers[message.source][message.send]), int(numbers[message.destination][message.receive])
        if before > after:
            found.append((before, (message.destination, message.receive)))
    return found


def _node(one: RankOrder, rank: int, node: int) -> Node:
    place = int(one.collective[node])
    return (rank, node) if place < 0 else (ALL_RANKS, place)


class _Lifting:
    """Lifts nodes behind what they depend on."""

    def __init__(
        self, ranks: Mapping[int, RankOrder], joined: Joined, numbers: Mapping[int, Ints], collectives: Ints
    ) -> None:
        self._ranks = ranks
        self._numbers = numbers
        self._collectives = collectives
        self._participants: list[list[Node]] = [[] for _ in joined.collectives]
        for rank, places in joined.places.items():
            for node, place in places.items():
                self._participants[place].append((rank, node))
        self._messages: dict[Node, list[Node]] = {}
        for one in joined.messages:
            self._messages.setdefault((one.source, one.send), []).append((one.destination, one.receive))
        self._edges: dict[int, tuple[list[int], Ints, Ints]] = {}

    def lift(self, seeds: list[tuple[int, Node]]) -> list[Node]:
        """Change the numbers so that all edges lead forward; return a cycle if that cannot be."""
        levels: dict[Node, int] = {}
        for level, first in sorted(seeds, reverse=True):
            open_ = [first]
            while open_:
                node = open_.pop()
                number = self._number(node)
                # What leads back to the node that it was lifted behind is in a cycle with it.
                if levels.get(node, number) < level or (number == level and node not in levels):
                    levels[node] = level
                    open_.extend(self._after(node))
        by_level: dict[int, list[Node]] = {}
        for node, level in levels.items():
            by_level.setdefault(level, []).append(node)
        order: list[tuple[int, list[Node]]] = []
        for level in sorted(by_level):
            taken, cycle = self._take(by_level[level])
            if cycle:
                return cycle
            order.append((level, taken))
        self._renumber(order)
        return []

    def _number(self, node: Node) -> int:
        rank, place = node
        return int(self._collectives[place] if rank == ALL_RANKS else self._numbers[rank][place])

    def _after(self, node: Node) -> Iterator[Node]:
        """What a node's edges lead to."""
        rank, place = node
        for of, local in self._participants[place] if rank == ALL_RANKS else [node]:
            if of not in self._edges:
                src, dst = self._ranks[of].edges()
                order = stable_order(src.astype(np.int64))
                begins = np.searchsorted(src[order], np.arange(len(self._ranks[of].time_ns) + 1))
                self._edges[of] = begins.tolist(), dst[order], self._ranks[of].collective
            begins_of, targets, collective = self._edges[of]
            for target in targets[begins_of[local] : begins_of[local + 1]].tolist():
                other = int(collective[target])
                if (of, target) != node and (other < 0 or (ALL_RANKS, other) != node):
                    yield (of, target) if other < 0 else (ALL_RANKS, other)
        yield from self._messages.get(node, ())

    def _take(self, nodes: list[Node]) -> tuple[list[Node], list[Node]]:
        """Order a level's lifted nodes; the one that it is the level of comes before them all."""
        inside = set(nodes)
        after = {node: [one for one in self._after(node) if one in inside] for node in nodes}
        waiting = dict.fromkeys(nodes, 0)
        for targets in after.values():
            for target in targets:
                waiting[target] += 1
        ready = [(self._number(node), node) for node in nodes if waiting[node] == 0]
        heapq.heapify(ready)
        taken: list[Node] = []
        while ready:
            _, node = heapq.heappop(ready)
            taken.append(node)
            for target in after[node]:
                waiting[target] -= 1
                if waiting[target] == 0:
                    heapq.heappush(ready, (self._number(target), target))
        if len(taken) == len(nodes):
            return taken, []
        return [], _walk_back({node: after[node] for node in inside - set(taken)})

    def _renumber(self, order: list[tuple[int, list[Node]]]) -> None:
        lifted = [node for _, nodes in order for node in nodes]
        old = np.sort(np.array([self._number(node) for node in lifted], np.int64))
        sizes = np.array([len(nodes) for _, nodes in order], np.int64)
        levels = np.repeat(np.array([level for level, _ in order], np.int64), sizes)
        # A node that stays comes after what stays before it and what was lifted to a level below its own.
        new = _moved(levels, old, levels) + 1 + ramp(sizes)
        for numbers in (*self._numbers.values(), self._collectives):
            for begin in range(0, len(numbers), _WINDOW):
                piece = numbers[begin : begin + _WINDOW]
                piece[:] = _moved(piece.copy(), old, levels)
        for (rank, place), number in zip(lifted, new.tolist(), strict=True):
            for of, local in self._participants[place] if rank == ALL_RANKS else [(rank, place)]:
                self._numbers[of][local] = number
            if rank == ALL_RANKS:
                self._collectives[place] = number


def _moved(numbers: Ints, old: Ints, levels: Ints) -> Ints:
    return numbers - np.searchsorted(old, numbers, "left") + np.searchsorted(levels, numbers, "left")


def _walk_back(after: Mapping[Node, list[Node]]) -> list[Node]:
    """Find a cycle among nodes that could not be taken: each has a predecessor among them."""
    before = {target: node for node, targets in after.items() for target in targets if target in after}
    node = next(iter(before))
    seen: dict[Node, int] = {}
    path: list[Node] = []
    while node not in seen:
        seen[node] = len(path)
        path.append(node)
        node = before[node]
    return path[seen[node] :][::-1]
