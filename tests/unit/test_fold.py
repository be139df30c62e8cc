"""Folding: the quotient is a DAG, its counts add up to the whole, and a fold that would make a cycle is refused."""

from __future__ import annotations

import networkx as nx
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truedag.tracer.errors import GraphError
from truedag.tracer.graph.fold import Fold, coarsen, fold

NODES = {
    "node": pl.Int64, "kind": pl.String, "rank": pl.Int32, "module": pl.String, "op": pl.String, "timing": pl.String,
    "start_ns": pl.Int64, "end_ns": pl.Int64, "flops": pl.Int64, "bytes_read": pl.Int64, "bytes_written": pl.Int64,
}  # fmt: skip
EDGES = {"src": pl.Int64, "dst": pl.Int64, "kind": pl.String, "bytes": pl.Int64}


def tables(nodes, edges, met=()):
    """Nodes as (kind, rank, module), edges as (src, dst), met as (node, rank)."""
    rows = [
        {
            "node": i, "kind": kind, "rank": rank, "module": module, "op": kind, "timing": "measured",
            "start_ns": 10 * i, "end_ns": 10 * i + i, "flops": None, "bytes_read": 1, "bytes_written": 2,
        }
        for i, (kind, rank, module) in enumerate(nodes)
    ]  # fmt: skip
    ties = [{"src": src, "dst": dst, "kind": "data", "bytes": 4} for src, dst in edges]
    participants = pl.DataFrame(list(met), schema={"node": pl.Int64, "rank": pl.Int32}, orient="row")
    return pl.DataFrame(rows, schema=NODES), pl.DataFrame(ties, schema=EDGES), participants


def assert_folds(folded: Fold, nodes: pl.DataFrame, edges: pl.DataFrame) -> None:
    assert (folded.edges["src"] < folded.edges["dst"]).all()
    graph = nx.DiGraph(folded.edges.select("src", "dst").rows())
    assert nx.is_directed_acyclic_graph(graph)
    assert folded.nodes["num_nodes"].sum() == len(nodes)
    assert folded.edges["num_edges"].sum() + folded.num_inner_edges == len(edges)
    assert sorted(folded.members["node"]) == nodes["node"].to_list()
    assert folded.nodes["bytes_read"].sum() == nodes["bytes_read"].sum()
    assert folded.nodes["time_ns"].sum() == (nodes["end_ns"] - nodes["start_ns"]).sum()


@st.composite
def programs(draw):
    """Random programs of up to three ranks: what each rank reads it made itself or got in a communication."""
    num_ranks = draw(st.integers(1, 3))
    nodes, edges, met = [], [], []
    readable: dict[int, list[int]] = {rank: [] for rank in range(num_ranks)}
    sent: list[tuple[int, int]] = []
    for node in range(draw(st.integers(1, 40))):
        choices = ["compute", "compute", "compute", "parameter", "collective", "send"]
        kind = draw(st.sampled_from([*choices, "recv"] if sent else choices))
        rank = draw(st.integers(0, num_ranks - 1))
        members = [rank]
        module = draw(st.sampled_from(["a", "b", None]))
        if kind == "collective":
            members = sorted(draw(st.sets(st.integers(0, num_ranks - 1), min_size=1)))
            met += [(node, member) for member in members]
            nodes.append((kind, -1, module))
        elif kind == "recv":
            source, other = sent.pop()
            edges.append((source, node))
            members = [(other + 1) % num_ranks]
            met.append((node, members[0]))
            nodes.append((kind, members[0], module))
        else:
            if kind == "send":
                met.append((node, rank))
                sent.append((node, rank))
            nodes.append((kind, rank, module))
        if kind not in ("parameter", "recv"):
            for member in members:
                known = readable[member]
                if known:
                    edges += [(src, node) for src in draw(st.lists(st.sampled_from(known), max_size=3))]
        if kind != "send":
            for member in members:
                readable[member].append(node)
    return tables(nodes, edges, met)


