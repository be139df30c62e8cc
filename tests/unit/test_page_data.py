"""What the page is made of: counts are the graph's, open boxes make a DAG, figures can be added up by hand."""

from __future__ import annotations

import random
from pathlib import Path

import networkx as nx
import numpy as np
import polars as pl
import pytest
from small_dag import SmallDag, pipeline

from truedag.tracer.analysis.report import make_report
from truedag.tracer.analysis.shares import find_spans, measure_steps, share_time
from truedag.tracer.graph import Graph
from truedag.tracer.views.page.clock import occupy
from truedag.tracer.views.page.figures import measure, on_ranks
from truedag.tracer.views.page.leaves import find_leaves
from truedag.tracer.views.page.slices import cut_slices
from truedag.tracer.views.page.traffic import collective_traffic, message_traffic, stage_matrix
from truedag.tracer.views.page.tree import Tree, build_tree, name_parts
from truedag.tracer.views.page.verdicts import find_paths, place_findings
from truedag.tracer.views.page.writing import write_page


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return Graph.open(pipeline(num_microbatches=3).write(tmp_path_factory.mktemp("page") / "dag"))


def test_every_node_and_every_edge_is_in_the_leaves(graph: Graph) -> None:
    leaves = find_leaves(graph)
    nodes, edges = graph.nodes.collect(), graph.edges.filter(pl.col("kind") != "order").collect()
    assert leaves.table["num_nodes"].sum() == len(nodes)
    assert leaves.edges["num_edges"].sum() + leaves.num_inner_edges == len(edges)
    assert leaves.edges.filter(pl.col("src") >= pl.col("dst")).is_empty()
    assert leaves.table.filter(pl.col("kind") == "send")["num_nodes"].to_list() == [3, 3]  # forward, backward


def shown(tree: Tree, opened: set[int]) -> np.ndarray:
    """The box that shows each leaf: its outermost closed one."""
    boxes = np.empty(len(tree.order), np.int64)
    for place, leaf_node in enumerate(tree.leaf_node.tolist()):
        path = [leaf_node]
        while tree.parent[path[-1]] >= 0:
            path.append(int(tree.parent[path[-1]]))
        boxes[place] = next(node for node in reversed(path) if node not in opened or node == leaf_node)
    return boxes


def test_any_choice_of_open_boxes_is_a_dag(graph: Graph) -> None:
    leaves = find_leaves(graph)
    tree = build_tree(leaves)
    src, dst = (tree.order[leaves.edges[name].to_numpy()] for name in ("src", "dst"))
    groups = sorted(set(range(len(tree.name))) - set(tree.leaf_node.tolist()))
    draw = random.Random(0)
    for count in [0, len(groups), *(draw.randrange(len(groups)) for _ in range(40))]:
        boxes = shown(tree, set(draw.sample(groups, count)))
        pairs = {(a, b) for a, b in zip(boxes[src].tolist(), boxes[dst].tolist(), strict=True) if a != b}
        assert nx.is_directed_acyclic_graph(nx.DiGraph(pairs))


def test_boxes_hold_intervals_of_leaves_one_inside_the_other(graph: Graph) -> None:
    tree = build_tree(find_leaves(graph))
    for node, up in enumerate(tree.parent.tolist()):
        if up >= 0:
            assert tree.low[up] <= tree.low[node] < tree.high[node] <= tree.high[up]
            assert tree.depth[node] == tree.depth[up] + 1
    top = np.flatnonzero(tree.parent < 0)
    assert (tree.high[top] - tree.low[top]).sum() == len(tree.order)
    assert "forward · stage 0" in [tree.name[node] for node in top]


def test_a_name_that_would_make_a_circle_is_split(tmp_path: Path) -> None:
    dag = SmallDag(num_ranks=1)
    first = dag.node(module="a", label="one", phase="forward")
    second = dag.node(module="b", label="two", phase="forward", after=[first])
    dag.node(module="a", label="three", phase="forward", after=[second])
    tree = build_tree(find_leaves(Graph.open(dag.write(tmp_path))))
    named = [tree.name[node] for node in range(len(tree.name)) if tree.depth[node] == 1]
    assert sorted(name.split(" / ")[0] for name in named) == ["a", "a", "b"]


def grow(*places: tuple[int, str]) -> SmallDag:
    """One operator after the other, each in a layer and a module."""
    dag = SmallDag(num_ranks=1)
    last: tuple[int, ...] = ()
    for layer, module in places:
        for label in ("one", "two"):
            last = (dag.node(module=module, layer=layer, label=label, phase="forward", after=last),)
    return dag


