"""The demo's own run: what its DAG must hold, checked on the data that it left on disk."""

import itertools
import json
from collections import Counter
from pathlib import Path

import networkx as nx
import polars as pl
import pytest
from command_line import truedag

from truedag.parallel.strategy import parse_strategy
from truedag.tracer.graph import Graph

DEPLOYMENT = "moe-10b-tp2-ep2-pp2-cpu"
STRATEGY = parse_strategy("TP2-PP2-DP2-EP2-ETP1")
NUM_LAYERS, NUM_EXPERTS, NUM_MICROBATCHES = 16, 16, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    result = truedag("run", DEPLOYMENT, "--out", str(out), cwd=out.parent)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def graph(run: Path) -> Graph:
    return Graph.open(run)


@pytest.fixture(scope="module")
def nodes(graph: Graph) -> pl.DataFrame:
    return graph.nodes.collect()


@pytest.fixture(scope="module")
def edges(graph: Graph) -> pl.DataFrame:
    return graph.edges.collect()


@pytest.fixture(scope="module")
def collectives(graph: Graph, nodes: pl.DataFrame) -> pl.DataFrame:
    """One row for each collective, with its group's axis and ranks."""
    groups = graph.groups.select("group", "axis", "ranks")
    members = graph.participants.group_by("node").agg(pl.col("group").first(), pl.len().alias("num_participants"))
    joined = members.join(groups, on="group").collect()
    return nodes.filter(pl.col("kind") == "collective").join(joined, on="node")


def test_every_edge_leads_upwards_and_networkx_agrees(nodes: pl.DataFrame, edges: pl.DataFrame) -> None:
    assert nodes["node"].to_list() == list(range(len(nodes)))
    assert edges.filter(pl.col("src") >= pl.col("dst")).is_empty()
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(nodes["node"].to_list())
    graph.add_edges_from(edges.select("src", "dst").iter_rows())
    assert nx.is_directed_acyclic_graph(graph)
    parts = sorted(nx.weakly_connected_components(graph), key=len)
    kinds = dict(nodes.select("node", "kind").iter_rows())
    assert all(len(part) == 1 and kinds[part.pop()] == "parameter" for part in parts[:-1])


def test_dataflow_alone_holds_the_model_together(nodes: pl.DataFrame, edges: pl.DataFrame) -> None:
    """Without program order, everything of a layer and every parameter still hangs together."""
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(nodes["node"].to_list())
    graph.add_edges_from(edges.filter(pl.col("kind") != "order").select("src", "dst").iter_rows())
    whole = max(nx.connected_components(graph), key=len)
    outside = nodes.filter(~pl.col("node").is_in(list(whole)))
    assert len(outside) < 0.06 * len(nodes)
    # What is outside travels through the host: numbers read with .item(), and scratch tensors nobody reads.
    assert outside.filter(pl.col("kind").is_in(["parameter", "send", "recv"])).is_empty()
    assert outside.filter(pl.col("layer") >= 0).filter(pl.col("flops").is_not_null()).is_empty()
    for op in ("aten::bmm", "aten::mm", "aten::rsqrt", "output"):  # attention, experts, norms, what came out
        assert outside.filter(pl.col("op") == op).is_empty(), op


def test_every_communication_is_matched(graph: Graph, nodes: pl.DataFrame, collectives: pl.DataFrame) -> None:
    assert graph.meta["num_unmatched"] == 0
    assert graph.meta["unmatched"] == []
    assert len(collectives) == nodes.filter(pl.col("kind") == "collective").height
    assert (collectives["num_participants"] == collectives["ranks"].list.len()).all()


def test_each_expert_appears_on_the_ranks_where_it_ran(nodes: pl.DataFrame) -> None:
    ran = (
        nodes.filter((pl.col("expert") >= 0) & (pl.col("op") == "aten::mm") & (pl.col("phase") == "forward"))
        .group_by("layer", "expert")
        .agg(pl.col("rank").unique().sort())
    )
    found = {(layer, expert): tuple(ranks) for layer, expert, ranks in ran.iter_rows()}
    holders = {
        (layer, expert): tuple(STRATEGY.ranks_of_expert(NUM_LAYERS, NUM_EXPERTS, layer, expert))
        for layer, expert in itertools.product(range(NUM_LAYERS), range(NUM_EXPERTS))
    }
    assert len(found) == NUM_LAYERS * NUM_EXPERTS
    assert found == holders


