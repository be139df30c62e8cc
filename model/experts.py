"""The experts of one rank in megatron-core's ModuleSpec: one after the other, or all in one grouped product.

Shape suffixes: T tokens that this rank's experts got (sorted by expert), H hidden size, E experts of this rank,
F inner width of an expert on this rank (twice that where gated).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor, nn
from torch.nn import functional


class Activation(nn.Module):
    """GELU, or SwiGLU on an input that holds gate and values side by side."""

    def __init__(self, *, config: Any) -> None:
        super().__init__()
        self.gated = config.gated_linear_unit

    def forward(self, inner: Tensor) -> Tensor:
        """Return the activation; its last dimension is half the input's where gated."""
        if not self.gated:
            return functional.gelu(inner)
        gate, values = inner.chunk(2, dim=-1)
        return functional.silu(gate) * values


class SequentialExperts(nn.Module):
    """One expert after the other, each a module with its own FC1, activation and FC2."""

    def __init__(self, num_local_experts: int, config: Any, submodules: MLPSubmodules, pg_collection: Any) -> None:
        super().__init__()
        expert_config = copy.copy(config)
        expert_config.ffn_hidden_size = config.moe_ffn_hidden_size
        # The dispatcher does all communication of the experts; sequence parallelism is none of their business.
        expert_config.sequence_parallel = False
        self.local_experts = nn.ModuleList(
            MLP(
                expert_config,
                submodules,
                is_expert=True,
                ffn_hidden_size=config.moe_ffn_hidden_size,
                tp_group=pg_collection.expt_tp,
            )
            for _ in range(num_local_experts)
        )

    def forward(self, tokens_TH: Tensor, tokens_per_expert: Tensor, weights_T: Tensor) -> tuple[Tensor, None]:
        """Return each token's expert output, [T, H], times the token's routing weight. No bias."""
        counts: list[int] = tokens_per_expert.tolist()
        parts = zip(self.local_experts, torch.split(tokens_TH, counts), torch.split(weights_T, counts), strict=True)
        outputs = [expert(tokens, weights)[0] for expert, tokens, weights in parts]
        return torch.cat(outputs), None


class SharedExperts(MLP):  # type: ignore[misc]
    """The experts that every token goes through, as one feed-forward layer: split like a dense one, over TP."""

    def __init__(self, config: Any, submodules: MLPSubmodules, gate: bool, pg_collection: Any) -> None:
        shared_config = copy.copy(config)
        width = config.moe_shared_expert_intermediate_size
        shared_config.ffn_hidden_size = width
        super().__init__(shared_config, submodules, ffn_hidden_size=width, tp_group=pg_collection.tp)
        self.gate_weight: nn.Parameter | None = None
        if gate:
            self.gate_weight = nn.Parameter(torch.empty(1, config.hidden_size, dtype=config.params_dtype))
            # It sees this rank's part of the sequence only.
            self.gate_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, tokens_SBH: Tensor) -> Tensor:
        """Return the output of the shared experts, [S, B, H]; S and B are the sequence's and the batch's."""
        output_SBH: Tensor = super().forward(tokens_SBH)[0]
        if self.gate_weight is None:
            return output_SBH
        return output_SBH * functional.linear(tokens_SBH, self.gate_weight).sigmoid()


class GroupedLinear(nn.Module):
    """The same projection of every expert: its weights stacked, [E, out, in], applied by one grouped_mm."""

    def __init__(self, num_local_experts: int, shape: tuple[int, int], *, config: Any, tp_size: int, dim: int) -> None:
        super().__init__()
        local_shape = [size // tp_size if axis == dim else size for axis, size in enumerate(shape)]
        self.weight = nn.Parameter(torch.empty(num_local_experts, *local_shape, dtype=config.params_dtype))
        stride = 2 if dim == 0 and config.gated_linear_unit else 1
        set_tensor_model_parallel_attributes(self.weight, True, dim + 1, stride)
        # megatron-core reduces a gradient over the expert data-parallel group only where this says so.
        self.weight.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor, ends_E: Tensor) -> Tensor:
        """Return the projected tokens; expert e has the rows from ends_E[e-1] to ends_E[e]."""
        return functional.grouped_mm(tokens, self.weight.transpose(1, 2), offs=ends_E)


class GroupedExperts(nn.Module):
    """All experts of the rank at once: two grouped products and one activation."""

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any) -> None:
        super().__init__()
        inner = config.moe_ffn_hidden_size
        tp_size = pg_collection.expt_tp.size()
        fc1_shape = (2 * inner if config.gated_linear_unit else inner, config.hidden_size)
        self.linear_fc1 = GroupedLinear(num_local_experts, fc1_shape, config=config, tp_size=tp_size, dim=0)
        self.activation_func = Activation(config=config)
        self.linear_fc2 = GroupedLinear(
            num_local_experts, (config.hidden_size, inner), config=config, tp_size=tp_size, dim=1
        )

    def forward(self, tokens_TH: Tensor, tokens_per_expert: Tensor, weights_T: Tensor) -> tuple[Tensor, None]:
        """Return each token's expert output, [T, H], times the token's routing weight. No bias."""
        ends_E = tokens_per_expert.to(tokens_TH.device).cumsum(0).to(torch.int32)
        inner_TF = self.activation_func(self.linear_fc1(tokens_TH, ends_E))
        weighted_TF = (inner_TF * weights_T.unsqueeze(-1)).to(tokens_TH.dtype)
        return self.linear_fc2(weighted_TF, ends_E), None
