"""What an inference run generated, and how fast: one rank's record of it, and the summary of all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from truedag.parallel.inference import InferenceConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What one rank saw of a run. Suffixes: R its prompts, T tokens of each, in order, V vocabulary."""

    step: int
    """The run's number."""

    prompts: range
    """Of this rank's data-parallel replica."""

    tokens_RT: tuple[tuple[int, ...], ...] | None
    """What was generated; None: not a first stage."""

    times_RT: tuple[tuple[int, ...], ...] | None
    """When the first stage had each token on its host, in ns since it began the run; None: not a first stage."""

    logits_RTV: Tensor | None
    """What each token was chosen from, in the model's dtype; None: not a last stage, or not asked for."""

    last_logits: tuple[Tensor, ...]
    """What each row's last token was chosen from, [rows, V] each; empty: not a last stage."""

    wall_ns: int
    """From entering the run on this rank to leaving it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """What a run generated and how fast; the same on every rank.

    All times are of the clock of the prompt's first stage, which takes the prompts in and gives the tokens out, so they
    are what a client sees: all prompts are there at the beginning of the run, and a token's time is when it is on the
    first stage's host.
    """

    step: int
    """The run's number."""

    tokens: tuple[tuple[int, ...], ...]
    """What was generated for each prompt."""

    time_to_first_token_ns: tuple[int, ...]
    """Of each prompt: from the beginning of the run to its first token; the prompts before it are in it."""

    time_per_output_token_ns: tuple[float, ...]
    """Of each prompt: from its first token to its last, a token after the first; empty without decode steps. The
    prompts that are prefilled after it are in it."""

    num_not_finite: int
    """Prompts whose last token was chosen from logits that are not finite numbers: it means nothing."""

    num_prompt_tokens: int
    """Tokens of all prompts."""

    num_ranks: int
    """Ranks (GPUs) of the run."""

    prefill_ns: int
    """From the beginning of the run to the last of the first tokens, on the slowest replica."""

    wall_ns: int
    """From the beginning of the run to the last token, on the slowest replica."""

    @property
    def decode_step_ns(self) -> float:
        """Mean time of a decode step of all prompts; 0 without any."""
        steps = len(self.tokens[0]) - 1
        return (self.wall_ns - self.prefill_ns) / steps if steps else 0.0

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated for all prompts, the first ones included."""
        return sum(len(tokens) for tokens in self.tokens)

    @property
    def generated_tokens_per_s_per_rank(self) -> float:
        """Tokens generated in the whole run, by its wall time and by its ranks."""
        return self.num_generated_tokens / (self.wall_ns * 1e-9) / self.num_ranks

    @property
    def prefill_tokens_per_s_per_rank(self) -> float:
        """Prompt tokens, by the prefill's time and by the ranks."""
        return self.num_prompt_tokens / (self.prefill_ns * 1e-9) / self.num_ranks

    @property
    def decode_tokens_per_s_per_rank(self) -> float:
        """Tokens generated after the first ones, by the time after the prefill and by the ranks; 0 without any."""
        num_tokens = self.num_generated_tokens - len(self.tokens)
        return num_tokens / ((self.wall_ns - self.prefill_ns) * 1e-9) / self.num_ranks if num_tokens else 0.0


def summarize(
    generation: Generation, inference: InferenceConfig, *, speaks: bool, judges: bool, device: torch.device
) -> GenerationResult:
    """Return the summary of all ranks' records. Every rank must call it; two all-reduces over all ranks.

    Args:
        generation: this rank's.
        inference: what was run.
        speaks: this rank is the one of its replica's first stage whose record counts.
        judges: this rank is the one of its replica's last stage whose logits count.
        device: of the process group's tensors.
    """
    num_not_finite = torch.zeros((), dtype=torch.int64, device=device)
    if judges:
        for logits_RV in generation.last_logits:
            num_not_finite += (~logits_RV.isfinite().all(dim=-1)).sum()
    distributed.all_reduce(num_not_finite)
    shape = (2, inference.num_prompts, inference.decode_steps + 1)
    told = torch.zeros(shape, dtype=torch.int64, device=device)
    if speaks:
        rows = slice(generation.prompts.start, generation.prompts.stop)
        told[0, rows] = torch.tensor(generation.tokens_RT, dtype=torch.int64, device=device)
        told[1, rows] = torch.tensor(generation.times_RT, dtype=torch.int64, device=device)
    distributed.all_reduce(told)
    tokens, times = told.tolist()
    steps = inference.decode_steps
    return GenerationResult(
        step=generation.step,
        tokens=tuple(map(tuple, tokens)),
        time_to_first_token_ns=tuple(row[0] for row in times),
        time_per_output_token_ns=tuple((row[-1] - row[0]) / steps for row in times) if steps else (),
        num_not_finite=int(num_not_finite),
        num_prompt_tokens=inference.num_tokens,
        num_ranks=distributed.get_world_size(),
        prefill_ns=max(row[0] for row in times),
        wall_ns=max(row[-1] for row in times),
    )