def test_both_stages_and_all_axes_communicate_on_megatrons_groups(
    graph: Graph, nodes: pl.DataFrame, collectives: pl.DataFrame
) -> None:
    assert set(nodes.filter(pl.col("layer") >= 0)["stage"].unique()) == {0, 1}
    for axis in ("tp", "ep", "pp", "dp", "edp"):
        used = collectives.filter(pl.col("axis") == axis)
        assert len(used) > 0, axis
        expected = {tuple(ranks) for ranks in STRATEGY.groups(axis)}
        assert {tuple(ranks) for ranks in used["ranks"].to_list()} <= expected, axis
        told = graph.groups.filter(pl.col("axis") == axis).collect()["ranks"].to_list()
        # Megatron also keeps groups of one rank (for embeddings) on an axis.
        assert {tuple(ranks) for ranks in told if len(ranks) > 1} == expected, axis


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_dispatch_and_combine_are_there_for_each_layer_and_microbatch(collectives: pl.DataFrame, phase: str) -> None:
    exchanges = collectives.filter(
        (pl.col("op") == "c10d::alltoall_base_") & (pl.col("axis") == "ep") & (pl.col("phase") == phase)
    )
    found = Counter(exchanges.select("layer", "microbatch").iter_rows())
    # On each of a stage's two EP groups: tokens and their probabilities out to the experts, tokens back.
    groups_per_stage = len(STRATEGY.groups("ep")) // STRATEGY.pp
    wanted = dict.fromkeys(itertools.product(range(NUM_LAYERS), range(NUM_MICROBATCHES)), 3 * groups_per_stage)
    assert found == wanted


def test_every_gradient_is_reduced_exactly_once_over_its_group(
    graph: Graph, nodes: pl.DataFrame, edges: pl.DataFrame, collectives: pl.DataFrame
) -> None:
    """From each accumulation of a parameter's gradient the data leads into exactly one reduction over dp or edp."""
    reductions = collectives.filter(
        pl.col("axis").is_in(["dp", "edp"]) & (pl.col("op").str.contains("reduce")) & (pl.col("phase") == "backward")
    )
    axis_of = dict(reductions.select("node", "axis").iter_rows())
    accumulations = nodes.filter(
        (pl.col("phase") == "backward") & (pl.col("label") == "add_") & pl.col("gradient").is_not_null()
    )
    parameters = nodes.filter(pl.col("kind") == "parameter").select("rank", "label")
    data = edges.filter(pl.col("kind") == "data").select("src", "dst")
    successors: dict[int, list[int]] = {}
    for src, dst in data.iter_rows():
        successors.setdefault(src, []).append(dst)
    op = dict(nodes.select("node", "op").iter_rows())
    reduced: dict[tuple[int, str], set[int]] = {}
    for node, rank, name in accumulations.select("node", "rank", "gradient").iter_rows():
        # The bucket is scaled in place before it is reduced; accumulations follow each other in it.
        front, seen = [node], {node}
        while front:
            for after in successors.get(front.pop(), []):
                if after in axis_of:
                    reduced.setdefault((rank, name), set()).add(after)
                elif after not in seen and op[after] in ("aten::add_", "aten::mul_", "aten::div_"):
                    seen.add(after)
                    front.append(after)
    assert set(reduced) == set(parameters.iter_rows())
    for (rank, name), over in reduced.items():
        assert len(over) == 1, (rank, name, over)
        assert axis_of[min(over)] == ("edp" if ".experts." in name else "dp"), (rank, name)


def test_each_pipeline_send_has_its_receive_with_the_same_bytes(graph: Graph, edges: pl.DataFrame) -> None:
    messages = edges.filter(pl.col("kind") == "p2p")
    parts = graph.participants.select("node", "rank", "send_bytes", "recv_bytes").collect()
    joined = messages.join(parts, left_on="src", right_on="node").join(
        parts, left_on="dst", right_on="node", suffix="_receiver"
    )
    # Forward and backward, for each microbatch, for each of the four rank pairs of the two stages.
    assert len(joined) == 2 * NUM_MICROBATCHES * (STRATEGY.world_size // 2)
    assert (joined["send_bytes"] == joined["recv_bytes_receiver"]).all()
    assert (joined["bytes"] == joined["send_bytes"]).all()
    assert ((joined["rank"] - joined["rank_receiver"]).abs() == STRATEGY.world_size // 2).all()


def test_times_are_measured_and_causal(graph: Graph, nodes: pl.DataFrame, edges: pl.DataFrame) -> None:
    timed = nodes.filter(pl.col("timing") == "measured")
    assert (timed["end_ns"] >= timed["start_ns"]).all()
    assert set(nodes.filter(pl.col("timing") == "none")["kind"].unique()) <= {"parameter", "input", "output"}
    parts = graph.participants.collect()
    assert (parts["arrive_ns"] <= parts["start_ns"]).all()
    assert (parts["start_ns"] <= parts["end_ns"]).all()
    starts, ends = nodes["start_ns"].to_list(), nodes["end_ns"].to_list()
    early = [
        (src, dst)
        for src, dst in edges.filter(pl.col("kind") == "p2p").select("src", "dst").iter_rows()
        if ends[dst] < starts[src]
    ]
    assert early == []


def test_the_run_tells_what_it_was(run: Path, graph: Graph) -> None:
    assert graph.meta["deployment"] == DEPLOYMENT
    assert graph.meta["steps"] == [1]
    for name in ("simplified.dot", "simplified.svg", "simplified.png"):
        assert (run / "views" / name).stat().st_size > 1000, name
    report = json.loads((run / "report.json").read_text())
    assert report
    assert (run / "report.md").read_text().strip()
