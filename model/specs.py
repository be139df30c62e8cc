"""The transformer layer as megatron-core's ModuleSpec: its modules where they are plain PyTorch, ours elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.nn import functional

from truedag.model.attention import FusedAttention, UnfusedAttention
from truedag.model.config import ModelConfig
from truedag.model.experts import Activation, GroupedExperts, SequentialExperts


class RMSNorm(nn.RMSNorm):
    """RMSNorm with megatron-core's constructor; its weight's gradient is summed over the sequence-parallel ranks."""

    def __init__(self, *, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class Router(TopKRouter):  # type: ignore[misc]
    """megatron-core's top-k router with a plain linear gate: its own calls Transformer Engine."""

    def gating(self, tokens: Tensor) -> Tensor:
        """Return the logits, [sequence, batch, experts], in float32."""
        return functional.linear(tokens.to(torch.float32), self.weight.to(torch.float32))


def block_spec(config: ModelConfig, *, num_layers: int) -> TransformerBlockSubmodules:
    """Return the spec of a block of `num_layers` equal layers and, where it is the last, the final norm."""
    feed_forward = MLPSubmodules(
        linear_fc1=ColumnParallelLinear, activation_func=Activation, linear_fc2=RowParallelLinear
    )
    if config.num_experts is None:
        mlp = ModuleSpec(module=MLP, params={"ffn_hidden_size": config.dense_hidden_size}, submodules=feed_forward)
    else:
        experts = (
            ModuleSpec(module=SequentialExperts, submodules=feed_forward)
            if config.experts == "sequential"
            else ModuleSpec(module=GroupedExperts)
        )
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, router=Router))
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=UnfusedAttention if config.attention == "unfused" else FusedAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
