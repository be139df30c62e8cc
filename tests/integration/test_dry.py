"""`truedag dry`: from a deployment to one rank of each class, to the DAG of all ranks, and what it says of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from command_line import Ran, truedag, write_small_deployment
from graph_comparison import list_differences
from hand_arithmetic import (
    count_layer_flops,
    count_step_flops,
    expect_gradients,
    expect_kept,
    expect_layer,
    expect_transfer_s,
)
from polars.testing import assert_frame_equal

from truedag.launch.deployment_file import load_deployment
from truedag.launch.device_file import load_device
from truedag.tracer.analysis.critical_path import find_critical_path
from truedag.tracer.analysis.report import make_report
from truedag.tracer.graph import Graph
from truedag.tracer.views.draw import VIEWS
from truedag.tracer.views.page.clock import occupy
from truedag.tracer.views.page.figures import measure, on_ranks
from truedag.tracer.views.page.leaves import find_leaves
from truedag.tracer.views.page.slices import cut_slices
from truedag.tracer.views.page.traffic import collective_traffic, message_traffic, stage_matrix
from truedag.tracer.views.page.tree import build_tree

# Every expert gets tokens of every rank, each another number of them.
UNEVEN = ("--routing", "zipf:0.5", "workload.sequence_length=256", "model.max_sequence_length=256", "--device", "h100")


def test_the_largest_deployment_is_four_programs_that_other_ranks_run_too(tmp_path: Path) -> None:
    done = truedag("dry", "moe-30b-ep64-tp8-pp2-dp2", "--verify", "1", "--no-views", "--json", "--out", "out",
                   "--device", "h100", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["world_size"] == 2048
    assert [len(one["ranks"]) for one in result["classes"]] == [128, 896, 128, 896]
    assert len(result["verified"]) == 1
    executed = {rank["rank"] for rank in result["ranks"]}
    assert executed == {one["ranks"][0] for one in result["classes"]} | set(result["verified"])
    assert {path.name for path in (tmp_path / "out" / "traces").glob("*.trace")} == {
        f"rank-{rank:05d}.trace" for rank in executed
    }
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert classes["routing"] == {"kind": "balanced"}
    assert sum(one["num_ranks"] for one in classes["classes"]) == 2048

    graph = Graph.open(tmp_path / "out")
    assert graph.meta["form"] == "classes"
    counted = graph.nodes.select(pl.len(), last=pl.col("node").max()).collect(engine="streaming").row(0)
    assert counted == (graph.meta["num_nodes"], graph.meta["num_nodes"] - 1), "numbers are dense"
    edges = graph.edges.select(pl.len(), wrong=(pl.col("src") >= pl.col("dst")).sum())
    assert edges.collect(engine="streaming").row(0) == (graph.meta["num_edges"], 0), "each leads to a higher number"
    some = graph.subgraph(ranks=[5, 1030])
    experts = some.nodes.filter(pl.col("expert") >= 0).select("rank", "expert").unique().sort("rank")
    assert experts.filter(pl.col("rank") >= 0).collect().rows() == [(5, 0), (1030, 0)]
    assert graph.subgraph(ranks=1535).nodes.filter(pl.col("expert") >= 0).collect()["expert"].unique().to_list() == [63]
    parts = graph.whole.participants.collect()
    spans = parts.group_by("node").agg(pl.col("rank").sort(), pl.col("group").first(), pl.len())
    spans = spans.join(graph.groups.select("group", "ranks").collect(), on="group").filter(pl.col("len") > 1)
    assert len(spans) == graph.meta["num_collectives"]
    _check_arithmetic(graph)
    _check_estimate(graph, result)
    assert (spans["rank"].cast(pl.List(pl.Int64)) == spans["ranks"].list.sort()).all(), (
        "all ranks of the group meet in it"
    )


def _check_arithmetic(graph: Graph) -> None:
    """Count the largest deployment's communications by hand, and find just these."""
    _, deployment = load_deployment("moe-30b-ep64-tp8-pp2-dp2", ())
    model, strategy = deployment.model, deployment.strategy
    met = graph.nodes.filter(pl.col("kind") == "collective").select("node", "phase", "label", "layer")
    sent = graph.participants.group_by("node").agg(pl.col("send_bytes").max())
    found = met.join(sent, on="node").collect()
    by_label = found.group_by("phase", "label", "layer", "send_bytes").len()
    for layer in range(model.num_layers):
        wanted = Counter(
            {
                (*key, size): groups * sizes.count(size)
                for key, (groups, sizes) in expect_layer(model, strategy, num_tokens=1024).items()
                for size in sizes
            }
        )
        rows = by_label.filter(pl.col("layer") == layer).select("phase", "label", "send_bytes", "len").rows()
        assert {(phase, label, size): number for phase, label, size, number in rows} == wanted, layer
    reduced = by_label.filter((pl.col("phase") == "backward") & pl.col("label").str.contains("all-reduce e?dp"))
    wanted = {
        (label, size): groups * sizes.count(size)
        for label, (groups, sizes) in expect_gradients(model, strategy).items()
        for size in sizes
    }
    assert {
        (label, size): number for label, size, number in reduced.select("label", "send_bytes", "len").rows()
    } == wanted


