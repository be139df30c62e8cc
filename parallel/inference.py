"""What an inference run is, whether a strategy can run it, and its forward passes in their order. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from truedag.model.config import ModelConfig
from truedag.parallel.errors import StrategyError
from truedag.parallel.strategy import Strategy
from truedag.parallel.training import check_model_fit


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceConfig:
    """One inference run, whatever ranks it runs on: prompts are prefilled, then all are decoded in lockstep, greedily.

    Raises:
        StrategyError: a value breaks a rule; the message names the field, the value and the rule.
    """

    num_prompts: int = 8
    """Prompts, over all data-parallel ranks; each rank has as many, in a block."""

    prompt_lengths: int | tuple[int, ...] = 64
    """Tokens in a prompt: one length for all, or lengths that are taken in turn."""

    decode_steps: int = 16
    """Tokens generated for each prompt after its first."""

    micro_batch_size: int = 1
    """Consecutive prompts of a data-parallel rank that are prefilled together; they must be equally long, as nothing
    is padded."""

    decode_micro_batch_size: int | None = None
    """Rows of a data-parallel rank that are decoded together, so that several groups of them fill the pipeline;
    None: all."""

    sequence_parallel: bool = True
    """In prefill, split norms and residuals along the sequence over the tensor-parallel ranks; no effect at TP1 nor in
    decoding, where there is one position."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "micro_batch_size"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        self._require("decode_steps", self.decode_steps >= 0, "must not be negative")
        size = self.decode_micro_batch_size
        self._require("decode_micro_batch_size", size is None or size >= 1, "must be at least 1, or left out")
        lengths = self.lengths
        self._require("prompt_lengths", bool(lengths) and min(lengths) >= 1, "must be at least 1 each")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise StrategyError(f"{name}={getattr(self, name)}: {name} {rule}")

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that are taken in turn."""
        return (self.prompt_lengths,) if isinstance(self.prompt_lengths, int) else tuple(self.prompt_lengths)

    def length_of(self, prompt: int) -> int:
        """Return the tokens of a prompt."""
        return self.lengths[prompt % len(self.lengths)]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt there is."""
        return max(self.length_of(prompt) for prompt in range(min(self.num_prompts, len(self.lengths))))

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(self.length_of(prompt) for prompt in range(self.num_prompts))

    def prompts_of(self, dp_rank: int, dp_size: int) -> range:
        """Return the prompts of a data-parallel rank; its row r is the r-th of them."""
        share = self.num_prompts // dp_size
        return range(dp_rank * share, (dp_rank + 1) * share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward pass of some rows of a data-parallel rank; what comes out of it is one token of each row."""

    phase: Literal["prefill", "decode"]
    """prefill: the rows' prompts go in; decode: the tokens that their last pass put out."""

    rows: range
    """Of this data-parallel rank."""

    length: int
    """Tokens of each row that go in."""

    microbatch: int
    """Counted from 0 in the prefill, and in each decode step."""

    decode_step: int | None
    """Counted from 0; None in the prefill."""

    after: int | None
    """The place, in the order of passes, of the last pass whose tokens go into this one; None in the prefill."""


def passes(inference: InferenceConfig, *, dp_rank: int, dp_size: int) -> Iterator[Pass]:
    """Yield a data-parallel rank's passes in the order in which every stage runs them.

    All data-parallel ranks have as many, of the same phases: the exchange between experts spans them.
    """
    prompts = inference.prompts_of(dp_rank, dp_size)
    last_of_row: dict[int, int] = {}
    place = 0
    size = inference.micro_batch_size
    for microbatch, rows in enumerate(_split(len(prompts), size)):
        length = inference.length_of(prompts[rows.start])
        yield Pass(phase="prefill", rows=rows, length=length, microbatch=microbatch, decode_step=None, after=None)
        last_of_row.update(dict.fromkeys(rows, place))
        place += 1
    for step in range(inference.decode_steps):
        for microbatch, rows in enumerate(_split(len(prompts), inference.decode_micro_batch_size or len(prompts))):
            after = max(last_of_row[row] for row in rows)
            yield Pass(phase="decode", rows=rows, length=1, microbatch=microbatch, decode_step=step, after=after)
            last_of_row.update(dict.fromkeys(rows, place))
            place += 1


def _split(num_rows: int, size: int) -> Iterator[range]:
    return (range(start, start + size) for start in range(0, num_rows, size))


def check_inference_fit(strategy: Strategy, model: ModelConfig, inference: InferenceConfig, *, world_size: int) -> None:
    """Refuse an inference that cannot run, and one that would run and be silently wrong.

    Raises:
        StrategyError: says what does not fit, why, and the nearest valid choice.
    """
    _check_parts(strategy, model)
    check_model_fit(strategy, model, world_size=world_size)
    _check_rows(strategy, inference)
    _check_lengths(strategy, model, inference)


def _check_parts(strategy: Strategy, model: ModelConfig) -> None:
    for axis, size, why in (
        ("VPP", strategy.vpp, "passes go through each stage once"),
        ("CP", strategy.cp, "the cache of keys and values is not split along the sequence"),
    ):
        if size > 1:
            raise StrategyError(f"{strategy}: inference has no {axis} ({why}); nearest valid: {axis}1")
    if model.implementation != "truedag":
        raise StrategyError(
            f"implementation={model.implementation!r}: its attention does not know the cache of keys and values; "
            "nearest valid for inference: implementation='truedag'"
        )
    if model.capacity_factor is not None:
        raise StrategyError(
            f"capacity_factor={model.capacity_factor}: which tokens are dropped would depend on what is batched with "
            "them, and the output with it; nearest valid for inference: no capacity_factor"
        )


def _check_rows(strategy: Strategy, inference: InferenceConfig) -> None:
    num_prompts, dp = inference.num_prompts, strategy.dp
    for name in ("micro_batch_size", "decode_micro_batch_size"):
        share = (getattr(inference, name) or 1) * dp
        if num_prompts % share != 0:
            nearest = max(share, round(num_prompts / share) * share)
            raise StrategyError(
                f"num_prompts={num_prompts} is no multiple of {share} ({name}={getattr(inference, name) or 1} x "
                f"DP{dp}), so some ranks would run fewer passes; nearest valid: num_prompts={nearest}"
            )
    for dp_rank in range(dp):
        prompts = inference.prompts_of(dp_rank, dp)
        for rows in _split(len(prompts), inference.micro_batch_size):
            lengths = sorted({inference.length_of(prompts[row]) for row in rows})
            if len(lengths) > 1:
                raise StrategyError(
                    f"micro_batch_size={inference.micro_batch_size}: prompts {prompts[rows.start]} to "
                    f"{prompts[rows.stop - 1]} are prefilled together and have lengths {lengths}; nothing is padded; "
                    "nearest valid: micro_batch_size=1, or prompt_lengths with equal neighbours"
                )


def _check_lengths(strategy: Strategy, model: ModelConfig, inference: InferenceConfig) -> None:
    needed = inference.longest + inference.decode_steps
    if needed > model.max_sequence_length:
        raise StrategyError(
            f"prompt_lengths up to {inference.longest} and decode_steps={inference.decode_steps} need {needed} "
            f"positions; the model's max_sequence_length is {model.max_sequence_length}"
        )
    if not inference.sequence_parallel:
        return
    for length in inference.lengths:
        if length % strategy.tp != 0:
            nearest = max(strategy.tp, strategy.tp * math.floor(length / strategy.tp + 0.5))
            raise StrategyError(
                f"prompt_lengths has {length}, no multiple of TP{strategy.tp}, over which sequence_parallel=true "
                f"splits a prompt; nearest valid: {nearest}, or sequence_parallel=false"
            )
