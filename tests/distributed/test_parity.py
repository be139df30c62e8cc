"""The same model comes out of a training step whatever the strategy: every rank's gradients against one rank's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gradients import RankReport, train, whole_gradients
from megatron_ranks import run_ranks
from small_model import SMALL

from truedag.model.config import ModelConfig
from truedag.parallel.strategy import parse_strategy
from truedag.parallel.training import TrainingConfig

STEPS = 2
RELATIVE_ERROR = 1e-5

SPARSE = SMALL
DENSE = ModelConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=64,
    activation="swiglu",
    attention="fused",
    tied_embeddings=True,
)
GROUPED = replace(SPARSE, attention="fused", experts="grouped", activation="swiglu")
REAL_WIDTH = ModelConfig(
    num_layers=16,
    hidden_size=512,
    num_attention_heads=16,
    num_experts=16,
    expert_hidden_size=1024,
    attention="unfused",
    experts="sequential",
)
# Adam divides a gradient by its own size: in its first step a rounding error of a tiny one becomes a whole step.
TRAINING = TrainingConfig(
    global_batch_size=8, micro_batch_size=1, sequence_length=16, optimizer="sgd", learning_rate=0.1
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes())
    return path


def assert_same_model(ranks: list[RankReport], reference: RankReport) -> None:
    for report in ranks:
        np.testing.assert_allclose(report.losses, reference.losses, rtol=RELATIVE_ERROR)
        np.testing.assert_allclose(report.norms, reference.norms, rtol=RELATIVE_ERROR)
    expected, found = whole_gradients([reference]), whole_gradients(ranks)
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values(), default=0.0) <= RELATIVE_ERROR, sorted(errors.items(), key=lambda item: -item[1])[:5]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))


@pytest.mark.parametrize(
    ("model", "world_size", "notations"),
    [
        pytest.param(SPARSE, 8, ["TP2-PP2-DP2-EP2-ETP1", "EP2-TP2-PP2", "TP2-PP1-DP4-EP4-ETP2"], id="sparse-8"),
        pytest.param(SPARSE, 2, ["TP2-EP2-ETP1", "TP2-EP1-ETP2", "PP2", "DP2", "EP2"], id="sparse-2"),
        pytest.param(GROUPED, 4, ["TP2-DP2-EP2-ETP2", "PP2-DP2-EP2-ETP1"], id="grouped-4"),
        pytest.param(DENSE, 4, ["TP2-PP2", "TP4", "PP2-DP2"], id="dense-4"),
    ],
)
def test_gradients_do_not_depend_on_the_strategy(
    model: ModelConfig, world_size: int, notations: list[str], text: Path
) -> None:
    strategies = [parse_strategy(notation) for notation in notations]
    one = parse_strategy("TP1")
    (reference,) = run_ranks(1, train, model, [one], TRAINING, text, STEPS, True, timeout_s=60)
    ranks = run_ranks(world_size, train, model, strategies, TRAINING, text, STEPS, True, timeout_s=120)
    for place, strategy in enumerate(strategies):
        print(strategy.describe())
        assert_same_model([reports[place] for reports in ranks], reference[0])


def test_experts_in_sequence_and_grouped_are_the_same_model(text: Path) -> None:
    one = [parse_strategy("TP1")]
    (sequential,) = run_ranks(1, train, SPARSE, one, TRAINING, text, STEPS, True, timeout_s=60)
    grouped_model = replace(SPARSE, attention="fused", experts="grouped")
    (grouped,) = run_ranks(1, train, grouped_model, one, TRAINING, text, STEPS, True, timeout_s=60)
    assert_same_model(grouped, sequential[0])


def test_the_tensor_parallel_dense_model_without_sequence_parallelism_is_the_same(text: Path) -> None:
    training = replace(TRAINING, sequence_parallel=False)
    (reference,) = run_ranks(1, train, DENSE, [parse_strategy("TP1")], training, text, STEPS, True, timeout_s=60)
    ranks = run_ranks(2, train, DENSE, [parse_strategy("TP2")], training, text, STEPS, True, timeout_s=60)
    assert_same_model([reports[0] for reports in ranks], reference[0])


def test_a_wrong_gradient_is_noticed(text: Path) -> None:
    (reference,) = run_ranks(1, train, SPARSE, [parse_strategy("TP1")], TRAINING, text, 1, True, timeout_s=60)
    (other,) = run_ranks(
        1, train, replace(SPARSE, seed=1), [parse_strategy("TP1")], TRAINING, text, 1, True, timeout_s=60
    )
    with pytest.raises(AssertionError):
        assert_same_model(other, reference[0])


def test_the_demo_model_at_its_real_width_equals_one_rank(text: Path) -> None:
    training = TrainingConfig(global_batch_size=8, micro_batch_size=1, sequence_length=64)
    (reference,) = run_ranks(1, train, REAL_WIDTH, [parse_strategy("TP1")], training, text, STEPS, False, timeout_s=120)
    strategies = [parse_strategy("TP2-PP2-DP2-EP2-ETP1")]
    ranks = run_ranks(8, train, REAL_WIDTH, strategies, training, text, STEPS, False, timeout_s=180)
    for reports in ranks:
        np.testing.assert_allclose(reports[0].losses, reference[0].losses, rtol=RELATIVE_ERROR)
        np.testing.assert_allclose(reports[0].norms, reference[0].norms, rtol=RELATIVE_ERROR)
