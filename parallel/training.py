"""What a training run is, and whether a strategy can run it: every rule whose breach is an error or silently wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from truedag.model.config import ModelConfig
from truedag.parallel.errors import StrategyError
from truedag.parallel.strategy import Strategy, nearest_divisor

# torch's grouped product takes matrices whose rows begin at whole multiples of this.
_GROUPED_ALIGNMENT_BYTES = 16

Optimizer = Literal["adam", "sgd"]
Recompute = Literal["none", "selective", "full"]

_CHOICES: dict[str, tuple[str, ...]] = {"optimizer": get_args(Optimizer), "recompute": get_args(Recompute)}


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

    learning_rate: float = 1e-3
    """Constant over the run."""

    adam_beta1: float = 0.9
    """Decay of the mean of the gradients; with sgd, the momentum."""

    adam_beta2: float = 0.999
    """Decay of the mean of their squares."""

    adam_epsilon: float = 1e-8
    """Added to the root of that mean."""

    weight_decay: float = 0.01
    """Decoupled."""

    clip_grad: float = 1.0
    """Largest norm of the whole model's gradient; 0 does not clip."""

    distributed_optimizer: bool = False
    """Each data-parallel rank keeps the optimizer's state of its own shard of the parameters (ZeRO-1): gradients are
    reduce-scattered, updated parameters gathered. Needs adam."""

    overlap_grad_reduce: bool = False
    """Reduce a bucket of gradients while the backward pass goes on, as soon as its last gradient is there; from the
    second step on, as the first one learns when that is."""

    overlap_param_gather: bool = False
    """Gather a bucket of updated parameters in the next forward pass, when it is needed, and the one after it
    meanwhile. Needs distributed_optimizer and overlap_grad_reduce."""

    bucket_size: int | None = None
    """Parameters in a bucket of overlapped reductions; None: megatron-core's choice, at least 40 million. megatron-core
    keeps one bucket on every stage but the first, and in every chunk but a stage's first."""

    recompute: Recompute = "none"
    """What the forward pass forgets and the backward pass computes again: none; selective, the core attention; full,
    every layer."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "sequence_length"):
            if (value := getattr(self, name)) < 1:
                raise StrategyError(f"{name}={value}: {name} must be at least 1")
        for name, choices in _CHOICES.items():
            if (choice := getattr(self, name)) not in choices:
                raise StrategyError(f"{name}={choice!r}: must be one of {', '.join(choices)}")
        for name in ("learning_rate", "weight_decay", "clip_grad"):
            if not (number := getattr(self, name)) >= 0:
                raise StrategyError(f"{name}={number}: {name} must not be negative")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= (number := getattr(self, name)) < 1:
                raise StrategyError(f"{name}={number}: {name} must be at least 0 and less than 1")
        if not self.adam_epsilon > 0:
            raise StrategyError(f"adam_epsilon={self.adam_epsilon}: adam_epsilon must be positive")
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        if self.distributed_optimizer and self.optimizer != "adam":
            raise StrategyError(
                f"optimizer={self.optimizer!r}: distributed_optimizer=true shards the state of adam only; "
                "nearest valid: optimizer=adam, or distributed_optimizer=false"
            )
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise StrategyError(
                "overlap_param_gather=true needs distributed_optimizer=true (without it every rank has all updated "
                "parameters) and overlap_grad_reduce=true"
            )
        if self.bucket_size is not None and (self.bucket_size < 1 or not self.overlap_grad_reduce):
            raise StrategyError(
                f"bucket_size={self.bucket_size}: must be at least 1, and needs overlap_grad_reduce=true"
            )

    def num_microbatches(self, dp_size: int) -> int:
        """Return the microbatches that each of `dp_size` data-parallel ranks runs in a step."""
        return self.global_batch_size // (self.micro_batch_size * dp_size)


def check_fit(strategy: Strategy, model: ModelConfig, training: TrainingConfig, *, world_size: int) -> None:
    """Refuse a training that cannot run, and one that would run and be silently wrong.

    Raises:
        StrategyError: says what does not fit, why, and the nearest valid choice.
    """
    check_model_fit(strategy, model, world_size=world_size)
    _check_batch(strategy, model, training)
    if model.num_experts is not None and strategy.ep == 1 and strategy.etp != strategy.tp:
        raise StrategyError(
            f"{strategy}: with EP1, megatron-core reduces the experts' gradients over the dense data-parallel group, "
            f"which at ETP{strategy.etp} and TP{strategy.tp} is not the experts' own: they would be silently wrong; "
            f"nearest valid: ETP{strategy.tp}" + (f", or EP{strategy.tp} with ETP1" if strategy.tp > 1 else "")
        )
    if model.num_experts is not None and strategy.tp > 1 and not training.sequence_parallel:
        raise StrategyError(
            f"{strategy}: training experts at TP{strategy.tp} needs sequence_parallel=true, or every tensor-parallel "
            f"rank would route all tokens and each would be counted {strategy.tp} times"
        )


def check_model_fit(strategy: Strategy, model: ModelConfig, *, world_size: int) -> None:
    """Refuse a strategy that cannot hold the model, whatever is done with it.

    Raises:
        StrategyError: says what does not fit, why, and the nearest valid choice.
    """
    if world_size != strategy.world_size:
        raise StrategyError(f"{strategy} needs {strategy.world_size} ranks, there are {world_size}")
    _require_multiple("num_layers", model.num_layers, "PP", strategy.pp, "each stage has as many layers")
    per_stage = model.num_layers // strategy.pp
    if per_stage % strategy.vpp != 0:
        divisors = [size for size in range(1, per_stage + 1) if per_stage % size == 0]
        raise StrategyError(
            f"num_layers={model.num_layers} is {per_stage} on each of PP{strategy.pp}, no multiple of VPP"
            f"{strategy.vpp} (each chunk has as many layers); nearest valid: "
            f"VPP{min(divisors, key=lambda size: abs(size - strategy.vpp))}"
        )
    _require_multiple("num_attention_heads", model.num_attention_heads, "TP", strategy.tp, "heads are not cut")
    _require_multiple("num_query_groups", model.kv_heads, "TP", strategy.tp, "key and value heads are not cut")
    _require_multiple("vocab_size", model.vocab_size, "TP", strategy.tp, "padding it would change the loss")
    if model.num_experts is None or model.num_dense_layers > 0:
        _require_multiple("ffn_hidden_size", model.dense_hidden_size, "TP", strategy.tp, "columns are split evenly")
    if model.num_experts is not None:
        _check_experts(strategy, model)
    elif strategy.ep > 1 or (strategy.notation == "folded" and strategy.etp > 1):
        raise StrategyError(
            f"{strategy}: the model has no experts for EP{strategy.ep} and ETP{strategy.etp}; nearest valid: "
            f"{Strategy(tp=strategy.tp, cp=strategy.cp, pp=strategy.pp, vpp=strategy.vpp, dp=strategy.dp)}"
        )


def _check_batch(strategy: Strategy, model: ModelConfig, training: TrainingConfig) -> None:
    share = training.micro_batch_size * strategy.dp
    if training.global_batch_size % share != 0:
        raise StrategyError(
            f"global_batch_size={training.global_batch_size} is no multiple of {share} (micro_batch_size="
            f"{training.micro_batch_size} x DP{strategy.dp}), so some ranks would get fewer microbatches; "
            f"nearest valid: {_nearest_multiple(training.global_batch_size, share)}"
        )
    num_microbatches = training.num_microbatches(strategy.dp)
    if strategy.vpp > 1 and num_microbatches % strategy.pp != 0:
        raise StrategyError(
            f"global_batch_size={training.global_batch_size} makes {num_microbatches} microbatches on each of DP"
            f"{strategy.dp}, no multiple of PP{strategy.pp}: VPP{strategy.vpp} runs them through a chunk in groups of "
            f"{strategy.pp}; nearest valid: {_nearest_multiple(training.global_batch_size, share * strategy.pp)}"
        )
    if training.sequence_length > model.max_sequence_length:
        raise StrategyError(
            f"sequence_length={training.sequence_length} is longer than the model's "
            f"max_sequence_length={model.max_sequence_length}"
        )
    if strategy.cp > 1:
        parts, tp = 2 * strategy.cp, strategy.tp if training.sequence_parallel else 1
        why = "each rank has an early and a late part of it, which TP splits again"
        _require_multiple("sequence_length", training.sequence_length, "", math.lcm(parts, strategy.cp * tp), why)
    elif training.sequence_parallel:
        _require_multiple("sequence_length", training.sequence_length, "TP", strategy.tp, "it is split over TP")


def _check_experts(strategy: Strategy, model: ModelConfig) -> None:
    assert model.num_experts is not None
    assert model.expert_hidden_size is not None
    _require_multiple("num_experts", model.num_experts, "EP", strategy.ep, "each rank has as many experts")
    _require_multiple("expert_hidden_size", model.expert_hidden_size, "ETP", strategy.etp, "columns are split evenly")
    if model.shared_expert_hidden_size is not None:
        shared = model.shared_expert_hidden_size
        _require_multiple("shared_expert_hidden_size", shared, "TP", strategy.tp, "columns are split evenly")
    if model.experts == "grouped":
        num_bytes = 4 if model.dtype == "float32" else 2
        for name, width in (
            ("hidden_size", model.hidden_size),
            ("expert_hidden_size", model.expert_hidden_size // strategy.etp),
        ):
            if width * num_bytes % _GROUPED_ALIGNMENT_BYTES != 0:
                of = _GROUPED_ALIGNMENT_BYTES // num_bytes
                share = strategy.etp if name == "expert_hidden_size" else 1
                raise StrategyError(
                    f"{name}={width * share} is {width} on a rank: experts=grouped needs rows of whole "
                    f"{_GROUPED_ALIGNMENT_BYTES} bytes, {of} numbers of {model.dtype}; nearest valid: "
                    f"{name}={_nearest_multiple(width, of) * share}, or experts=sequential"
                )


def _require_multiple(name: str, value: int, axis: str, size: int, why: str) -> None:
    if value % size != 0:
        raise StrategyError(
            f"{name}={value} is no multiple of {axis}{size} ({why}); nearest valid: {name}="
            f"{_nearest_multiple(value, size)}"
            + (f", or {axis}{nearest_divisor(value, size)}" if axis and size > 1 else "")
        )


def _nearest_multiple(value: int, of: int) -> int:
    return max(of, round(value / of) * of)
