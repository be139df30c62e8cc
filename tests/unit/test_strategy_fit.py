"""What a strategy may not be asked to run: each refusal says what, why, and the nearest valid choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from truedag.model.config import ModelConfig
from truedag.parallel.errors import StrategyError
from truedag.parallel.strategy import parse_strategy
from truedag.parallel.training import TrainingConfig, check_fit, check_model_fit

SPARSE = ModelConfig(
    num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, num_experts=4, expert_hidden_size=32
)
DENSE = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, ffn_hidden_size=66)
TRAINING = TrainingConfig(global_batch_size=8, micro_batch_size=1, sequence_length=16)


def refusal(notation: str, model: ModelConfig, training: TrainingConfig = TRAINING, ranks: int | None = None) -> str:
    strategy = parse_strategy(notation)
    with pytest.raises(StrategyError) as error:
        check_fit(strategy, model, training, world_size=strategy.world_size if ranks is None else ranks)
    return str(error.value)


@pytest.mark.parametrize(
    "notation",
    ["TP1", "TP2-PP2-DP2-EP2-ETP1", "EP2-TP2-PP2", "TP2-EP1-ETP2", "PP4", "DP8", "PP2-VPP2", "TP2-CP2-EP2-ETP1", "CP8"],
)
def test_a_strategy_that_fits_is_accepted(notation: str) -> None:
    strategy = parse_strategy(notation)
    check_fit(strategy, SPARSE, TRAINING, world_size=strategy.world_size)
    check_model_fit(strategy, SPARSE, world_size=strategy.world_size)


@pytest.mark.parametrize(
    ("notation", "model", "says"),
    [
        (
            "PP2-VPP3",
            SPARSE,
            "is 2 on each of PP2, no multiple of VPP3 (each chunk has as many layers); nearest valid: VPP2",
        ),
        ("TP2", replace(DENSE, ffn_hidden_size=65), "ffn_hidden_size=65"),
        ("TP2-EP2-ETP1", replace(SPARSE, shared_expert_hidden_size=33), "shared_expert_hidden_size=33"),
        ("TP2-EP2-ETP1", replace(SPARSE, num_dense_layers=1, ffn_hidden_size=33), "ffn_hidden_size=33"),
        ("PP3", SPARSE, "num_layers=4 is no multiple of PP3"),
        ("TP8-EP8-ETP1", SPARSE, "nearest valid: num_attention_heads=8"),
        ("TP4-EP4-ETP1", SPARSE, "num_query_groups=2 is no multiple of TP4"),
        ("TP2", replace(DENSE, vocab_size=257), "nearest valid: vocab_size=256"),
        ("TP4", DENSE, "nearest valid: ffn_hidden_size=64"),
        ("DP8-EP8-ETP1", SPARSE, "num_experts=4 is no multiple of EP8"),
        ("EP2-TP2", replace(SPARSE, expert_hidden_size=33), "expert_hidden_size=33 is no multiple of ETP2"),
        ("DP2-EP2-ETP1", DENSE, "the model has no experts"),
        ("TP2-EP1-ETP1", SPARSE, "silently wrong; nearest valid: ETP2, or EP2 with ETP1"),
        ("DP2-EP1-ETP2", SPARSE, "silently wrong"),
        ("DP3", SPARSE, "nearest valid: 9"),
    ],
)
def test_a_strategy_that_does_not_fit_the_model_is_refused(notation: str, model: ModelConfig, says: str) -> None:
    assert says in refusal(notation, model)


def test_a_world_of_another_size_is_refused() -> None:
    assert "needs 8 ranks, there are 4" in refusal("TP2-PP2-DP2-EP2-ETP1", SPARSE, ranks=4)


def test_experts_need_sequence_parallelism_under_tensor_parallelism() -> None:
    assert "sequence_parallel=true" in refusal("EP2-TP2", SPARSE, replace(TRAINING, sequence_parallel=False))


def test_a_sequence_is_split_evenly_and_not_too_long() -> None:
    assert "nearest valid: sequence_length=16" in refusal("TP2", DENSE, replace(TRAINING, sequence_length=17))
    assert "max_sequence_length=2048" in refusal("TP2", DENSE, replace(TRAINING, sequence_length=4096))


def test_a_sequence_is_split_into_two_parts_for_each_context_parallel_rank() -> None:
    assert "nearest valid: sequence_length=16" in refusal("CP4", DENSE, replace(TRAINING, sequence_length=20))
    assert "sequence_length=16 is no multiple of 12" in refusal("TP2-CP6", DENSE)


def test_the_interleaved_schedule_runs_microbatches_in_groups() -> None:
    says = refusal("PP4-VPP1-DP1", DENSE, replace(TRAINING, micro_batch_size=3))
    assert "no multiple of 3" in says
    says = refusal("PP4-VPP2", replace(DENSE, num_layers=8), replace(TRAINING, global_batch_size=6))
    assert "makes 6 microbatches" in says
    assert "nearest valid: 8" in says


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"distributed_optimizer": True, "optimizer": "sgd"}, "nearest valid: optimizer=adam"),
        ({"overlap_param_gather": True}, "needs distributed_optimizer=true"),
        ({"overlap_param_gather": True, "distributed_optimizer": True}, "overlap_grad_reduce=true"),
        ({"bucket_size": 1000}, "needs overlap_grad_reduce=true"),
        ({"bucket_size": 0, "overlap_grad_reduce": True}, "must be at least 1"),
        ({"recompute": "some"}, "recompute='some': must be one of none, selective, full"),
        ({"adam_beta2": 1.0}, "less than 1"),
        ({"adam_epsilon": 0.0}, "must be positive"),
    ],
)
def test_choices_that_exclude_each_other_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(StrategyError) as error:
        replace(TRAINING, **changes)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("global_batch_size", 0),
        ("micro_batch_size", 0),
        ("sequence_length", -1),
        ("optimizer", "lion"),
        ("learning_rate", -1.0),
        ("clip_grad", -0.5),
    ],
)
def test_a_training_that_is_none_is_refused(field: str, value: object) -> None:
    with pytest.raises(StrategyError, match=field):
        replace(TRAINING, **{field: value})