def test_a_told_layer_is_one_level_whatever_its_list_is_called(tmp_path: Path) -> None:
    places = [
        (0, "gpt.h.0.attn"),
        (1, "gpt.h.1.attn"),
        (5, "gpt.stages.1.blocks.5.mlp"),
        (2, "gpt.layers.9.experts.2.up"),
    ]
    leaves = find_leaves(Graph.open(grow(*places, (-1, "gpt.head")).write(tmp_path)))
    tree = build_tree(leaves)
    inside = {
        tree.name[int(up)]: tree.name[node] for node, up in enumerate(tree.parent.tolist()) if tree.depth[node] == 2
    }
    assert inside == {
        "layer 0": "attn",
        "layer 1": "attn",
        "layer 5": "mlp",
        "layer 2": "experts 2 / up",
        "head": "two",
    }
    assert set(name_parts(leaves.table)) == {""}


def test_without_a_layer_parts_are_numbered_modules_and_what_all_are_in_is_no_level(tmp_path: Path) -> None:
    modules = ("GPT.net.wte", "GPT.net.h.0.attn", "GPT.net.h.0.mlp.2", "GPT.net.h.1", "GPT.head.proj")
    leaves = find_leaves(Graph.open(grow(*((-1, module) for module in modules)).write(tmp_path)))
    assert name_parts(leaves.table).to_list()[::2] == ["net", "net / h 0", "net / h 0", "net / h 1", "head"]
    tree = build_tree(leaves)
    assert [tree.name[node] for node in range(len(tree.name)) if tree.depth[node] == 1] == ["net", "head"]
    cells = stage_matrix(leaves, on_ranks(leaves))
    assert dict(cells.select("part", "num_nodes").iter_rows()) == {"net": 2, "net / h 0": 4, "net / h 1": 2, "head": 2}


@pytest.mark.parametrize(("num_steps", "num_leaves"), [(16, 48), (17, 3)])
def test_many_decode_steps_are_one_and_their_edges_are_counted(tmp_path: Path, num_steps: int, num_leaves: int) -> None:
    dag = SmallDag(num_ranks=1)
    last: tuple[int, ...] = ()
    for step in range(num_steps):
        for label in ("embedding", "attention", "head"):
            last = (dag.node(label=label, module=label, phase="decode", decode_step=step, after=last),)
    leaves = find_leaves(Graph.open(dag.write(tmp_path)))
    assert len(leaves.table) == num_leaves
    assert leaves.table["num_nodes"].sum() == 3 * num_steps
    told = leaves.edges["num_edges"].sum() + leaves.num_inner_edges + leaves.num_carried_edges
    assert told == 3 * num_steps - 1
    assert leaves.num_carried_edges == (num_steps - 1 if num_steps == 17 else 0)


def test_one_operator_on_two_ranks_has_mean_maximum_and_worst_rank(tmp_path: Path) -> None:
    dag = SmallDag(num_ranks=3)
    for rank, span in ((0, 100), (1, 400), (2, 100)):
        dag.node(rank=rank, time=(0, span), module="m", phase="forward", label="mm")
        dag.node(rank=rank, time=(500, 500 + span), module="m", phase="forward", label="mm")
    dag.node(rank=0, module="m", phase="forward", label="untimed")
    leaves = find_leaves(Graph.open(dag.write(tmp_path)))
    tree = build_tree(leaves)
    table = measure(leaves, tree, on_ranks(leaves)).table
    whole = table.row(0, named=True)
    assert (whole["num_nodes"], whole["num_measured"], whole["num_estimated"]) == (7, 6, 0)
    assert (whole["mean_ns"], whole["max_ns"], whole["worst_rank"]) == (400.0, 800, 1)
    assert (whole["call_mean_ns"], whole["call_max_ns"], whole["call_rank"]) == (200.0, 400, 1)
    untimed = table.row(int(tree.leaf_node[tree.order[leaves.table["label"].to_list().index("untimed")]]), named=True)
    assert (untimed["mean_ns"], untimed["max_ns"], untimed["worst_rank"], untimed["ranks"]) == (None, None, None, [0])


def test_estimates_stay_apart_from_measurements(tmp_path: Path) -> None:
    dag = SmallDag(num_ranks=2)
    dag.node(rank=0, time=(0, 100), phase="forward", label="mm")
    dag.node(rank=1, time=(0, 700), phase="forward", label="mm", timing="estimated")
    leaves = find_leaves(Graph.open(dag.write(tmp_path)))
    row = measure(leaves, build_tree(leaves), on_ranks(leaves)).table.row(0, named=True)
    assert (row["mean_ns"], row["max_ns"], row["estimated_mean_ns"], row["num_estimated"]) == (100.0, 100, 700.0, 1)


