"""Parts of a DAG by keys: refine the keys, never make a circle, and are no finer than they must be."""

from __future__ import annotations

import networkx as nx
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from truedag.tracer.views.page.segments import find_circles, split_parts

EDGES = st.lists(st.tuples(st.integers(0, 23), st.integers(0, 23)), max_size=60)
KEYS = st.lists(st.integers(0, 5), min_size=24, max_size=24)


def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    array = np.array(pairs, np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


@given(EDGES, KEYS)
def test_parts_refine_their_keys_and_make_no_circle(pairs: list[tuple[int, int]], names: list[int]) -> None:
    src, dst = columns([(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]])
    keys = np.unique(names, return_inverse=True)[1].astype(np.int64)
    parts = split_parts(keys, src, dst)
    for part in set(parts.tolist()):
        assert len(set(keys[parts == part].tolist())) == 1
    quotient = nx.DiGraph([(a, b) for a, b in zip(parts[src].tolist(), parts[dst].tolist(), strict=True) if a != b])
    assert nx.is_directed_acyclic_graph(quotient)


@given(EDGES, KEYS)
def test_keys_that_make_no_circle_stay_whole(pairs: list[tuple[int, int]], names: list[int]) -> None:
    src, dst = columns([(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]])
    keys = np.sort(np.unique(names, return_inverse=True)[1].astype(np.int64))  # rising along the edges
    assert len(set(split_parts(keys, src, dst).tolist())) == len(set(keys.tolist()))


@given(EDGES)
def test_circles_are_the_strongly_connected_components(pairs: list[tuple[int, int]]) -> None:
    pairs = [pair for pair in pairs if pair[0] != pair[1]]
    circle = find_circles(24, *columns(pairs))
    graph = nx.DiGraph(pairs)
    expected = {frozenset(part) for part in nx.strongly_connected_components(graph) if len(part) > 1}
    found = {frozenset(np.flatnonzero(circle == number).tolist()) for number in set(circle.tolist()) - {-1}}
    assert found == expected


def test_what_depends_on_nothing_makes_no_part_of_its_own() -> None:
    # 0 -> 1 -> 3 -> 4 -> 5 goes to and fro between two keys; 2 depends on nothing and lies with the next of its key.
    keys = np.array([0, 1, 1, 0, 1, 0], np.int64)
    src, dst = columns([(0, 1), (1, 3), (3, 4), (2, 4), (4, 5)])
    parts = split_parts(keys, src, dst)
    assert parts[2] == parts[1]
    assert len(set(parts.tolist())) == 5