def _check_estimate(graph: Graph, result: dict[str, Any]) -> None:
    """Hold FLOPs, memory and estimated communication of the largest deployment against what follows from it."""
    _, deployment = load_deployment("moe-30b-ep64-tp8-pp2-dp2", ())
    model, strategy = deployment.model, deployment.strategy
    estimate = result["estimate"]
    flops = count_step_flops(model, strategy, num_tokens=1024, num_microbatches=1)
    assert make_report(graph).throughput.flops == estimate["flops"] == flops
    step_s, peak = estimate["step_ns"] / 1e9, 989.4e12
    assert flops / 2048 / peak / step_s == pytest.approx(estimate["model_flops_utilization"], rel=0.05), (
        "some in float32"
    )
    kept = {one["ranks"][0]: one for one in result["memory"]}
    for first, (parameters, gradients, state) in zip((0, 1024), expect_kept(model, strategy), strict=True):
        assert (kept[first]["parameter_bytes"], kept[first]["gradient_bytes"]) == (parameters, gradients)
        assert state <= kept[first]["state_bytes"] < state + 4096, "and the optimizer counts its steps"
    assert [fit["fits"] for fit in result["fits"]] == [True, True]
    transfer_s = find_critical_path(graph).total()["transfer_ns"].item() / 1e9
    by_hand = expect_transfer_s(model, strategy, num_tokens=1024, gpus_per_node=8)
    assert transfer_s == pytest.approx(by_hand, rel=0.03), "of one microbatch little is hidden, and little was left out"
    layer_s = count_layer_flops(model, strategy, num_tokens=1024) / (0.7 * peak)
    assert transfer_s + 3 * model.num_layers * layer_s < step_s < 1.5 * (transfer_s + 3 * model.num_layers * layer_s)


def _estimate(folder: Path) -> Any:
    return json.loads((folder / "dag" / "meta.json").read_text())["estimate"]


def _check_estimates(folder: Path, *, is_even: bool) -> None:
    classes, every = (_estimate(folder / name) for name in ("classes", "all"))
    assert classes["flops"] == every["flops"]
    if is_even:
        assert every["step_ns"] == classes["step_ns"]
        assert every["idle_share"] == pytest.approx(classes["idle_share"])
    else:
        assert every["step_ns"] <= classes["step_ns"] < 1.5 * every["step_ns"], "of each class the slowest"


