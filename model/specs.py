"""The transformer layer as megatron-core's ModuleSpec: its modules where they are plain PyTorch, ours elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
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
from truedag.model.config import ModelConfig, require_implementation
from truedag.model.errors import ModelError
from truedag.model.experts import Activation, GroupedExperts, SequentialExperts, SharedExperts
from truedag.model.self_attention import SelfAttention


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

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and convert all but the types of the score correction and of the counts of tokens that it comes from.

        In half precision the one loses what training adds to it, and the other counts to 256.
        """
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class _Modules:
    """What the layers of an implementation are made of; megatron-core's constructors."""

    norm: type
    qk_norm: type
    column_parallel: type
    row_parallel: type
    core_attention: type
    grouped_experts: ModuleSpec

    @property
    def feed_forward(self) -> MLPSubmodules:
        """The parts of a feed-forward layer, dense or an expert."""
        return MLPSubmodules(linear_fc1=self.column_parallel, activation_func=Activation, linear_fc2=self.row_parallel)


def _own_modules(config: ModelConfig) -> _Modules:
    return _Modules(
        norm=RMSNorm,
        qk_norm=RMSNorm,
        column_parallel=ColumnParallelLinear,
        row_parallel=RowParallelLinear,
        core_attention=UnfusedAttention if config.attention == "unfused" else FusedAttention,
        grouped_experts=ModuleSpec(module=GroupedExperts),
    )


def _transformer_engine_modules(config: ModelConfig) -> _Modules:
    """Return Transformer Engine's modules; norms stay modules of their own, so parameters have the same names.

    Source: megatron-core's gpt_layer_specs.py and moe_module_specs.py, without the fusion of norm and projection.
    """
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    provider = TESpecProvider()
    experts, projections = provider.grouped_mlp_modules(config.experts == "grouped", False)
    if projections is None:
        raise ModelError(
            "experts='grouped': this release of Transformer Engine has no grouped projections; "
            "nearest valid: experts='sequential'"
        )
    grouped = MLPSubmodules(
        linear_fc1=projections.linear_fc1, activation_func=Activation, linear_fc2=projections.linear_fc2
    )
    return _Modules(
        norm=provider.layer_norm(),
        qk_norm=provider.layer_norm(for_qk=True),
        column_parallel=provider.column_parallel_linear(),
        row_parallel=provider.row_parallel_linear(),
        core_attention=provider.core_attention(),
        grouped_experts=ModuleSpec(module=experts, submodules=grouped),
    )


def block_spec(config: ModelConfig, layers: Iterable[int]) -> TransformerBlockSubmodules:
    """Return the spec of a block of layers and, where it is the last, the final norm.

    Args:
        config: the model.
        layers: the block's layers, by their numbers in the whole model.

    Raises:
        ModelError: the implementation asked for is not installed, or cannot do what the model needs.
    """
    require_implementation(config)
    modules = _own_modules(config) if config.implementation == "truedag" else _transformer_engine_modules(config)
    dense = _layer_spec(config, modules, _dense_spec(config, modules))
    sparse = None if config.num_experts is None else _layer_spec(config, modules, _experts_spec(config, modules))
    return TransformerBlockSubmodules(
        layer_specs=[sparse if config.has_experts(layer) else dense for layer in layers], layer_norm=modules.norm
    )


def _dense_spec(config: ModelConfig, modules: _Modules) -> ModuleSpec:
    return ModuleSpec(module=MLP, params={"ffn_hidden_size": config.dense_hidden_size}, submodules=modules.feed_forward)


def _experts_spec(config: ModelConfig, modules: _Modules) -> ModuleSpec:
    experts = (
        ModuleSpec(module=SequentialExperts, submodules=modules.feed_forward)
        if config.experts == "sequential"
        else modules.grouped_experts
    )
    shared = ModuleSpec(module=SharedExperts, submodules=modules.feed_forward)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared, router=Router))


def _layer_spec(config: ModelConfig, modules: _Modules, mlp: ModuleSpec) -> ModuleSpec:
    qk_norm = modules.qk_norm if config.qk_norm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=modules.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=modules.column_parallel,
                    core_attention=modules.core_attention,
                    linear_proj=modules.row_parallel,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=modules.norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
