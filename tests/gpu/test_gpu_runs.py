"""`truedag run` on one GPU: NCCL with one rank, gloo with ranks that share it. Needs a GPU."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from integration.command_line import truedag

from truedag.tracer.graph import Graph

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NCCL = {"name": "nccl"}
SHARED = {"name": "gloo", "device": "cuda"}
CPU = {"name": "gloo"}
DENSE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
MOE = DENSE | {"num_experts": 4, "expert_hidden_size": 64, "top_k": 2}
TRAIN = {"kind": "train", "text": "text.txt", "global_batch_size": 4, "sequence_length": 32, "steps": 2}
INFER = {"kind": "infer", "text": "text.txt", "num_prompts": 2, "prompt_lengths": [12, 7], "decode_steps": 3}
MODELS = {"dense": DENSE, "moe": MOE}


def run(folder: Path, name: str, **values: object) -> Path:
    """Run a small deployment; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("A small text for small tests. " * 40)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **values}))
    done = truedag("run", f"{name}.yaml", "--out", name, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / name


def losses(out: Path) -> list[float]:
    """Return the losses of the steps, as the rank that has them tells them."""
    states = [json.loads(path.read_text()) for path in sorted((out / "ranks").glob("*.json"))]
    told = [[step["loss"] for step in state["steps"]] for state in states]
    return next(steps for steps in told if steps and all(loss is not None for loss in steps))


def assert_on_gpu(out: Path) -> None:
    """Everything is joined, and what the ranks computed ran on the GPU."""
    graph = Graph.open(out)
    assert graph.meta["unmatched"] == []
    assert graph.meta["num_kernels"] > 100
    products = graph.nodes.filter(pl.col("op").is_in(["aten::mm", "aten::addmm", "aten::bmm"])).collect()
    assert (products["stream"] >= 0).all()


@cache
def reference(folder: Path, model: str) -> list[float]:
    """The losses of one rank on the CPU."""
    return losses(run(folder, f"{model}-cpu", model=MODELS[model], strategy="TP1", workload=TRAIN, backend=CPU))


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("on_cpu")


@pytest.mark.parametrize("model", MODELS)
def test_training_with_nccl(model: str, tmp_path: Path, on_cpu: Path) -> None:
    """`truedag run` trains on one rank with NCCL, with the losses of the CPU."""
    out = run(tmp_path, model, model=MODELS[model], strategy="TP1", workload=TRAIN, backend=NCCL)
    assert losses(out) == pytest.approx(reference(on_cpu, model), rel=1e-4)
    assert_on_gpu(out)


@pytest.mark.parametrize("model", MODELS)
def test_inference_with_nccl(model: str, tmp_path: Path) -> None:
    """`truedag run` decodes on one rank with NCCL."""
    out = run(tmp_path, model, model=MODELS[model], strategy="TP1", workload=INFER, backend=NCCL)
    assert_on_gpu(out)


@pytest.mark.parametrize("strategy", ["TP2-PP2-DP1-EP2-ETP1", "TP2-PP2-DP2-EP2-ETP1"])
def test_training_on_a_shared_gpu(strategy: str, tmp_path: Path, on_cpu: Path) -> None:
    """`truedag run` trains a mixture of experts on 4 and 8 ranks that share a GPU, with the losses of one CPU rank."""
    out = run(tmp_path, "shared", model=MOE, strategy=strategy, workload=TRAIN, backend=SHARED)
    assert losses(out) == pytest.approx(reference(on_cpu, "moe"), rel=1e-4)
    assert_on_gpu(out)


def test_inference_on_a_shared_gpu(tmp_path: Path) -> None:
    """`truedag run` decodes on four ranks that share a GPU."""
    assert_on_gpu(run(tmp_path, "shared", model=MOE, strategy="TP2-PP2-EP2-ETP1", workload=INFER, backend=SHARED))


def test_bfloat16(tmp_path: Path, on_cpu: Path) -> None:
    """Training in bfloat16 with grouped experts has the losses of the CPU in float32, within bfloat16's error."""
    out = run(
        tmp_path,
        "half",
        model=MOE | {"dtype": "bfloat16", "experts": "grouped"},
        strategy="TP1",
        workload=TRAIN,
        backend=NCCL,
    )
    assert losses(out) == pytest.approx(reference(on_cpu, "moe"), rel=2e-2)
    assert_on_gpu(out)
