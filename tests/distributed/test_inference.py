"""Prefill and decoding: the tokens and logits are those of the whole text computed anew for every token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from megatron_ranks import run_ranks
from small_model import SMALL

from truedag.model.config import ModelConfig
from truedag.parallel.errors import StrategyError
from truedag.parallel.inference import InferenceConfig
from truedag.parallel.strategy import parse_strategy

RELATIVE_ERROR = 1e-5
SPARSE = SMALL
GROUPED = replace(SMALL, attention="fused", experts="grouped", activation="swiglu", num_query_groups=2, qk_norm=True)
DENSE = ModelConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=64,
    activation="swiglu",
    attention="unfused",
    tied_embeddings=True,
    qkv_bias=True,
)
FUSED = replace(DENSE, attention="fused")
INFERENCE = InferenceConfig(num_prompts=4, prompt_lengths=(8, 12, 4, 8), decode_steps=5)
EQUAL = InferenceConfig(num_prompts=4, prompt_lengths=8, decode_steps=4, micro_batch_size=2, decode_micro_batch_size=1)

Prompts = tuple[tuple[int, ...], ...]
Array = npt.NDArray[Any]


def prompts_of(inference: InferenceConfig) -> Prompts:
    draw = np.random.default_rng(5)
    return tuple(
        tuple(draw.integers(0, 256, inference.length_of(number)).tolist()) for number in range(inference.num_prompts)
    )


def build(model: ModelConfig, notation: str, inference: InferenceConfig, *, keep_logits: bool = False) -> Any:
    from truedag.parallel.generate import build_generator
    from truedag.parallel.prompts import Prompts

    return build_generator(
        model,
        parse_strategy(notation),
        inference,
        prompts=Prompts(prompts_of(inference)),
        device=torch.device("cpu"),
        keep_logits=keep_logits,
    )


def recompute(model: ModelConfig, inference: InferenceConfig) -> tuple[list[list[int]], Array]:
    """Generate on one rank without a cache: everything again for every token."""
    generator = build(model, "TP1", inference)
    ((_, chunk),) = generator.model_chunks
    tokens, logits = [], []
    with torch.no_grad():
        for prompt in prompts_of(inference):
            text = list(prompt)
            rows = []
            for _ in range(inference.decode_steps + 1):
                rows.append(chunk(torch.tensor([text]), None, None)[0, -1])
                text.append(int(rows[-1].argmax()))
            tokens.append(text[len(prompt) :])
            logits.append(torch.stack(rows).float().numpy())
    generator.close()
    return tokens, np.stack(logits)


def generate(model: ModelConfig, notations: list[str], inference: InferenceConfig) -> list[tuple[Any, Any, Any]]:
    """Return of each strategy the summary of its second run, and this rank's logits with their prompts."""
    results = []
    for notation in notations:
        generator = build(model, notation, inference, keep_logits=True)
        first = generator.summarize(generator.run(0))
        generation = generator.run(1)
        summary = generator.summarize(generation)
        assert summary.tokens == first.tokens
        logits = None if generation.logits_RTV is None else generation.logits_RTV.float().numpy()
        results.append((summary, generation.prompts, logits))
        generator.close()
    return results


@pytest.mark.parametrize(
    ("model", "world_size", "notations", "inference"),
    [
        pytest.param(SPARSE, 8, ["TP2-PP2-DP2-EP2-ETP1", "EP2-TP2-PP2", "TP2-DP4-EP4-ETP2"], INFERENCE, id="sparse-8"),
        pytest.param(
            GROUPED, 4, ["TP2-PP2-EP2-ETP1", "DP2-PP2-EP2-ETP1", "PP4", "EP2-TP2", "TP2-PP2-EP1-ETP2", "TP2-PP2"],
            INFERENCE, id="grouped-4",
        ),
        pytest.param(
            GROUPED, 2, ["TP2-EP2-ETP1", "TP2-EP1-ETP2"], replace(INFERENCE, sequence_parallel=False), id="unsplit-2"
        ),
        pytest.param(SPARSE, 2, ["DP2", "EP2", "PP2", "TP2-EP2-ETP1"], INFERENCE, id="sparse-2"),
        pytest.param(DENSE, 4, ["TP2-PP2", "TP4", "PP4", "PP2-DP2"], INFERENCE, id="dense-4"),
        pytest.param(FUSED, 2, ["TP2", "PP2"], INFERENCE, id="fused-2"),
        pytest.param(SPARSE, 4, ["TP2-PP2-EP2-ETP1", "PP4", "TP2-EP2-ETP1-DP2"], EQUAL, id="batched-4"),
    ],
)  # fmt: skip
def test_a_cache_and_a_strategy_change_nothing(
    model: ModelConfig, world_size: int, notations: list[str], inference: InferenceConfig
) -> None:
    ((tokens, logits),) = run_ranks(1, recompute, model, replace(inference, sequence_parallel=True), timeout_s=60)
    ranks = run_ranks(world_size, generate, model, notations, inference, timeout_s=180)
    for place, notation in enumerate(notations):
        strategy = parse_strategy(notation)
        seen = set()
        for rank, results in enumerate(ranks):
            summary, prompts, found = results[place]
            assert [list(row) for row in summary.tokens] == tokens, notation
            assert (found is None) == (strategy.coordinates(rank)["pp"] != strategy.pp - 1)
            if found is not None:
                seen.update(prompts)
                wanted = logits[prompts.start : prompts.stop]
                assert found.shape == wanted.shape
                assert np.abs(found - wanted).max() <= RELATIVE_ERROR * np.abs(wanted).max(), notation
        assert seen == set(range(inference.num_prompts))