def _differences(tmp_path: Path, strategy: str, *options: str) -> tuple[Path, list[str]]:
    """Execute ranks of classes and all ranks; return the folder of the first, and what differs."""
    path = write_small_deployment(tmp_path)
    overrides = (f"strategy={strategy}", "workload.global_batch_size=8", "model.num_attention_heads=4")
    for name, more in (("classes", ()), ("all", ("--all-ranks",))):
        options_of = (*overrides, *options, *more, "--no-views", "--out", name)
        done = truedag("dry", str(path), *options_of, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    found = list_differences(Graph.open(tmp_path / "classes"), Graph.open(tmp_path / "all"))
    if "--device" in options:
        _check_estimates(tmp_path, is_even=options != UNEVEN)
    # Classes are told apart by what they run, those of all ranks by the names of experts too.
    return tmp_path / "classes", [line for line in found if not line.startswith("ranks: ")]


def test_the_graph_made_of_classes_is_the_graph_of_all_ranks_whatever_their_sizes(tmp_path: Path) -> None:
    folder, differences = _differences(tmp_path, "EP2-TP2-PP2", *UNEVEN)
    assert differences == []
    classes = json.loads((folder / "classes.json").read_text())["classes"]
    assert [one["num_ranks"] for one in classes] == [2, 2, 2, 2]
    assert [one["num_sizes"] for one in classes] == [2, 2, 2, 2]
    graph = Graph.open(folder)
    assert graph.classes is None, "rows are not alike"
    lazy, read = (find_critical_path(one) for one in (graph, graph.subgraph(where=pl.lit(value=True))))
    assert lazy.is_of_classes > read.is_of_classes, "but times are"
    assert lazy.total().equals(read.total())
    sizes = pl.read_parquet(folder / "dag" / "node_sizes.parquet")
    assert len(sizes) < graph.meta["num_class_nodes"], "only what differs is kept"
    written = graph.nodes.filter(pl.col("rank") >= 0).group_by("rank").agg(pl.col("bytes_written").sum())
    of_class = written.join(graph.ranks.select("rank", "rank_class"), on="rank").group_by("rank_class")
    assert of_class.agg(pl.col("bytes_written").n_unique()).collect()["bytes_written"].to_list() == [2, 2, 2, 2]


def test_the_graph_made_of_classes_is_the_graph_of_all_ranks(tmp_path: Path) -> None:
    # One expert after the other: what ranks of a class run has different names, and is in different boxes.
    folder, differences = _differences(tmp_path, "EP2-TP2-PP2-DP2", "model.experts=sequential", "--device", "h100")
    assert differences == []
    classes = json.loads((folder / "classes.json").read_text())["classes"]
    assert [one["num_ranks"] for one in classes] == [4, 4, 4, 4]
    graph = Graph.open(folder)
    _check_page(graph)
    _check_report(graph)
    lazy, read = (find_critical_path(one) for one in (graph, graph.subgraph(where=pl.lit(value=True))))
    assert lazy.is_of_classes > read.is_of_classes
    assert lazy.error_ns is read.error_ns is None, "estimates have no clocks"
    assert lazy.total().equals(read.total())
    alike = read.stragglers.select("node", "group", "waited_ns", "late_ns")
    assert lazy.stragglers.select(alike.columns).join(alike, on=alike.columns, how="anti").is_empty()


def _check_report(graph: Graph) -> None:
    """The report of a class graph says what that of every node and edge says."""
    lazy, read = (asdict(make_report(one)) for one in (graph, graph.subgraph(where=pl.lit(value=True))))
    assert lazy["num_estimated"] > 0
    assert lazy == read


def _check_page(graph: Graph) -> None:
    """The page of a class graph says what that of every node and edge says."""
    whole = graph.subgraph(where=pl.lit(value=True))
    assert graph.classes is not None
    assert whole.classes is None
    lazy, read = find_leaves(graph), find_leaves(whole)
    assert (lazy.num_edges, lazy.num_inner_edges) == (read.num_edges, read.num_inner_edges)
    nodes = range(-1, graph.meta["num_nodes"] + 1)
    assert lazy.leaf_of(nodes).tolist() == read.leaf_of(nodes).tolist()
    assert lazy.leaf_of(nodes).min() == -1 == lazy.leaf_of([-1, graph.meta["num_nodes"]]).max()
    tables = [
        (leaves.table, leaves.edges, measure(leaves, build_tree(leaves), spent).table, stage_matrix(leaves, spent),
         collective_traffic(leaves), *message_traffic(one))
        for one, leaves in ((graph, lazy), (whole, read)) for spent in [on_ranks(leaves)]
    ]  # fmt: skip
    for one, other in zip(*tables, strict=True):
        assert_frame_equal(one, other, check_dtypes=False)
    spent = [occupy(one, leaves) for one, leaves in ((graph, lazy), (whole, read))]
    assert (spent[0] is None) == (spent[1] is None) == ("estimate" not in graph.meta)
    if spent[0] is None or spent[1] is None:
        return
    assert (spent[0].start_ns, spent[0].end_ns) == (spent[1].start_ns, spent[1].end_ns)
    np.testing.assert_array_equal(spent[0].bins, spent[1].bins)
    np.testing.assert_array_equal(spent[0].spent_ns, spent[1].spent_ns)
    shares = spent[0].spent_ns[:4].sum(axis=1) / (len(graph.ranks.collect()) * graph.meta["estimate"]["step_ns"])
    told = graph.meta["estimate"]
    waiting = told["idle_share"] - told["bubble_share"]
    by_simulation = (told["compute_share"], told["exposed_communication_share"], waiting, told["bubble_share"])
    assert shares.tolist() == pytest.approx(by_simulation, abs=1e-4), "the same moments, counted twice over"
    repeated, listed = (
        cut_slices(leaves, build_tree(leaves), spent[0].start_ns, spent[0].end_ns) for leaves in (lazy, read)
    )
    assert len(repeated.table) < len(listed.table) == repeated.num_slices
    order = ("rank", "lane", "start", "node")
    assert_frame_equal(repeated.spread().sort(order), listed.spread().sort(order), check_dtypes=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("EP2-TP2-PP2-DP2", UNEVEN),
        ("TP2-PP2-DP2-EP2-ETP1", ("workload.distributed_optimizer=true", "--device", "h100")),
        ("PP2-VPP2-DP4-EP2-ETP1", ("model.num_layers=4",)),
        ("EP2-TP2-PP2-DP2", ("--routing", "zipf:1.2")),
        ("EP2-TP2-PP2-DP2", ("--expand",)),
    ],
)
def test_the_graph_of_classes_is_that_of_all_ranks_for_any_strategy(
    strategy: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    folder, differences = _differences(tmp_path, strategy, *options)
    assert differences == []
    if "--expand" in options:
        return
    graph = Graph.open(folder)
    has_own_sizes = (folder / "dag" / "node_sizes.parquet").exists()
    assert (graph.classes is None) == has_own_sizes, "the page reads every node where ranks of a class differ"
    if not has_own_sizes:
        _check_page(graph)


def test_the_whole_graph_is_written_out(tmp_path: Path) -> None:
    path = write_small_deployment(tmp_path)
    small = load_device("h100").model_dump()
    small["memory_bytes"]["value"] = 100_000
    (tmp_path / "device.yaml").write_text(yaml.safe_dump(small))
    done = truedag("dry", str(path), "--expand", "--device", "device.yaml", "--no-views", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "DOES NOT FIT" in line]
    assert done.stdout.splitlines()[1] == told[0], "what does not fit is said before all else"
    assert re.match(
        r"ranks? [\d,-]+: DOES NOT FIT: \d+\.\d% of h100's 97.7 KiB, \d+.* too much.* at the peak; not", told[0]
    )
    assert "Estimated, not measured, on h100 with 8 GPUs a node:" in done.stdout
    lazy, written = Graph.open(tmp_path / "out" / "classes"), Graph.open(tmp_path / "out")
    assert "form" not in written.meta
    ran = written.nodes.filter(pl.col("kind").is_in(["compute", "collective", "send", "recv"])).collect()
    assert ran["timing"].unique().to_list() == ["estimated"]
    assert ran["end_ns"].max() == written.meta["estimate"]["step_ns"]
    for graph in (lazy, written):
        report = make_report(graph, peak_flops_per_s=1e12)
        assert (report.num_estimated, report.steps_ns, report.throughput.mfu) == (len(ran), {}, None)
        assert {one.transfer_ns for one in report.communications} == {None}
    before, after = (ran.select(node="node", start="start_ns", end="end_ns") for _ in range(2))
    led = written.edges.filter(pl.col("kind") == "data").collect().join(before, left_on="src", right_on="node")
    led = led.join(after, left_on="dst", right_on="node", suffix="_after")
    assert (led["end"] <= led["start_after"]).all(), "what is read was made before"
    for table in ("nodes", "edges", "participants"):
        assert getattr(lazy, table).collect().equals(getattr(written, table).collect()), table
    part = lazy.subgraph(ranks=1)
    assert part.edges.collect().equals(written.subgraph(ranks=1).edges.collect())
    assert (
        part.border.sort(pl.all().exclude("shape"))
        .collect()
        .equals(written.subgraph(ranks=1).border.sort(pl.all().exclude("shape")).collect())
    )


def test_all_ranks_make_a_graph_without_times(tmp_path: Path) -> None:
    path = write_small_deployment(tmp_path)
    done = truedag("dry", str(path), "--all-ranks", "--routing", "zipf:1.5", "--seed", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "routing zipf (alpha 1.5, seed 3)" in done.stdout
    assert "Audit: Right" in done.stdout
    views = tmp_path / "truedag-out" / "small-dry" / "views"
    assert {path.name for path in views.glob("*.svg")} == {f"{view}.svg" for view in VIEWS}
    assert (views / "index.html").stat().st_size > 100_000
    assert "Drawn: " in done.stdout
    assert done.stdout.splitlines()[-1].endswith("index.html")
    assert (tmp_path / "truedag-out" / "small-dry" / "audit.md").is_file()
    graph = Graph.open(tmp_path / "truedag-out" / "small-dry")
    assert graph.meta["dry"]["routing"] == {"kind": "zipf", "alpha": 1.5, "seed": 3}
    assert graph.meta["num_unmatched"] == 0
    nodes = graph.nodes.collect()
    assert nodes["timing"].unique().to_list() == ["none"]
    assert nodes["start_ns"].null_count() == nodes["end_ns"].null_count() == len(nodes)
    messages = nodes.filter(pl.col("kind").is_in(["send", "recv"])).group_by("kind", "phase", "microbatch").len()
    assert set(messages["len"]) == {1}
    assert len(messages) == 2 * 2 * 4, "sends and receives, forward and backward, of four microbatches"


def test_routing_of_a_real_run_is_taken_over(tmp_path: Path, small_run: Ran) -> None:
    path = write_small_deployment(tmp_path)
    routing = ("--routing", str(small_run.out / "routing"))
    dry = truedag("dry", str(path), "--all-ranks", *routing, "--no-views", "--out", "dry", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    shapes = [
        Graph.open(folder)
        .nodes.filter(pl.col("module").str.contains("experts") & (pl.col("phase") == "forward"))
        .filter(pl.col("kind") == "compute")
        .group_by("rank", "layer", "microbatch", "op", "inputs")
        .len()
        .sort(pl.all())
        .collect()
        for folder in (small_run.out, tmp_path / "dry")
    ]
    assert shapes[0].equals(shapes[1])


def test_what_is_no_routing_is_told_before_anything_starts(tmp_path: Path) -> None:
    path = write_small_deployment(tmp_path)
    done = truedag("dry", str(path), "--routing", "zipf:none", "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "zipf takes a positive exponent" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_routing_of_another_deployment_is_refused(tmp_path: Path) -> None:
    path = write_small_deployment(tmp_path)
    (tmp_path / "other.jsonl").write_text('{"truedag_routing": 1}\n[0, 0, 0, [1, 1, 0, 0]]\n')
    done = truedag("dry", str(path), "--routing", "other.jsonl", "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "take the routing of a run of the same deployment" in done.stderr
    assert "Traceback" not in done.stderr
