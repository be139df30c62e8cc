"""What is done with a model, by kind: training steps, or the generation of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Tag

from truedag.model.config import ModelConfig
from truedag.parallel.inference import InferenceConfig, check_inference_fit
from truedag.parallel.strategy import Strategy
from truedag.parallel.text import TokenSource, TokenType, open_tokens
from truedag.parallel.training import TrainingConfig, check_fit


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainWorkload(TrainingConfig):
    """Training steps on the tokens of a text."""

    kind: Literal["train"] = "train"
    """What is done with the model."""

    text: Path
    """A text, or a file of token ids (.npy, or raw with token_dtype); a relative path starts at the deployment file's
    folder, in an override at the current one."""

    tokenizer: Path | None = None
    """A Hugging Face tokenizer.json, applied to the text; None: the text's bytes are its tokens."""

    token_dtype: TokenType | None = None
    """What a raw file of token ids consists of."""

    steps: int = 2
    """Training steps; those before the recorded one warm up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferWorkload(InferenceConfig):
    """Tokens generated for prompts from a text: prefill, then decode."""

    kind: Literal["infer"] = "infer"
    """What is done with the model."""

    text: Path
    """As in training; prompt i begins at token i * (longest prompt)."""

    tokenizer: Path | None = None
    """As in training."""

    token_dtype: TokenType | None = None
    """As in training."""

    steps: int = 2
    """How often the whole generation is run; those before the recorded one warm up."""


def _kind(value: object) -> str:
    kind = value.get("kind", "train") if isinstance(value, Mapping) else getattr(value, "kind", "train")
    return str(kind)


WORKLOADS: Mapping[str, type] = {"train": TrainWorkload, "infer": InferWorkload}
Workload = Annotated[
    Annotated[TrainWorkload, Tag("train")] | Annotated[InferWorkload, Tag("infer")], Discriminator(_kind)
]


def check_workload(
    workload: TrainWorkload | InferWorkload, strategy: Strategy, model: ModelConfig, *, world_size: int
) -> None:
    """Refuse what cannot run, and what would run and be silently wrong.

    Raises:
        StrategyError: says what does not fit, why, and the nearest valid choice.
    """
    if isinstance(workload, TrainWorkload):
        check_fit(strategy, model, workload, world_size=world_size)
    else:
        check_inference_fit(strategy, model, workload, world_size=world_size)


def open_source(workload: TrainWorkload | InferWorkload, model: ModelConfig) -> TokenSource:
    """Open the tokens that a workload is fed, and see that there are enough. Local.

    Raises:
        DataError: the file cannot be read, is not what it is said to be, is too short, or has ids that the model lacks.
    """
    source = open_tokens(
        workload.text,
        vocab_size=model.vocab_size,
        tokenizer=workload.tokenizer,
        token_dtype=workload.token_dtype,
    )
    if isinstance(workload, TrainWorkload):
        source.require(workload.sequence_length + 1, f"sequence_length={workload.sequence_length}")
    else:
        source.require(workload.longest, f"the longest prompt (prompt_lengths={workload.prompt_lengths})")
    return source
