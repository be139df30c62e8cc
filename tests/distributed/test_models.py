"""Every kind of model comes out of training the same whatever the strategy: dense, Qwen-like, DeepSeek-like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradients import RankReport, Run, train, whole
from megatron_ranks import run_ranks

from truedag.model.config import ModelConfig, RopeScaling
from truedag.parallel.strategy import parse_strategy
from truedag.parallel.training import TrainingConfig

STEPS = 2
RELATIVE_ERROR = 1e-5

DENSE = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    ffn_hidden_size=48,
    activation="swiglu",
    tied_embeddings=True,
    qkv_bias=True,
    qk_norm=True,
    rope_scaling=RopeScaling(factor=8.0, original_max_position=32),
    init_std=0.1,
)
QWEN = replace(
    DENSE,
    num_experts=4,
    expert_hidden_size=24,
    normalize_top_k=False,
    shared_expert_hidden_size=40,
    shared_expert_gate=True,
    tied_embeddings=False,
    qk_norm=False,
)
DEEPSEEK = replace(
    DENSE,
    num_layers=4,
    num_experts=8,
    num_dense_layers=1,
    expert_hidden_size=16,
    top_k=4,
    router_score="sigmoid",
    router_scaling=2.5,
    score_correction_bias=True,
    # The second step chooses other experts than it would without the first one's correction.
    score_correction_rate=0.1,
    num_expert_groups=4,
    top_k_groups=2,
    shared_expert_hidden_size=16,
    rotary_percent=0.5,
    tied_embeddings=False,
    attention="unfused",
    experts="sequential",
)
DROPPING = replace(QWEN, capacity_factor=0.75)
# Adam divides a gradient by its own size: in its first step a rounding error of a tiny one becomes a whole step.
TRAINING = TrainingConfig(
    global_batch_size=8, micro_batch_size=1, sequence_length=16, optimizer="sgd", learning_rate=0.1
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes())
    return path


def reports(
    world_size: int, model: ModelConfig, notations: list[str], text: Path, training: TrainingConfig = TRAINING
) -> list[list[RankReport]]:
    """Return what every rank reports, under each strategy."""
    runs = [Run(model=model, strategy=parse_strategy(notation), training=training) for notation in notations]
    ranks = run_ranks(world_size, train, runs, text, STEPS, True, timeout_s=120)
    return [list(of_strategy) for of_strategy in zip(*ranks, strict=True)]


def one_rank(model: ModelConfig, text: Path) -> RankReport:
    ((report,),) = reports(1, model, ["TP1"], text)
    return report


def assert_same_model(ranks: list[RankReport], reference: RankReport) -> None:
    for report in ranks:
        np.testing.assert_allclose(report.losses, reference.losses, rtol=RELATIVE_ERROR)
        np.testing.assert_allclose(report.norms, reference.norms, rtol=RELATIVE_ERROR)
    expected = whole(iter(reference.gradients))
    found = whole(piece for report in ranks for piece in report.gradients)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 0, name
        assert np.abs(found[name] - gradient).max() <= RELATIVE_ERROR * np.abs(gradient).max(), name


@pytest.mark.parametrize(
    ("model", "runs"),
    [
        pytest.param(DENSE, {4: ["TP2-PP2"], 2: ["TP2"]}, id="dense"),
        pytest.param(QWEN, {4: ["TP2-DP2-EP2-ETP2", "TP2-PP2-EP2-ETP1"]}, id="qwen"),
        pytest.param(
            DEEPSEEK,
            {4: ["TP2-PP2-EP2-ETP1", "PP2-VPP2-DP2-EP2-ETP1"], 8: ["EP2-TP2-PP2", "PP4-TP2-EP2-ETP1"]},
            id="deepseek",
        ),
        # A tensor-parallel rank has half a sequence, so its experts' capacities are others than one rank's.
        pytest.param(DROPPING, {2: ["PP2", "DP2", "EP2"]}, id="dropping"),
    ],
)
def test_gradients_do_not_depend_on_the_strategy(model: ModelConfig, runs: dict[int, list[str]], text: Path) -> None:
    reference = one_rank(model, text)
    for world_size, notations in runs.items():
        for notation, ranks in zip(notations, reports(world_size, model, notations, text), strict=True):
            print(parse_strategy(notation).describe())
            assert_same_model(ranks, reference)


def test_queries_and_keys_are_normed_the_same_without_sequence_parallelism(text: Path) -> None:
    (ranks,) = reports(2, DENSE, ["TP2"], text, replace(TRAINING, sequence_parallel=False))
    assert_same_model(ranks, one_rank(DENSE, text))


def losses(models: list[ModelConfig], text: Path) -> list[list[float]]:
    runs = [Run(model=model, strategy=parse_strategy("TP1"), training=TRAINING) for model in models]
    (found,) = run_ranks(1, train, runs, text, STEPS, False, timeout_s=60)
    return [report.losses for report in found]


def test_another_model_trains_otherwise(text: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"capacity_factor": 0.75},
        {"shared_expert_gate": False},
        {"normalize_top_k": True},
        {"router_scaling": 2.0},
        {"rotary_percent": 0.5},
        {"rope_scaling": None},
    ]
    reference, *found = losses([QWEN, *(replace(QWEN, **change) for change in changes)], text)
    for change, curve in zip(changes, found, strict=True):
        assert curve[0] != pytest.approx(reference[0], rel=1e-6), change


def test_a_correction_of_the_scores_changes_the_next_step(text: Path) -> None:
    corrected, as_it_was = losses([DEEPSEEK, replace(DEEPSEEK, score_correction_rate=0.0)], text)
    assert corrected[0] == pytest.approx(as_it_was[0], rel=1e-6)
    assert corrected[1] != pytest.approx(as_it_was[1], rel=1e-6)


def corrections(model: ModelConfig, text: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return each score correction's type, and its values before and after a step."""
    import torch

    from truedag.model.parameters import buffers
    from truedag.parallel.train import build_trainer

    trainer = build_trainer(model, parse_strategy("TP1"), TRAINING, text=text, device=torch.device("cpu"))
    held = [shard.data for _, chunk in trainer.model_chunks for shard in buffers(chunk)]
    before = [tensor.numpy().copy() for tensor in held]
    trainer.step(0)
    after = [shard.data for _, chunk in trainer.model_chunks for shard in buffers(chunk)]
    trainer.close()
    return [(str(new.dtype), old, new.numpy()) for old, new in zip(before, after, strict=True)]


def test_a_correction_of_the_scores_keeps_its_precision_in_half_precision(text: Path) -> None:
    rate = 1e-3
    model = replace(DEEPSEEK, dtype="bfloat16", score_correction_rate=rate)
    (found,) = run_ranks(1, corrections, model, text, timeout_s=60)
    assert len(found) == model.num_layers - model.num_dense_layers
    for dtype, before, after in found:
        assert dtype == "torch.float32"
        steps = (after - before) / rate
        np.testing.assert_allclose(steps, np.sign(np.round(steps)), atol=1e-4)
        assert np.abs(steps).max() > 0.5
