"""What operators do in a transformer and what communications are for: the words that subjects and expectations share.

In a dataset roles follow from the module that an operator ran in and from the operator itself; both tables are names
only, so an operator that fits none has no role and is left alone.
"""

from __future__ import annotations

import re

MATMULS = frozenset({"aten::mm", "aten::bmm", "aten::addmm", "aten::matmul", "aten::baddbmm", "aten::linear"})
_GROUPED = frozenset({"aten::_grouped_mm", "aten::grouped_mm", *MATMULS})
_NORMS = frozenset({"aten::rsqrt", "aten::_fused_rms_norm", "aten::rms_norm", "aten::native_layer_norm"})
_SOFTMAX = frozenset({"aten::_softmax", "aten::softmax"})
_ACTIVATIONS = frozenset({"aten::gelu", "aten::silu", "aten::relu"})
_FUSED = re.compile(r"^aten::_?scaled_dot_product")

LAYER = re.compile(r"^decoder\.layers\.(\d+)(?:\.|$)")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.\d+(?:\.|$)")

# What is in a layer, after its name; "" is the layer itself.
_IN_LAYER: dict[str, tuple[tuple[frozenset[str], str], ...]] = {
    "input_layernorm": ((_NORMS, "attention norm"),),
    "self_attention.linear_qkv": ((MATMULS, "QKV projection"),),
    "self_attention": ((frozenset({"aten::index_put_", "aten::copy_"}), "cache write"),),
    "self_attention.core_attention.scores": ((MATMULS, "attention scores"),),
    "self_attention.core_attention.weights": ((_SOFTMAX, "attention softmax"),),
    "self_attention.core_attention.context": ((MATMULS, "attention context"),),
    "self_attention.linear_proj": ((MATMULS, "output projection"),),
    "": ((frozenset({"aten::add", "aten::add_"}), "residual"),),
    "pre_mlp_layernorm": ((_NORMS, "feed-forward norm"),),
    "mlp.router": ((MATMULS, "router"), (frozenset({"aten::topk"}), "top-k choice")),
    "mlp.linear_fc1": ((MATMULS, "first layer"),),
    "mlp.activation_func": ((_ACTIVATIONS, "activation"),),
    "mlp.linear_fc2": ((MATMULS, "second layer"),),
    "mlp.shared_experts.linear_fc1": ((MATMULS, "shared expert first layer"),),
    "mlp.shared_experts.activation_func": ((_ACTIVATIONS, "shared expert activation"),),
    "mlp.shared_experts.linear_fc2": ((MATMULS, "shared expert second layer"),),
    "mlp.experts.linear_fc1": ((_GROUPED, "expert first layer"),),
    "mlp.experts.activation_func": ((_ACTIVATIONS, "expert activation"),),
    "mlp.experts.linear_fc2": ((_GROUPED, "expert second layer"),),
    "mlp": ((frozenset({"aten::scatter_add_"}), "expert aggregation"),),
}
_OUTSIDE: dict[str, tuple[tuple[frozenset[str], str], ...]] = {
    "embedding.word_embeddings": ((frozenset({"aten::embedding", "aten::index_select"}), "embedding"),),
    "decoder.final_layernorm": ((_NORMS, "final norm"),),
    "output_layer": ((MATMULS, "head"),),
}
_COMMUNICATIONS_IN_LAYER = {
    "self_attention.linear_qkv": "attention input",
    "self_attention.linear_proj": "attention output",
    "self_attention.core_attention": "keys and values",
    "mlp.linear_fc1": "feed-forward input",
    "mlp.linear_fc2": "feed-forward output",
    "mlp.shared_experts.linear_fc1": "shared expert input",
    "mlp.shared_experts.linear_fc2": "shared expert output",
}
_COMMUNICATIONS_OUTSIDE = {"embedding.word_embeddings": "embedding", "output_layer": "head", "": "loss"}

ATTENTION_CORE = ("attention scores", "attention softmax", "attention context")
"""What a fused attention operator does all at once."""

FUSED_ATTENTION = "fused attention"

UNTOLD_KIND = "communication"
"""Of what a drawing shows to communicate without a word of how."""

KIND_OF_OP = {
    "c10d::allreduce_": "all-reduce",
    "c10d::allreduce_coalesced_": "all-reduce",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "c10d::reduce_scatter_": "reduce-scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "c10d::_allgather_base_": "all-gather",
    "c10d::allgather_": "all-gather",
    "c10d::allgather_into_tensor_coalesced_": "all-gather",
    "c10d::allgather_coalesced_": "all-gather",
    "c10d::alltoall_base_": "all-to-all",
    "c10d::alltoall_": "all-to-all",
    "c10d::broadcast_": "broadcast",
    "c10d::reduce_": "reduce",
    "c10d::gather_": "gather",
    "c10d::scatter_": "scatter",
    "c10d::barrier": "barrier",
}


def split_module(module: str) -> tuple[int, str]:
    """Return the layer that a module is in (-1: none) and its name there, without the number of an expert."""
    match = LAYER.match(module)
    if match is None:
        tail = re.sub(r"^model(\.chunks\.\d+)?\.?", "", module)
        return -1, tail
    tail = module[match.end() :]
    return int(match.group(1)), _EXPERT.sub("mlp.experts.", tail).rstrip(".")


def role_of(tail: str, layer: int, op: str) -> str | None:
    """Return the role of an operator in a module of a layer, or of none (-1)."""
    if tail == "self_attention.core_attention" and _FUSED.match(op):
        return FUSED_ATTENTION
    for ops, role in (_IN_LAYER if layer >= 0 else _OUTSIDE).get(tail, ()):
        if op in ops:
            return role
    return None


def purpose_of(tail: str, layer: int) -> str | None:
    """Return what a communication of a module is for, where the module alone says it."""
    return (_COMMUNICATIONS_IN_LAYER if layer >= 0 else _COMMUNICATIONS_OUTSIDE).get(tail)
