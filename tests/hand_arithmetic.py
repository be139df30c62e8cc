"""What a mixture of experts must compute, keep and communicate, from its strategy alone.

For a model with orthogonal experts over EP and ETP and sequence parallelism, in half precision, without gates. What is
told of communications, and of their times, is of one microbatch.
"""

from __future__ import annotations

from math import floor, log2
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


def count_layer_flops(model: ModelConfig, strategy: Strategy, *, num_tokens: int) -> int:
    """Return the products of a rank in a layer's forward pass of a microbatch."""
    assert model.num_experts is not None
    assert model.expert_hidden_size is not None
    hidden, own = model.hidden_size, num_tokens // strategy.tp
    heads = model.num_attention_heads * (model.head_dim or hidden // model.num_attention_heads) // strategy.tp
    projections = 2 * num_tokens * hidden * 4 * heads  # query, key, value, and back
    attention = 2 * 2 * num_tokens * num_tokens * heads  # scores and context, of all pairs
    router = 2 * own * hidden * model.num_experts
    # Balanced: as many tokens come to a rank's experts as it sends away, of each of the ranks that share them.
    experts = 2 * 2 * (own * model.top_k * strategy.etp) * hidden * model.expert_hidden_size // strategy.etp
    return projections + attention + router + experts


def count_step_flops(model: ModelConfig, strategy: Strategy, *, num_tokens: int, num_microbatches: int) -> int:
    """Return the products of all ranks in a step: a backward pass has twice those of its forward pass."""
    layers = strategy.world_size // strategy.pp * model.num_layers
    head = 2 * num_tokens * model.hidden_size * model.vocab_size // strategy.tp * (strategy.world_size // strategy.pp)
    layer = count_layer_flops(model, strategy, num_tokens=num_tokens)
    return 3 * num_microbatches * (layers * layer + head)


def expect_kept(model: ModelConfig, strategy: Strategy) -> list[tuple[int, int, int]]:
    """Return the bytes of parameters, gradients and optimizer state of a rank, by stage; of two stages.

    Parameters in half precision; gradients, and the optimizer's copy and its two moments in single precision.
    """
    _, dense = expect_gradients(model, strategy)["all-reduce dp"]
    experts = expect_gradients(model, strategy)["all-reduce edp"][1][0]
    counts = [(reduced + experts) // _FULL for reduced in dense]
    return [(_HALF * count, _FULL * count, 3 * _FULL * count) for count in counts]


def expect_transfer_s(model: ModelConfig, strategy: Strategy, *, num_tokens: int, gpus_per_node: int) -> float:
    """Return how long a step's communications take one after the other, on H100 as its file has it.

    Those of all layers, which stages run in turn, and of one stage's gradients; what is small beside them is left out.
    """
    base, hop_inside, hop_overhead, hop_across, hop_exposed = 6.6e-6, 0.6e-6, 1e-6, 2.7e-6, 5e-6
    inside, across = 0.8 * 450e9, 0.8 * 50e9
    assert strategy.tp == strategy.etp == gpus_per_node, (
        "a tensor-parallel group fills a node, others have one rank there"
    )

    def ring(size: int, num_bytes: float, *, nodes: int) -> float:
        """The time of all-gather and reduce-scatter: a hop to every other rank, and all bytes but the own."""
        link = inside if nodes == 1 else min(inside, across * size / nodes)
        across_nodes = (nodes - 1) * (hop_exposed if size == nodes else hop_across)
        in_nodes = (size - nodes) * (hop_inside if nodes == 1 else hop_overhead)
        return base + in_nodes + across_nodes + (size - 1) / size * num_bytes / link

    def reduced(size: int, num_bytes: float) -> float:
        """The time of an all-reduce across as many nodes as ranks: a ring twice around, or up and down a tree."""
        tree = base + 2 * floor(log2(size)) * hop_exposed + 2 * num_bytes / across
        return min(2 * ring(size, num_bytes, nodes=size) - base, tree)

    total = 0.0
    for (_, label), (_, sizes) in expect_layer(model, strategy, num_tokens=num_tokens).items():
        kind, axis = label.split(" ")
        for size in sizes:
            if axis in ("tp", "etp"):
                total += ring(strategy.tp, size * (strategy.tp if kind == "all-gather" else 1), nodes=1)
            elif kind == "all-to-all":
                total += base + hop_exposed + (strategy.ep - 1) / strategy.ep * size / across
            else:  # the counts of tokens go to all ranks that share experts
                ranks = strategy.ep * strategy.etp
                total += ring(ranks, size * ranks, nodes=strategy.ep)
    gradients = expect_gradients(model, strategy)
    return (
        total * model.num_layers
        + reduced(strategy.dp, gradients["all-reduce dp"][1][0])
        + reduced(strategy.edp, gradients["all-reduce edp"][1][0])
    )
