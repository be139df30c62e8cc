"""Edges' bytes alone tell which bytes each edge brings; orders and their reduction."""

from __future__ import annotations

import networkx as nx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from truedag.tracer.replay.memory import Mask, StorageKey
from truedag.tracer.replay.redundancy import find_implied, find_ordered
from truedag.tracer.replay.supply import Edge, Need, deliver, supply, totals

KEY = (0, 1)
SIZE = 12
TYPE = ("uint8", (SIZE,))

masks = st.sets(st.integers(0, SIZE - 1), min_size=1).map(lambda chosen: np.isin(np.arange(SIZE), list(chosen)))


def written_last(writers: list[Mask]) -> list[int]:
    """Who wrote each byte last, by number; -1: nobody."""
    owner = [-1] * SIZE
    for number, mask in enumerate(writers):
        for byte in np.flatnonzero(mask).tolist():
            owner[byte] = number
    return owner


def edges_from(owner: list[int], read: Mask) -> list[Edge]:
    counts = {src: sum(owner[byte] == src for byte in np.flatnonzero(read).tolist()) for src in set(owner)}
    return [Edge(row=src, src=src, num_bytes=count, type=TYPE) for src, count in counts.items() if count]


@settings(max_examples=300, deadline=None)
@given(st.lists(masks, min_size=1, max_size=6), masks)
def test_who_wrote_what_last_follows_from_how_much_each_brings(writers: list[Mask], read: Mask) -> None:
    writers = [np.ones(SIZE, bool), *writers]
    owner = written_last(writers)
    edges = edges_from(owner, read)
    need = Need(number=0, key=KEY, mask=read, type=TYPE, is_written=False)

    def produces(src: int, key: StorageKey) -> Mask | None:
        return writers[src] if key == KEY else None

    (found,) = supply([need], edges, produces) or ()
    for src, mask in found.parts.items():
        assert np.flatnonzero(mask).tolist() == [byte for byte in np.flatnonzero(read).tolist() if owner[byte] == src]
    for gone in edges:  # without an edge nothing is shared out wrongly, and at least its bytes are missing
        (rest,) = deliver([need], totals([edge for edge in edges if edge is not gone]), produces)
        assert int(rest.missing.sum()) >= gone.num_bytes
        for src, mask in rest.parts.items():
            assert all(owner[byte] == src for byte in np.flatnonzero(mask).tolist())


def test_an_argument_that_is_overwritten_is_left_out() -> None:
    whole = np.ones(SIZE, bool)
    source = Need(number=1, key=(0, 2), mask=whole, type=TYPE, is_written=False)
    target = Need(number=0, key=KEY, mask=whole, type=TYPE, is_written=True)
    edges = [Edge(row=0, src=7, num_bytes=SIZE, type=TYPE)]
    found = supply([target, source], edges, lambda src, key: whole)  # 7 wrote both
    assert found is not None
    assert [one.need.number for one in found] == [1]


def test_edges_that_bring_too_much_or_too_little_fit_nothing() -> None:
    need = Need(number=0, key=KEY, mask=np.ones(SIZE, bool), type=TYPE, is_written=False)
    for count in (SIZE - 1, SIZE + 1):
        assert supply([need], [Edge(row=0, src=7, num_bytes=count, type=TYPE)], lambda src, key: need.mask) is None


@settings(max_examples=100, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda pair: pair[0] < pair[1])))
def test_implied_edges_are_those_that_the_transitive_reduction_drops(edges: set[tuple[int, int]]) -> None:
    graph = nx.DiGraph(sorted(edges))
    reduced = nx.transitive_reduction(graph)
    assert find_implied(edges, sorted(edges)) == edges - set(reduced.edges)
    pairs = [(a, b) for a in graph for b in graph if a < b]
    assert find_ordered(pairs, sorted(edges)) == {(a, b) for a, b in pairs if nx.has_path(graph, a, b)}
