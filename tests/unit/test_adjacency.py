"""Who leads to whom: as networkx says, on random graphs with gaps in their numbers."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truedag.tracer.errors import GraphError
from truedag.tracer.graph.adjacency import Adjacency


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int]]]:
    ids = sorted(draw(st.sets(st.integers(0, 60), min_size=2, max_size=14)))
    pairs = st.tuples(st.sampled_from(ids), st.sampled_from(ids)).filter(lambda pair: pair[0] < pair[1])
    return ids, draw(st.lists(pairs, max_size=40))


def build(ids: list[int], edges: list[tuple[int, int]]) -> tuple[Adjacency, nx.DiGraph]:
    src, dst = (np.array([edge[end] for edge in edges], np.int64) for end in (0, 1))
    network = nx.DiGraph(edges)
    network.add_nodes_from(ids)
    return Adjacency.build(np.array(ids[::-1], np.int64), src, dst), network


@settings(max_examples=150, deadline=None)
@given(graphs(), st.data())
def test_it_finds_what_networkx_finds(graph: tuple[list[int], list[tuple[int, int]]], data: st.DataObject) -> None:
    ids, edges = graph
    adjacency, network = build(ids, edges)
    one, other = (data.draw(st.sampled_from(ids)) for _ in range(2))
    assert adjacency.ancestors(one) == sorted(nx.ancestors(network, one))
    assert adjacency.descendants(one) == sorted(nx.descendants(network, one))
    assert adjacency.successors(one) == sorted(network.successors(one))
    assert adjacency.predecessors(one) == sorted(network.predecessors(one))
    paths = {tuple(path) for path in nx.all_simple_paths(network, one, other)} if one != other else {(one,)}
    found = list(adjacency.paths(one, other))
    assert len(found) == len(set(found))
    assert set(found) == paths
    assert adjacency.count_paths(one, other) == len(paths)
    assert adjacency.between(one, other) == sorted({node for path in paths for node in path})
    shortest = adjacency.shortest_path(one, other)
    assert len(shortest) == min(map(len, paths), default=0)
    assert not paths or shortest in paths


def test_paths_are_counted_where_they_are_too_many_to_walk() -> None:
    edges = [(i, j) for i in range(200) for j in (i + 1, i + 2) if j <= 200]
    adjacency, _ = build(list(range(201)), edges)
    fibonacci = [1, 1]
    while len(fibonacci) <= 200:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    assert adjacency.count_paths(0, 200) == fibonacci[200]
    assert len(adjacency.shortest_path(0, 200)) == 101
    assert next(adjacency.paths(0, 200)) == tuple(range(201))


def test_long_chains_are_reached_over_many_stretches() -> None:
    count = 20_000
    chain = np.arange(count - 1)
    adjacency = Adjacency.build(np.arange(count), chain, chain + 1)
    assert adjacency.descendants(count // 2) == list(range(count // 2 + 1, count))
    assert adjacency.ancestors(count // 2) == list(range(count // 2))


def test_a_graph_without_nodes_or_edges_and_a_node_that_is_none() -> None:
    empty = np.zeros(0, np.int64)
    with pytest.raises(GraphError, match="node 3 is not in this graph"):
        Adjacency.build(empty, empty, empty).ancestors(3)
    alone = Adjacency.build(np.array([5]), empty, empty)
    assert alone.descendants(5) == []
    assert alone.shortest_path(5, 5) == (5,)
