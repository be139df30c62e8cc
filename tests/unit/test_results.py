"""What a rank keeps of its iterations, and what a person reads of them."""

from __future__ import annotations

import math
from pathlib import Path

from truedag.launch.rank_state import RankState, read_states
from truedag.launch.results import GenerationResult, StepResult


def step(loss: float, norm: float | None) -> StepResult:
    return StepResult(step=3, recorded=True, wall_ns=2_000_000_000, loss=loss, gradient_norm=norm)


def generation(num_not_finite: int) -> GenerationResult:
    return GenerationResult(
        step=1, recorded=False, wall_ns=700_000_000, prefill_ns=300_000_000, tokens=((1, 2, 3), (4, 5, 6)),
        time_to_first_token_ns=(100_000_000, 300_000_000), time_per_output_token_ns=(300e6, 200e6),
        decode_step_ns=200e6, prefill_tokens_per_s_per_rank=10.0, decode_tokens_per_s_per_rank=5.0,
        generated_tokens_per_s_per_rank=4.0, num_not_finite=num_not_finite,
    )  # fmt: skip


def test_what_is_not_finite_survives_and_is_not_unknown(tmp_path: Path) -> None:
    state = RankState(rank=0, pid=1, steps=[step(math.nan, math.inf), step(1.0, None)])
    state.write(tmp_path / "rank-00000.json")
    first, second = read_states(tmp_path)[0].steps
    assert math.isnan(first.loss)
    assert first.gradient_norm == math.inf
    assert second.gradient_norm is None


def test_a_step_says_what_went_wrong_in_it() -> None:
    assert step(1.5, 0.25).describe() == "step 3  loss 1.500000  gradient norm 0.250000  2.00 s  recorded"
    assert "the optimizer was skipped" in step(1.5, None).describe()
    assert "the training has diverged" in step(math.nan, 1.0).describe()
    assert "the training has diverged" in step(1.0, math.inf).describe()


def test_a_generation_is_told_in_milliseconds() -> None:
    told = generation(0).describe()
    assert "prefill 0.300 s  decode 0.400 s" in told
    assert "time to first token    200.0 ms (median of 2 prompts; 100.0 to 300.0 ms)" in told
    assert "time per output token  250.0 ms" in told
    assert "decode step            200.0 ms" in told
    assert "not finite" not in told
    assert "the logits of 1 of 2 prompts" in generation(1).describe()