def test_shares_are_those_of_the_report_and_the_heat_map_adds_up_to_them(graph: Graph) -> None:
    leaves = find_leaves(graph)
    occupation = occupy(graph, leaves)
    assert occupation is not None
    nodes, met, ranks = graph.nodes.collect(), graph.participants.collect(), graph.ranks.collect()
    messages = graph.edges.filter(pl.col("kind") == "p2p").collect()
    spans = find_spans(nodes, met, messages, graph.groups.collect(), ranks)
    told, _ = share_time(spans, ranks, measure_steps(nodes, met))
    span = occupation.end_ns - occupation.start_ns
    for place, share in enumerate(told):
        spent = occupation.spent_ns[:, place].tolist()
        assert spent == [*share.parts, share.overlap_ns]
        assert sum(spent[:5]) == span
        assert share.bubble_ns > 0
        for kind in range(4):
            assert occupation.bins[kind, place].mean() / 255 * span == pytest.approx(spent[kind], abs=0.003 * span)


def test_what_ran_between_the_steps_is_on_the_map_and_in_no_share(tmp_path: Path) -> None:
    dag = SmallDag(num_ranks=1)
    dag.node(time=(0, 600), step=-1)
    dag.node(time=(800, 1000), step=0)
    graph = Graph.open(dag.write(tmp_path / "dag"))
    occupation = occupy(graph, find_leaves(graph))
    (share,) = make_report(graph).ranks
    assert occupation is not None
    assert occupation.spent_ns[:, 0].tolist() == [*share.parts, share.overlap_ns] == [200, 0, 0, 0, 0, 0]
    assert occupation.bins[0, 0].mean() / 255 * 1000 == pytest.approx(800, abs=3)


def test_slices_are_every_timed_part(graph: Graph) -> None:
    leaves = find_leaves(graph)
    tree = build_tree(leaves)
    slices = cut_slices(leaves, tree, 0, 10**6)
    timed = graph.nodes.filter((pl.col("timing") == "measured") & (pl.col("kind") == "compute")).collect()
    assert slices.tick_ns == 1
    assert len(slices.table) == len(timed) + len(graph.participants.collect())
    wide = cut_slices(leaves, tree, 0, 10**13)
    assert wide.tick_ns * ((1 << 32) - 2) >= 10**13


def test_traffic_adds_up(graph: Graph) -> None:
    traffic, pairs = message_traffic(graph)
    assert traffic.rows() == [(0, 1, 3, 96), (1, 0, 3, 96)]
    assert len(pairs) == 6
    collectives = collective_traffic(find_leaves(graph))
    sent = graph.participants.join(graph.nodes.filter(pl.col("kind") == "collective"), on="node").collect()
    assert collectives["bytes"].sum() == sent["send_bytes"].sum()
    assert collectives["num"].sum() == len(sent)


def test_the_critical_path_is_whole_after_joining(graph: Graph) -> None:
    paths = find_paths(graph, find_leaves(graph))
    pieces = paths.pieces
    assert (pieces["end_ns"] - pieces["start_ns"]).sum() == paths.steps[0]["end_ns"] - paths.steps[0]["start_ns"]
    assert (pieces["start_ns"][1:] == pieces["end_ns"][:-1]).all()


def test_without_times_the_page_says_why_there_is_no_path(tmp_path: Path) -> None:
    dag = SmallDag(num_ranks=1)
    dag.node(phase="forward")
    graph = Graph.open(dag.write(tmp_path / "dag"))
    leaves = find_leaves(graph)
    assert occupy(graph, leaves) is None
    assert "has a time" in find_paths(graph, leaves).why_not
    assert write_page(graph, tmp_path / "out").html.stat().st_size > 10_000


def test_findings_are_brought_to_their_leaves(graph: Graph) -> None:
    leaves = find_leaves(graph)
    node = graph.nodes.filter(pl.col("label") == "send pp").select("node").collect()["node"][0]
    finding = {
        "check": "c", "severity": "error", "title": "t", "expected": "e", "found": "f", "fix": "x", "num_nodes": 2,
        "nodes": [f"{node} (send pp)", "999999"], "ranks": [0], "layers": [],
    }  # fmt: skip
    (placed,) = place_findings({"findings": [finding]}, leaves)
    assert placed["nodes"] == [node]
    assert [leaves.table["label"][leaf] for leaf in placed["leaves"]] == ["send pp"]
    assert placed["follows"] is None
    _, second = place_findings({"findings": [finding, finding | {"follows": 1}]}, leaves)
    assert second["follows"] == 1
