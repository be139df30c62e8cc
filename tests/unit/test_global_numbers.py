"""Numbering rank by rank gives the numbers that numbering the whole graph node by node gives."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truedag.tracer.merge import global_numbers
from truedag.tracer.merge.global_numbers import RankOrder, number_all
from truedag.tracer.merge.joining import CollectiveNode, Joined, MessageEdge
from truedag.tracer.merge.labels import Label
from truedag.tracer.topology import number_nodes


@dataclass(frozen=True)
class Program:
    """Times of each rank's nodes; edges within ranks, forward; collectives (time, rank -> node); messages."""

    times: list[list[int]]
    edges: list[list[tuple[int, int]]]
    collectives: list[tuple[int, dict[int, int]]]
    messages: list[tuple[int, int, int, int]]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Ranks whose communications come earlier or later than their times say."""
    num_ranks, count = draw(st.integers(1, 4)), draw(st.integers(2, 12))
    times = [sorted(draw(st.lists(st.integers(0, 20), min_size=count, max_size=count))) for _ in range(num_ranks)]
    edges = []
    for _ in range(num_ranks):
        pairs = draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=2 * count))
        chain = [(i, i + 1) for i in range(count - 1)] if draw(st.booleans()) else []
        edges.append(sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]} | set(chain)))
    free = [list(range(count)) for _ in range(num_ranks)]
    collectives = []
    for _ in range(draw(st.integers(0, 4))):
        members = [rank for rank in range(num_ranks) if free[rank] and draw(st.integers(0, 3))]
        nodes = {rank: free[rank].pop(draw(st.integers(0, len(free[rank]) - 1))) for rank in members}
        if nodes:
            last = max(times[rank][node] for rank, node in nodes.items())
            collectives.append((last + draw(st.integers(0, 2)), nodes))
    messages = []
    for _ in range(draw(st.integers(0, 3))):
        source, destination = draw(st.integers(0, num_ranks - 1)), draw(st.integers(0, num_ranks - 1))
        if source != destination and free[source] and free[destination]:
            messages.append((source, free[source].pop(), destination, free[destination].pop(0)))
    return Program(times, edges, collectives, messages)


def by_rank(program: Program) -> tuple[list[int], list[int] | None]:
    """All nodes' numbers, collectives first, then rank by rank; None and a cycle where there is one."""
    places = {rank: {} for rank in range(len(program.times))}  # type: dict[int, dict[int, int]]
    for number, (_, nodes) in enumerate(program.collectives):
        for rank, node in nodes.items():
            places[rank][node] = number
    joined = Joined(
        axes={},
        collectives=[
            CollectiveNode(
                op="", label="", belonging=Label(), sort_ns=time, stage=None, start_ns=time, end_ns=None,
                bytes_read=0, bytes_written=0, inputs="", outputs="",
            )
            for time, _ in program.collectives
        ],
        places=places,
        messages=[
            MessageEdge(source=a, send=b, destination=c, receive=d, num_bytes=1, dtype=None, shape=None)
            for a, b, c, d in program.messages
        ],
    )  # fmt: skip
    orders = {}
    for rank, times in enumerate(program.times):
        src, dst = np.array(program.edges[rank], np.int64).reshape(-1, 2).T
        collective = np.array([places[rank].get(node, -1) for node in range(len(times))], np.int64)
        touching = (collective[src] >= 0) | (collective[dst] >= 0)
        orders[rank] = RankOrder(
            time_ns=np.array(times, np.int64),
            collective=collective,
            edges=lambda src=src, dst=dst: (src, dst),  # type: ignore[misc]
            touching=(src[touching], dst[touching]),
        )
    numbers, collectives, cycle = number_all(orders, joined, lambda size: np.empty(size, np.int64))
    flat = collectives.tolist()
    for rank, one in numbers.items():
        flat += [number for node, number in enumerate(one.tolist()) if node not in places[rank]]
    return flat, (list(range(len(cycle))) if cycle else None)


def as_a_whole(program: Program) -> tuple[list[int], bool]:
    """The same of the whole graph at once."""
    place: dict[tuple[int, int], int] = {}
    times = [time for time, _ in program.collectives]
    for number, (_, nodes) in enumerate(program.collectives):
        place |= dict.fromkeys(nodes.items(), number)
    for rank, mine in enumerate(program.times):
        for node, time in enumerate(mine):
            if (rank, node) not in place:
                place[rank, node] = len(times)
                times.append(time)
    pairs = [(place[rank, src], place[rank, dst]) for rank, edges in enumerate(program.edges) for src, dst in edges] + [
        (place[a, b], place[c, d]) for a, b, c, d in program.messages
    ]
    src, dst = np.array([pair for pair in pairs if pair[0] != pair[1]], np.int64).reshape(-1, 2).T
    number, cycle = number_nodes(np.array(times, np.int64), src, dst)
    return number.tolist(), bool(cycle)


@settings(max_examples=400, deadline=None)
@given(programs())
def test_rank_by_rank_is_node_by_node(program: Program) -> None:
    numbers, cycle = by_rank(program)
    wanted, is_cyclic = as_a_whole(program)
    assert (cycle is not None) == is_cyclic
    if not is_cyclic:
        assert numbers == wanted


@settings(max_examples=200, deadline=None)
@given(programs())
def test_windows_of_time_do_not_matter(program: Program) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(global_numbers, "_SAMPLE", 1)
        patch.setattr(global_numbers, "_WINDOW", 2)
        numbers, cycle = by_rank(program)
    assert cycle is not None or numbers == as_a_whole(program)[0]


def test_a_collective_that_waits_for_itself_is_shown() -> None:
    crossed = Program([[0, 1], [0, 1]], [[(0, 1)], [(0, 1)]], [(1, {0: 0, 1: 1}), (1, {0: 1, 1: 0})], [])
    assert by_rank(crossed)[1] == [0, 1]