def test_another_model_generates_another_text() -> None:
    ((tokens, logits),) = run_ranks(1, recompute, SPARSE, INFERENCE, timeout_s=60)
    ((summary, _, found),) = run_ranks(1, generate, replace(SPARSE, seed=1), ["TP1"], INFERENCE, timeout_s=60)[0]
    assert [list(row) for row in summary.tokens] != tokens
    assert np.abs(found - logits).max() > 100 * RELATIVE_ERROR * np.abs(logits).max()


def test_logits_that_are_no_numbers_are_counted() -> None:
    for results in run_ranks(2, generate, replace(SPARSE, init_std=1e38), ["PP2"], INFERENCE, timeout_s=60):
        assert results[0][0].num_not_finite == INFERENCE.num_prompts
    ((summary, _, _),) = run_ranks(1, generate, SPARSE, ["TP1"], INFERENCE, timeout_s=60)[0]
    assert summary.num_not_finite == 0


def test_times_of_tokens_follow_each_other() -> None:
    for results in run_ranks(2, generate, SPARSE, ["PP2"], INFERENCE, timeout_s=60):
        ((summary, _, _),) = results
        assert len(summary.tokens) == 4
        assert {len(row) for row in summary.tokens} == {6}
        first = summary.time_to_first_token_ns
        assert 0 < first[0] < first[1] < first[2] < first[3] == summary.prefill_ns < summary.wall_ns
        assert all(time > 0 for time in summary.time_per_output_token_ns)
        assert summary.num_prompt_tokens == 32
        assert summary.num_generated_tokens == 24
        assert summary.generated_tokens_per_s_per_rank == pytest.approx(24e9 / summary.wall_ns / 2)
        assert summary.prefill_tokens_per_s_per_rank == pytest.approx(32e9 / summary.prefill_ns / 2)
        decode_ns = summary.wall_ns - summary.prefill_ns
        assert summary.decode_tokens_per_s_per_rank == pytest.approx(20e9 / decode_ns / 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_generates(dtype: Any) -> None:
    model = replace(SPARSE, dtype=dtype)
    ((tokens, logits),) = run_ranks(1, recompute, model, INFERENCE, timeout_s=60)
    for results in run_ranks(2, generate, model, ["TP2-EP2-ETP1", "PP2"], INFERENCE, timeout_s=120):
        for summary, prompts, found in results:
            if found is not None:  # the first token has nothing before it in which they could differ
                wanted = logits[prompts.start : prompts.stop, 0]
                assert np.abs(found[:, 0] - wanted).max() <= 0.02 * np.abs(wanted).max()
            assert len(summary.tokens) == len(tokens)


def choose_among_equals(notation: str) -> Any:
    generator = build(SPARSE, notation, INFERENCE)
    for name, parameter in generator.model_chunks[0][1].named_parameters():
        if name == "output_layer.weight":
            parameter.data.zero_()
    summary = generator.summarize(generator.run(0))
    generator.close()
    return summary.tokens


def test_of_equally_likely_tokens_the_lowest_is_chosen_on_every_rank() -> None:
    for tokens in run_ranks(2, choose_among_equals, "TP2-EP2-ETP1", timeout_s=60):
        assert tokens == ((0,) * (INFERENCE.decode_steps + 1),) * INFERENCE.num_prompts


def refuse(inference: InferenceConfig) -> str:
    with pytest.raises(StrategyError) as refusal:
        build(SPARSE, "TP1", inference)
    return str(refusal.value)


def test_a_run_that_does_not_fit_is_refused_before_anything_is_built() -> None:
    inference = InferenceConfig(num_prompts=3, micro_batch_size=2)
    (message,) = run_ranks(1, refuse, inference, timeout_s=60)
    assert message.startswith("num_prompts=3 is no multiple of 2")