@settings(max_examples=150, deadline=None)
@given(programs(), st.sampled_from([["module"], ["module", "op"], ["op"]]))
def test_any_program_folds_to_a_dag_whose_counts_add_up(program, by):
    nodes, edges, participants = program
    assert_folds(fold(nodes, edges, participants, by), nodes, edges)


@settings(max_examples=80, deadline=None)
@given(programs())
def test_coarsening_refuses_a_cycle_or_keeps_all_counts(program):
    nodes, edges, participants = program
    fine = fold(nodes, edges, participants, ["module"])
    try:
        coarse = coarsen(fine, ["module"])
    except GraphError as error:
        assert "cycle" in str(error)  # noqa: PT017
    else:
        assert_folds(coarse, nodes, edges)


def test_a_segment_ends_at_a_communication_of_its_rank_alone():
    nodes, edges, met = tables(
        [
            ("compute", 0, "a"),  # 0
            ("compute", 1, "a"),  # 1
            ("collective", -1, "a"),  # 2, of rank 0 alone
            ("compute", 0, "a"),  # 3
            ("compute", 1, "a"),  # 4
        ],
        [(0, 2), (2, 3), (1, 4)],
        [(2, 0)],
    )
    folded = fold(nodes, edges, met, ["module"])
    groups = folded.members.group_by("fold").agg("node")["node"].to_list()
    assert sorted(map(sorted, groups)) == [[0], [1, 4], [2], [3]]
    assert folded.num_inner_edges == 1


def test_a_module_around_its_submodule_is_two_segments():
    nodes, edges, met = tables(
        [("compute", 0, "a"), ("compute", 0, "a.b"), ("compute", 0, "a")], [(0, 1), (1, 2), (0, 2)]
    )
    assert len(fold(nodes, edges, met, ["module"]).nodes) == 3


def test_what_was_there_before_folds_by_columns_though_read_at_different_times():
    nodes, edges, met = tables(
        [("parameter", 0, "a"), ("compute", 0, "a"), ("parameter", 0, "a"), ("compute", 0, "b")], [(0, 1), (2, 3)]
    )
    folded = fold(nodes, edges, met, ["module"])
    assert folded.nodes.filter(pl.col("kind") == "parameter")["num_nodes"].to_list() == [2]


def test_measured_times_are_summed_and_unknown_ones_are_not_zero():
    nodes, edges, met = tables([("compute", 0, "a")] * 3, [])
    folded = fold(nodes, edges, met, ["module"])
    assert folded.nodes.select("time_ns", "mean_ns", "max_ns").row(0) == (0 + 1 + 2, 1.0, 2)
    unknown = nodes.with_columns(timing=pl.lit("estimated"))
    assert fold(unknown, edges, met, ["module"]).nodes.select("time_ns", "mean_ns", "max_ns").row(0) == (None,) * 3


def test_ranks_fold_together_and_say_which_they_are():
    nodes, edges, met = tables(
        [("compute", 0, "a"), ("compute", 1, "a"), ("collective", -1, "a"), ("compute", 0, "b"), ("compute", 1, "b")],
        [(0, 2), (1, 2), (2, 3), (2, 4)],
        [(2, 0), (2, 1)],
    )
    coarse = coarsen(fold(nodes, edges, met, ["module"]), ["module"])
    assert coarse.nodes.select("kind", "module", "num_nodes", "num_parts").rows() == [
        ("compute", "a", 2, 2),
        ("collective", "a", 1, 1),
        ("compute", "b", 2, 2),
    ]
    assert coarse.nodes["ranks"].to_list() == [[0, 1]] * 3
    assert coarse.edges["num_edges"].to_list() == [2, 2]


def test_a_cycle_is_refused_and_named():
    nodes, edges, met = tables([("compute", 0, "a"), ("compute", 0, "b"), ("compute", 0, "a")], [(0, 1), (1, 2)])
    fine = fold(nodes, edges, met, ["module"])
    with pytest.raises(GraphError, match="cycle of 2 folded nodes"):
        coarsen(fine, ["module"])
