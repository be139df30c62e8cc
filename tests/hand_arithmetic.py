"""How many communications a mixture of experts must have and of how many bytes, from its strategy alone.

For one microbatch of a model with orthogonal experts over EP and ETP and sequence parallelism, in half precision.
"""

from __future__ import annotations

from typing import TypeAlias

from truedag.model.config import ModelConfig
from truedag.parallel.strategy import Strategy

Expected: TypeAlias = dict[tuple[str, str], tuple[int, list[int]]]
"""By phase and label: in how many groups, and what a rank gives in each of the communications there, ascending."""

_HALF, _FULL, _COUNT = 2, 4, 8


def expect_layer(model: ModelConfig, strategy: Strategy, *, num_tokens: int) -> Expected:
    """Return the communications of each layer.

    Args:
        model: the model; every layer has experts.
        strategy: the strategy.
        num_tokens: of a microbatch.
    """
    assert model.num_experts is not None
    stage = strategy.world_size // strategy.pp
    own = num_tokens // strategy.tp  # sequence parallelism: a rank keeps its share of the tokens
    activation = own * model.hidden_size * _HALF
    routed = own * model.top_k  # balanced: as many come as go
    sent, scores = routed * model.hidden_size * _HALF, routed * _FULL
    tp_groups, ep_groups, etp_groups = stage // strategy.tp, stage // strategy.ep, stage // strategy.etp
    exchanges = stage // (strategy.ep * strategy.etp)
    # The experts' outputs are weighted in single precision before they are summed over the shards of an expert.
    weighted = 2 * sent
    return {
        # Attention gathers its input and scatters its output; in the backward pass the reverse, and its input again.
        ("forward", "all-gather tp"): (tp_groups, [activation]),
        ("forward", "reduce-scatter tp"): (tp_groups, [activation * strategy.tp]),
        ("backward", "all-gather tp"): (tp_groups, [activation, activation]),
        ("backward", "reduce-scatter tp"): (tp_groups, [activation * strategy.tp]),
        # Each rank tells how many tokens it has for each expert; then tokens and scores go there, and tokens come back.
        ("forward", "all-gather ep"): (exchanges, [model.num_experts * _COUNT]),
        ("forward", "all-to-all ep"): (ep_groups, sorted([sent, scores, sent])),
        ("backward", "all-to-all ep"): (ep_groups, sorted([sent, scores, sent])),
        # Each shard of an expert needs all its tokens, and has a part of each result.
        ("forward", "all-gather etp"): (etp_groups, sorted([sent, scores])),
        ("forward", "reduce-scatter etp"): (etp_groups, [weighted * strategy.etp]),
        ("backward", "all-gather etp"): (etp_groups, [weighted]),
        ("backward", "reduce-scatter etp"): (etp_groups, sorted([sent * strategy.etp, scores * strategy.etp])),
    }


def expect_gradients(model: ModelConfig, strategy: Strategy) -> dict[str, tuple[int, list[int]]]:
    """Return the reductions of gradients, by label: how many groups of each size in bytes, ascending by bytes."""
    assert model.num_experts is not None
    assert model.expert_hidden_size is not None
    hidden, layers = model.hidden_size, model.num_layers // strategy.pp
    heads = model.num_attention_heads * (model.head_dim or hidden // model.num_attention_heads)
    attention = (3 * heads * hidden + heads * hidden) // strategy.tp
    dense = layers * (attention + 2 * hidden + model.num_experts * hidden)
    embedding = model.vocab_size * hidden // strategy.tp
    experts = layers * (model.num_experts // strategy.ep) * 2 * hidden * model.expert_hidden_size // strategy.etp
    # The last stage has the final norm, and an output layer as large as the first stage's embedding.
    return {
        "all-reduce dp": (strategy.tp, [(dense + embedding) * _FULL, (dense + embedding + hidden) * _FULL]),
        "all-reduce edp": (strategy.ep * strategy.etp, [experts * _FULL] * strategy.pp),
    }
