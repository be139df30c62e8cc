"""What a training run is, and whether a strategy can run it: every rule whose breach is an error or silently wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from truedag.model.config import ModelConfig
from truedag.parallel.errors import StrategyError
from truedag.parallel.strategy import Strategy

Optimizer = Literal["adam", "sgd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """One training run, whatever ranks it runs on.

    Raises:
        StrategyError: a value breaks a rule; the message names the field, the value and the rule.
    """

    global_batch_size: int = 8
    """Sequences in a step, over all data-parallel ranks."""

    micro_batch_size: int = 1
    """Sequences in a microbatch."""

    sequence_length: int = 64
    """Tokens in a sequence."""

    sequence_parallel: bool = True
    """Split norms and residuals along the sequence over the tensor-parallel ranks; no effect at TP1."""

    optimizer: Optimizer = "adam"
    """adam (decoupled weight decay) or sgd (with momentum)."""

    learning_rate: float = 1e-4
    """Constant over the run."""

    weight_decay: float = 0.01
    """Decoupled."""

    clip_grad: float = 1.0
    """Largest norm of the whole model's gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "sequence_length"):
            if (value := getattr(self, name)) < 1:
                raise StrategyError(f"{name}={value}: {name} must be at least 1")
        if self.optimizer not in get_args(Optimizer):
            raise StrategyError(f"optimizer={self.optimizer!r}: must be one of {', '.join(get_args(Optimizer))}")
        for name in ("learning_rate", "weight_decay", "clip_grad"):
            if (number := getattr(self, name)) < 0:
                raise StrategyError(f"{name}={number}: {name} must not be negative")

    def num_microbatches(self, dp_size: int) -> int:
        """Return the microbatches that each of `dp_size` data-parallel ranks runs in a step."""
        return self.global_batch_size // (self.micro_batch_size * dp_size)


def check_fit(strategy: Strategy, model: ModelConfig, training: TrainingConfig, *, world_size: int) -> None:
    """Refuse what cannot run, and what would run and be silently wrong.

    Raises:
        StrategyError: says what does not fit, why, and the nearest valid choice.
    """
    if world_size != strategy.world_size:
        raise StrategyError(f"{strategy} needs {strategy.world_size} ranks, there are {world_size}")
    _require_multiple("num_layers", model.num_layers, "PP", strategy.pp, "each stage has as many layers")
    _require_multiple("num_attention_heads", model.num_attention_heads, "TP", strategy.tp, "heads are not cut")
    _require_multiple("num_query_groups", model.kv_heads, "TP", strategy.tp, "key and value heads are not cut")
    _require_multiple("vocab_size", model.vocab_size, "TP", strategy.tp, "padding it would change the loss")
    _check_batch(strategy, model, training)
    if model.num_experts is None:
        if strategy.ep > 1 or (strategy.notation == "folded" and strategy.etp > 1):
            raise StrategyError(f"{strategy}: the model has no experts for EP{strategy.ep} and ETP{strategy.etp}")
        _require_multiple("ffn_hidden_size", model.dense_hidden_size, "TP", strategy.tp, "columns are split evenly")
    else:
        _check_experts(strategy, model, training)


def _check_batch(strategy: Strategy, model: ModelConfig, training: TrainingConfig) -> None:
    share = training.micro_batch_size * strategy.dp
    if training.global_batch_size % share != 0:
        raise StrategyError(
            f"global_batch_size={training.global_batch_size} is no multiple of {share} (micro_batch_size="
            f"{training.micro_batch_size} x DP{strategy.dp}), so some ranks would get fewer microbatches; "
            f"nearest valid: {_nearest_multiple(training.global_batch_size, share)}"
        )
    if training.sequence_length > model.max_sequence_length:
        raise StrategyError(
            f"sequence_length={training.sequence_length} is longer than the model's "
            f"max_sequence_length={model.max_sequence_length}"
        )
    if training.sequence_parallel:
        _require_multiple("sequence_length", training.sequence_length, "TP", strategy.tp, "it is split over TP")


def _check_experts(strategy: Strategy, model: ModelConfig, training: TrainingConfig) -> None:
    assert model.num_experts is not None
    assert model.expert_hidden_size is not None
    _require_multiple("num_experts", model.num_experts, "EP", strategy.ep, "each rank has as many experts")
    _require_multiple("expert_hidden_size", model.expert_hidden_size, "ETP", strategy.etp, "columns are split evenly")
    if strategy.ep == 1 and strategy.etp != strategy.tp:
        raise StrategyError(
            f"{strategy}: with EP1, megatron-core reduces the experts' gradients over the dense data-parallel group, "
            f"which at ETP{strategy.etp} and TP{strategy.tp} is not the experts' own: they would be silently wrong; "
            f"nearest valid: ETP{strategy.tp}, or EP{strategy.tp} with ETP1"
        )
    if strategy.tp > 1 and not training.sequence_parallel:
        raise StrategyError(
            f"{strategy}: training experts at TP{strategy.tp} needs sequence_parallel=true, or every tensor-parallel "
            f"rank would route all tokens and each would be counted {strategy.tp} times"
        )


def _require_multiple(name: str, value: int, axis: str, size: int, why: str) -> None:
    if value % size != 0:
        raise StrategyError(
            f"{name}={value} is no multiple of {axis}{size} ({why}); nearest valid: {name}="
            f"{_nearest_multiple(value, size)}"
        )


def _nearest_multiple(value: int, of: int) -> int:
    return max(of, round(value / of) * of)
