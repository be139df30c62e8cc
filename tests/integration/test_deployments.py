"""The small siblings of the five deployments: they run to the end, and their DAGs show what the strategy says.

Sixteen ranks take their time: those that train on so many really run among the slow tests; here their strategies are
seen in dry runs of fewer layers and experts.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

import polars as pl
import pytest
from command_line import truedag

from truedag.launch.deployment import Deployment
from truedag.launch.deployment_file import load_deployment
from truedag.parallel.strategy import Axis
from truedag.tracer.graph import Graph

TRAINED = ["moe-30b-ep64-tp8-pp2-dp2-cpu", "moe-30b-ep64-tp2-pp8-cpu", "moe-30b-ep8-tp4-pp2-dp4-cpu"]
GENERATED = ["llama3-70b-tp2-pp4-cpu", "moe-10b-tp2-ep2-pp2-infer-cpu"]
ORTHOGONAL = "strategy=EP2-TP2-PP2"


def run(name: str, folder: Path, *overrides: str) -> tuple[Deployment, dict[str, Any], Graph]:
    """Run a deployment; return what it is, what came out, and its graph, in which all communications met."""
    done = truedag("run", name, *overrides, "--json", "--out", "out", cwd=folder, timeout_s=400)
    assert done.returncode == 0, done.stderr
    graph = Graph.open(folder / "out")
    assert graph.meta["num_unmatched"] == 0
    assert graph.meta["missing_ranks"] == []
    return load_deployment(name, overrides)[1], json.loads(done.stdout), graph


def assert_layers_and_experts_are_where_the_strategy_says(deployment: Deployment, graph: Graph) -> None:
    model, strategy = deployment.model, deployment.strategy
    nodes = (
        graph.nodes.filter(pl.col("kind") == "compute").select("layer", "expert", "rank", "stage").unique().collect()
    )
    inside = nodes.filter(pl.col("layer") >= 0)
    assert sorted(inside["layer"].unique()) == list(range(model.num_layers))
    for stage in range(strategy.pp):
        found = inside.filter(pl.col("stage") == stage)
        assert sorted(found["layer"].unique()) == sorted(strategy.layers_of_stage(model.num_layers, stage))
        assert sorted(found["rank"].unique()) == list(
            range(stage * strategy.stage_size, (stage + 1) * strategy.stage_size)
        )
    if model.num_experts is None:
        return
    held = inside.filter(pl.col("expert") >= 0).group_by("layer", "expert").agg(pl.col("rank").unique().sort())
    assert {(layer, expert): ranks for layer, expert, ranks in held.iter_rows()} == {
        (layer, expert): strategy.ranks_of_expert(model.num_layers, model.num_experts, layer, expert)
        for layer in range(model.num_layers)
        for expert in range(model.num_experts)
    }


def assert_stages_meet_at_every_boundary(deployment: Deployment, graph: Graph, phases: set[str]) -> None:
    """Every pipeline boundary is crossed in each phase, by as many sends as receives."""
    messages = graph.nodes.filter(pl.col("kind").is_in(["send", "recv"])).select("kind", "stage", "phase").collect()
    strategy = deployment.strategy
    for phase in phases:
        found = messages.filter(pl.col("phase") == phase)
        counts = {kind: len(found.filter(pl.col("kind") == kind)) for kind in ("send", "recv")}
        assert counts["send"] == counts["recv"] > 0
        assert set(found["stage"]) == set(range(strategy.pp))


def assert_trained_graph(deployment: Deployment, graph: Graph) -> None:
    assert_layers_and_experts_are_where_the_strategy_says(deployment, graph)
    assert_stages_meet_at_every_boundary(deployment, graph, {"forward", "backward"})
    strategy = deployment.strategy
    groups = graph.groups.collect()
    axes: tuple[Axis, ...] = ("tp", "pp", "ep", "etp", "dp", "edp")
    for axis in axes:
        found = {tuple(ranks) for ranks in groups.filter(pl.col("axis") == axis)["ranks"].to_list()}
        assert found >= {group for group in strategy.groups(axis) if len(group) > 1}


def assert_generated_graph(deployment: Deployment, graph: Graph) -> None:
    assert deployment.workload.kind == "infer"
    assert_layers_and_experts_are_where_the_strategy_says(deployment, graph)
    assert_stages_meet_at_every_boundary(deployment, graph, {"prefill", "decode"})
    steps = deployment.workload.decode_steps
    decode = graph.nodes.filter((pl.col("phase") == "decode") & (pl.col("layer") >= 0)).select("decode_step", "layer")
    assert len(decode.unique().collect()) == steps * deployment.model.num_layers


def assert_generations(deployment: Deployment, result: dict[str, Any]) -> None:
    """The recorded generation is the one before, token by token, and its times are told."""
    first, second = result["generations"]
    assert first["tokens"] == second["tokens"]
    steps = deployment.workload.decode_steps
    assert [len(row) for row in second["tokens"]] == [steps + 1] * deployment.workload.num_prompts
    assert (first["recorded"], second["recorded"]) == (False, True)
    assert max(second["time_to_first_token_ns"]) == second["prefill_ns"] < second["wall_ns"]
    assert all(time > 0 for time in second["time_per_output_token_ns"])


@pytest.mark.parametrize("name", TRAINED)
def test_a_dry_run_of_a_small_sibling_shows_its_strategy(name: str, tmp_path: Path) -> None:
    few = ("model.num_layers=8", "model.num_experts=16", "workload.global_batch_size=4")
    done = truedag("dry", name, *few, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_trained_graph(load_deployment(name, few)[1], Graph.open(tmp_path / "out"))


@pytest.mark.parametrize("name", GENERATED)
def test_a_small_sibling_prefills_and_decodes(name: str, tmp_path: Path) -> None:
    deployment, result, graph = run(name, tmp_path)
    assert_generated_graph(deployment, graph)
    assert_generations(deployment, result)


def test_the_same_model_generates_the_same_folded_and_orthogonal(tmp_path: Path) -> None:
    (tmp_path / "orthogonal").mkdir()
    exact = ("model.dtype=float32", "model.num_layers=4")
    done = truedag("run", GENERATED[1], *exact, "--recorder", "off", "--json", cwd=tmp_path, timeout_s=200)
    assert done.returncode == 0, done.stderr
    deployment, result, graph = run(GENERATED[1], tmp_path / "orthogonal", *exact, ORTHOGONAL)
    assert json.loads(done.stdout)["generations"][-1]["tokens"] == result["generations"][-1]["tokens"]
    assert_generated_graph(deployment, graph)
    assert_generations(deployment, result)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_small_sibling_trains_and_its_graph_is_the_strategys(name: str, tmp_path: Path) -> None:
    deployment, result, graph = run(name, tmp_path)
    losses = [step["loss"] for step in result["steps"]]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 6.0
    assert_trained_graph(deployment, graph)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moe-10b-tp2-ep2-pp2-cpu", *TRAINED])
def test_the_loss_falls_over_twenty_steps_of_a_text(name: str, tmp_path: Path) -> None:
    _, result, _ = run(name, tmp_path, "workload.steps=20")
    losses = [step["loss"] for step in result["steps"]]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(math.log(256), rel=0.05)
    assert mean(losses[15:]) < mean(losses[:5]) - 0.5
