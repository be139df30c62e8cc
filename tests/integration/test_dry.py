"""`truedag dry`: from a deployment to one rank of each class, to the DAG of all ranks, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
from command_line import truedag, write_small_deployment

from truedag.tracer.graph import Graph


def test_the_largest_deployment_is_four_programs_that_other_ranks_run_too(tmp_path: Path) -> None:
    done = truedag("dry", "moe-30b-ep64-tp8-pp2-dp2", "--verify", "1", "--json", "--out", "out", cwd=tmp_path)
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


def test_all_ranks_make_a_graph_without_times(tmp_path: Path) -> None:
    path = write_small_deployment(tmp_path)
    done = truedag("dry", str(path), "--all-ranks", "--routing", "zipf:1.5", "--seed", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "routing zipf (alpha 1.5, seed 3)" in done.stdout
    assert "Audit: Right" in done.stdout
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


def test_routing_of_a_real_run_is_taken_over(tmp_path: Path) -> None:
    path = write_small_deployment(tmp_path)
    real = truedag("run", str(path), "trace.routing=true", "--out", "real", cwd=tmp_path)
    assert real.returncode == 0, real.stderr
    dry = truedag("dry", str(path), "--all-ranks", "--routing", "real/routing", "--out", "dry", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    shapes = [
        Graph.open(tmp_path / name)
        .nodes.filter(pl.col("module").str.contains("experts") & (pl.col("phase") == "forward"))
        .filter(pl.col("kind") == "compute")
        .group_by("rank", "layer", "microbatch", "op", "inputs")
        .len()
        .sort(pl.all())
        .collect()
        for name in ("real", "dry")
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
