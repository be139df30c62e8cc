"""What came of a workload's iterations, as a rank's state keeps them and as a person reads them. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from pydantic import BaseModel, ConfigDict

# What is not finite is kept as it is, and not as null, which means unknown.
_CONFIG = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class StepResult(BaseModel):
    """One training step as this rank saw it."""

    model_config = _CONFIG

    step: int
    recorded: bool
    wall_ns: int
    loss: float
    """Mean over the tokens of the global batch, in nats; the same on every rank."""
    gradient_norm: float | None
    """L2 norm of the whole model's gradient, before clipping; the same on every rank. None: the step was skipped."""

    def describe(self) -> str:
        """Return the step in one line."""
        norm = "unknown" if self.gradient_norm is None else f"{self.gradient_norm:.6f}"
        line = (
            f"step {self.step}  loss {self.loss:.6f}  gradient norm {norm}  "
            f"{self.wall_ns / 1e9:.2f} s{_mark(self.recorded)}"
        )
        if self.gradient_norm is None:
            return f"{line}  (float16 overflowed at this loss scale: the optimizer was skipped)"
        if not (math.isfinite(self.loss) and math.isfinite(self.gradient_norm)):
            return f"{line}  (not finite: the training has diverged)"
        return line


class GenerationResult(BaseModel):
    """One run of an inference workload, the same on every rank; its times are those of parallel.generation."""

    model_config = _CONFIG

    step: int
    recorded: bool
    wall_ns: int
    """From the beginning of the run to the last token, on the slowest replica."""
    prefill_ns: int
    """From the beginning of the run to the last of the first tokens, on the slowest replica."""
    tokens: tuple[tuple[int, ...], ...]
    """What was generated for each prompt."""
    time_to_first_token_ns: tuple[int, ...]
    """Of each prompt; the prompts that were prefilled before it are in it."""
    time_per_output_token_ns: tuple[float, ...]
    """Of each prompt, after its first token; the prompts that were prefilled after it are in it."""
    decode_step_ns: float
    """A decode step of all prompts; 0 without any."""
    prefill_tokens_per_s_per_rank: float
    """Prompt tokens, by the prefill's time and by the ranks."""
    decode_tokens_per_s_per_rank: float
    """Tokens generated after the first ones, by the time after the prefill and by the ranks."""
    generated_tokens_per_s_per_rank: float
    """All generated tokens, by the whole time and by the ranks."""
    num_not_finite: int
    """Prompts whose last token was chosen from logits that are not finite numbers."""

    def describe(self) -> str:
        """Return the run in some lines."""
        decode_ns = self.wall_ns - self.prefill_ns
        times = f"prefill {self.prefill_ns / 1e9:.3f} s  decode {decode_ns / 1e9:.3f} s"
        lines = [
            f"run {self.step}  {times}{_mark(self.recorded)}",
            f"time to first token    {_spread(self.time_to_first_token_ns)}",
        ]
        if self.time_per_output_token_ns:
            lines.append(f"time per output token  {_spread(self.time_per_output_token_ns)}")
            lines.append(f"decode step            {self.decode_step_ns / 1e6:.1f} ms (mean)")
        lines.append(
            f"tokens/s per rank      {self.prefill_tokens_per_s_per_rank:.1f} prompt in prefill, "
            f"{self.decode_tokens_per_s_per_rank:.1f} generated in decode, "
            f"{self.generated_tokens_per_s_per_rank:.1f} generated in all"
        )
        if self.num_not_finite:
            lines.append(
                f"not finite: the logits of {self.num_not_finite} of {len(self.tokens)} prompts; their tokens mean "
                "nothing (float16 overflows where bfloat16 does not)"
            )
        return "\n    ".join(lines)


def _mark(recorded: bool) -> str:
    return "  recorded" if recorded else ""


def _spread(times_ns: Sequence[float]) -> str:
    low, middle, high = min(times_ns) / 1e6, median(times_ns) / 1e6, max(times_ns) / 1e6
    return f"{middle:.1f} ms (median of {len(times_ns)} prompts; {low:.1f} to {high:.1f} ms)"
