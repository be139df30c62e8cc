"""Rank classes: what tells ranks apart and what does not; folding the ranks of a class together."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import polars as pl
import pytest
from dag_source import as_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from small_dag import SmallDag, pipeline

from truedag.tracer.errors import GraphError


class Program:
    """Ranks of two in each tensor-parallel group that run one program: weights, an expert, an all-reduce, its use."""

    def __init__(self, *, num_ranks: int = 4) -> None:
        self.dag = SmallDag(num_ranks=num_ranks)
        self.groups = [self.dag.group("tp", [rank, rank + 1]) for rank in range(0, num_ranks, 2)]
        self.clock = 0
        self.last: dict[int, int] = {}

    def run(self, rank: int, *, reads: int = 1, **columns: object) -> int:
        self.clock += 7 + rank
        before = [self.last[rank]] if rank in self.last else []
        self.last[rank] = self.dag.node(
            rank=rank, after=before * reads, time=(self.clock, self.clock + 3 + rank), **columns
        )
        return self.last[rank]

    def reduce(self, pair: int) -> None:
        ranks = (2 * pair, 2 * pair + 1)
        node = self.dag.node("collective", -1, [self.last[rank] for rank in ranks], time=(self.clock, self.clock + 9))
        for rank in ranks:
            self.dag.meet(node, self.groups[pair], rank, (self.clock, self.clock, self.clock + 9))
            self.last[rank] = node

    def whole(self, change: Callable[[Program, int], object] = lambda program, rank: None) -> SmallDag:
        ranks = range(self.dag.num_ranks)
        for rank in ranks:
            weight = {"label": f"experts.{rank}.w", "module": f"experts.{rank}", "expert": rank, "layer": 0}
            self.last[rank] = self.dag.node("parameter", rank, outputs="float32[8,4]", inputs="", **weight)
            self.run(rank, op="aten::mm", **weight | {"label": "mm"}, outputs=f"float32[{rank + 3},4]")
        for pair in range(len(self.groups)):
            self.reduce(pair)
        for rank in ranks:
            change(self, rank)
            self.run(rank, op="aten::add", layer=1)
        return self.dag


def classes(dag: SmallDag) -> list[int]:
    found = as_graph(dag).rank_classes()
    assert found["structure"].n_unique() == found["rank_class"].n_unique()
    return found.sort("rank")["rank_class"].to_list()


def test_times_sizes_experts_and_members_of_groups_tell_no_ranks_apart() -> None:
    assert classes(Program().whole()) == [0, 0, 0, 0]


DIFFERENCES: dict[str, Callable[[Program, int], object]] = {
    "another operator": lambda program, rank: program.run(rank, op="aten::sub" if rank == 2 else "aten::mul"),
    "one more": lambda program, rank: program.run(rank) if rank == 2 else None,
    "another layer": lambda program, rank: program.run(rank, layer=9 if rank == 2 else 3),
    "another type": lambda program, rank: program.run(rank, outputs="int64[2]" if rank == 2 else "float32[2]"),
    "more dimensions": lambda program, rank: program.run(rank, outputs="float32[2]" if rank == 2 else "float32[2,2]"),
    "other data": lambda program, rank: program.run(rank, reads=0 if rank == 2 else 1),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_what_ran_tells_ranks_apart(what: str) -> None:
    assert classes(Program().whole(DIFFERENCES[what])) == [0, 0, 1, 0]


def test_sizes_of_parameters_tell_ranks_apart() -> None:
    dag = Program().whole()
    next(row for row in dag.nodes if row["kind"] == "parameter" and row["rank"] == 3)["outputs"] = "float32[8,3]"
    assert classes(dag) == [0, 0, 0, 1]


def test_the_axis_and_the_size_of_a_group_are_its_role() -> None:
    dag = Program().whole()
    dag.groups[1]["axis"] = "dp"
    assert classes(dag) == [0, 0, 1, 1]
    dag.groups[1] |= {"axis": "tp", "ranks": [2, 3, 0]}
    assert classes(dag) == [0, 0, 1, 1]


def test_experts_without_tokens_run_the_same_program() -> None:
    """Its zeros for a gradient that nobody gave, and data that leave no edge because there is none."""

    def empty(program: Program, rank: int) -> None:
        if rank == 2:
            program.dag.node(
                rank=rank, op="aten::zeros", time=(program.clock, program.clock), inputs="", outputs="f[0]"
            )
            program.last.pop(rank)
        size = 0 if rank == 2 else rank + 1
        program.run(rank, op="aten::gelu", inputs=f"float32[{size},4]", outputs=f"float32[{size},4]")

    assert classes(Program().whole(empty)) == [0, 0, 0, 0]


def test_threads_are_told_apart_by_what_they_ran_and_not_by_number_or_time() -> None:
    def two_threads(program: Program, rank: int) -> None:
        before, made = program.last[rank], {}
        names = [("aten::exp", 1), ("aten::log", 2)]
        for op, thread in names if rank % 2 else names[::-1]:
            program.last[rank] = before
            made[op] = program.run(rank, op=op, thread=thread if rank < 2 else 3 - thread)
        program.last[rank] = made["aten::exp" if rank < 3 else "aten::log"]

    assert classes(Program().whole(two_threads)) == [0, 0, 0, 1]


def chain(num_ranks: int) -> SmallDag:
    """Each rank but the first receives, computes, and each but the last sends on."""
    dag = SmallDag(num_ranks=num_ranks)
    group = dag.group("pp", range(num_ranks))
    sent = None
    for rank in range(num_ranks):
        before = []
        if sent is not None:
            received = dag.node("recv", rank, time=(0, 1))
            dag.edges.append({"src": sent, "dst": received, "kind": "p2p", "bytes": 4, "dtype": "f", "shape": [1]})
            dag.meet(received, group, rank, (0, 0, 1))
            before = [received]
        computed = dag.node(rank=rank, after=before, time=(0, 1))
        sent = None
        if rank + 1 < num_ranks:
            sent = dag.node("send", rank, [computed], time=(0, 1))
            dag.meet(sent, group, rank, (0, 0, 1))
    return dag


def test_stages_in_the_middle_are_one_class_and_do_not_fold_onto_each_other() -> None:
    graph = as_graph(chain(5))
    assert graph.rank_classes()["rank_class"].to_list() == [0, 1, 1, 1, 2]
    with pytest.raises(GraphError, match="wait for each other in turn"):
        graph.fold("rank_class")
    assert graph.subgraph(ranks=[0, 1]).fold("rank_class").nodes.height == 5


def test_a_class_folds_to_one_of_its_ranks_and_says_for_how_many_it_stands() -> None:
    graph = as_graph(Program().whole())
    folded = graph.fold("rank_class")
    one = graph.subgraph(ranks=0)
    kinds = one.nodes.collect()["kind"].to_list()
    assert folded.nodes["kind"].to_list() == kinds
    assert folded.nodes["num_nodes"].to_list() == [2 if kind == "collective" else 4 for kind in kinds]
    assert folded.nodes["num_ranks"].to_list() == [4] * len(kinds)
    assert folded.edges["num_edges"].sum() + folded.num_inner_edges == graph.edges.collect().height
    assert sorted(folded.members["node"]) == graph.nodes.collect()["node"].to_list()


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("level", ["module", "layer", "stage", "rank_class", ("op", "phase")])
@settings(max_examples=8, deadline=None)
@given(num_microbatches=st.integers(1, 3))
def test_every_level_is_a_dag_whose_counts_add_up(level: str, by_class: bool, num_microbatches: int) -> None:
    dag = pipeline(num_microbatches=num_microbatches)
    dag.nodes[1] |= {"timing": "estimated"}
    graph = as_graph(dag)
    folded = graph.fold(level, by_class=by_class)
    nodes, edges = graph.nodes.collect(), graph.edges.collect()
    assert (folded.edges["src"] < folded.edges["dst"]).all()
    assert nx.is_directed_acyclic_graph(nx.DiGraph(folded.edges.select("src", "dst").rows()))
    assert folded.nodes["num_nodes"].sum() == len(nodes)
    assert folded.nodes["num_inner_edges"].sum() == folded.num_inner_edges
    assert folded.edges["num_edges"].sum() + folded.num_inner_edges == len(edges)
    assert folded.edges["bytes"].sum() + folded.nodes["inner_bytes"].sum() == edges["bytes"].sum()
    spans = nodes.with_columns(span=pl.col("end_ns") - pl.col("start_ns"))
    assert folded.nodes["time_ns"].sum() == spans.filter(timing="measured")["span"].sum()
    assert folded.nodes["estimated_ns"].sum() == spans.filter(timing="estimated")["span"].sum()
    assert folded.nodes["num_measured"].sum() == len(nodes) - 1
    assert folded.nodes["num_estimated"].sum() == 1
    kinds = folded.members.join(nodes.select("node", "kind", "rank"), on="node")
    assert (kinds.group_by("fold").agg(pl.col("kind").n_unique())["kind"] == 1).all()


@pytest.mark.parametrize(("level", "said"), [("model", "no level 'model'"), (["width"], "no column 'width'")])
def test_a_level_that_is_none_is_named(level: str, said: str) -> None:
    with pytest.raises(GraphError, match=said):
        as_graph(pipeline()).fold(level)
