"""What an inference run is: its passes in order, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from truedag.model.config import ModelConfig
from truedag.parallel.errors import StrategyError
from truedag.parallel.inference import InferenceConfig, check_inference_fit, passes
from truedag.parallel.strategy import parse_strategy

DENSE = ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4, max_sequence_length=64)
SPARSE = replace(DENSE, num_experts=4, expert_hidden_size=32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_prompts": 0}, "num_prompts=0: num_prompts must be at least 1"),
        ({"micro_batch_size": 0}, "micro_batch_size=0: micro_batch_size must be at least 1"),
        ({"decode_steps": -1}, "decode_steps=-1: decode_steps must not be negative"),
        (
            {"decode_micro_batch_size": 0},
            "decode_micro_batch_size=0: decode_micro_batch_size must be at least 1, or left out",
        ),
        ({"prompt_lengths": 0}, "prompt_lengths=0: prompt_lengths must be at least 1 each"),
        ({"prompt_lengths": (4, 0)}, r"prompt_lengths=(4, 0): prompt_lengths must be at least 1 each"),
        ({"prompt_lengths": ()}, r"prompt_lengths=(): prompt_lengths must be at least 1 each"),
    ],
)
def test_an_impossible_value_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(StrategyError) as refusal:
        InferenceConfig(**values)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("notation", "model", "values", "message"),
    [
        ("TP2", DENSE, {"prompt_lengths": (8, 7)}, "prompt_lengths has 7, no multiple of TP2.*nearest valid: 8"),
        ("TP1", DENSE, {"prompt_lengths": (40, 60)}, "up to 60 and decode_steps=16 need 76 positions.* is 64"),
        ("DP2", DENSE, {"num_prompts": 3}, r"num_prompts=3 is no multiple of 2 .*DP2.*nearest valid: num_prompts=4"),
        ("DP2", DENSE, {"micro_batch_size": 3}, r"no multiple of 6 \(micro_batch_size=3 x DP2\).*num_prompts=6"),
        ("TP1", DENSE, {"decode_micro_batch_size": 3}, r"no multiple of 3 \(decode_micro_batch_size=3.*num_prompts=9"),
        (
            "TP1",
            DENSE,
            {"micro_batch_size": 2, "prompt_lengths": (8, 8, 8, 4)},
            r"micro_batch_size=2: prompts 2 to 3 .* lengths \[4, 8\]; nothing is padded; nearest valid: micro_batch_",
        ),
        ("PP2-VPP2", DENSE, {}, "inference has no VPP .*nearest valid: VPP1"),
        ("CP2", DENSE, {}, "inference has no CP .*nearest valid: CP1"),
        ("EP2", SPARSE, {"num_prompts": 7}, "num_prompts=7 is no multiple of 2"),
        ("TP1", replace(SPARSE, capacity_factor=1.0), {}, "capacity_factor=1.0: which tokens are dropped"),
        ("TP1", replace(DENSE, implementation="transformer_engine"), {}, "nearest valid for inference: implementation"),
        ("TP3", DENSE, {}, "num_attention_heads=4 is no multiple of TP3"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_valid_choice(
    notation: str, model: ModelConfig, values: dict[str, Any], message: str
) -> None:
    strategy = parse_strategy(notation)
    inference = InferenceConfig(**{"prompt_lengths": 16, **values})
    with pytest.raises(StrategyError, match=message):
        check_inference_fit(strategy, model, inference, world_size=strategy.world_size)


@pytest.mark.parametrize(
    ("notation", "values"),
    [
        ("TP2-PP2-DP2-EP2-ETP1", {"prompt_lengths": (8, 12)}),
        ("EP2-TP2-PP2", {"prompt_lengths": (7, 9), "sequence_parallel": False}),
        ("EP2", {"prompt_lengths": (7, 7, 9, 9), "micro_batch_size": 2, "decode_micro_batch_size": 2}),
        ("TP1", {"prompt_lengths": 64, "decode_steps": 0}),
        ("TP1", {"num_prompts": 1, "prompt_lengths": (8, 1000)}),
    ],
)
def test_what_fits_is_accepted(notation: str, values: dict[str, Any]) -> None:
    strategy = parse_strategy(notation)
    check_inference_fit(strategy, SPARSE, InferenceConfig(**values), world_size=strategy.world_size)


@given(
    dp=some.integers(1, 3),
    share=some.integers(1, 4),
    sizes=some.tuples(some.integers(1, 3), some.integers(1, 3)),
    lengths=some.lists(some.integers(1, 9), min_size=1, max_size=5),
    steps=some.integers(0, 3),
)
def test_every_row_is_prefilled_once_and_decoded_in_every_step(
    dp: int, share: int, sizes: tuple[int, int], lengths: list[int], steps: int
) -> None:
    num_rows = share * sizes[0] * sizes[1]
    inference = InferenceConfig(
        num_prompts=num_rows * dp,
        prompt_lengths=tuple(lengths),
        decode_steps=steps,
        micro_batch_size=sizes[0],
        decode_micro_batch_size=sizes[1],
    )
    everywhere = [list(passes(inference, dp_rank=rank, dp_size=dp)) for rank in range(dp)]
    for rank, order in enumerate(everywhere):
        for step in (None, *range(steps)):
            rows = [row for one in order if one.decode_step == step for row in one.rows]
            assert rows == list(range(num_rows))
        for place, one in enumerate(order):
            assert (one.after is None) == (one.phase == "prefill") == (one.decode_step is None)
            if one.after is not None:
                assert one.after < place
                before = {row for earlier in order[: one.after + 1] for row in earlier.rows}
                assert set(one.rows) <= before
                assert not any(set(one.rows) & set(later.rows) for later in order[one.after + 1 : place])
            else:
                assert one.length == inference.length_of(inference.prompts_of(rank, dp)[one.rows.start])
        kinds = [(one.phase, one.rows, one.microbatch, one.decode_step) for one in order]
        assert kinds == [(one.phase, one.rows, one.microbatch, one.decode_step) for one in everywhere[0]]
    shares = [prompt for rank in range(dp) for prompt in inference.prompts_of(rank, dp)]
    assert shares == list(range(inference.num_prompts))
