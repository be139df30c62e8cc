"""Core attention in megatron-core's ModuleSpec, in two forms: unfused (three operators) and fused (one).

Shape suffixes: S query length, K key length, B batch, N heads of this rank, G key and value heads of this rank,
D head width.
"""

from __future__ import annotations

import abc
import math
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.nn import functional

from truedag.model.context_parallel import attend_in_parallel
from truedag.model.errors import ModelError


class _CausalAttention(nn.Module, abc.ABC):
    """What both forms share: megatron-core's signature, the scale, and that the mask is causal.

    Raises:
        ModelError: at construction for a mask that is not causal; in forward for packed sequences or a bias.
    """

    def __init__(
        self,
        *,
        config: Any,
        attn_mask_type: AttnMaskType,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_unused: Any,
    ) -> None:
        super().__init__()
        if attn_mask_type is not AttnMaskType.causal:
            raise ModelError(f"attn_mask_type={attn_mask_type}: the core attention is causal self attention")
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self._cp_group = None if pg_collection is None or pg_collection.cp.size() == 1 else pg_collection.cp

    def forward(
        self,
        query_SBND: Tensor,
        key_KBGD: Tensor,
        value_KBGD: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """Attend, each query to the keys at its own and earlier positions; the last query is at the last key.

        Args:
            query_SBND: the queries.
            key_KBGD: the keys.
            value_KBGD: their values.
            attention_mask: [B, 1, S, K], True where a query does not see a key; where it is given it says all.
            attn_mask_type: causal, as the module was made.
            attention_bias: none.
            packed_seq_params: none.

        Returns:
            The context, [S, B, N*D], in the dtype of the query.
        """
        del attn_mask_type
        if attention_bias is not None or packed_seq_params is not None:
            raise ModelError("the core attention takes neither an attention_bias nor packed_seq_params")
        query_BNSD, key_BGKD, value_BGKD = (part.permute(1, 2, 0, 3) for part in (query_SBND, key_KBGD, value_KBGD))
        if self._cp_group is None:
            context_BNSD = self.attend(query_BNSD, key_BGKD, value_BGKD, attention_mask)
        else:
            assert attention_mask is None, "the causal mask is all that context parallelism knows"
            attend = partial(self.attend, hidden_B1SK=None)
            context_BNSD = attend_in_parallel(attend, query_BNSD, key_BGKD, value_BGKD, self._cp_group)
        return context_BNSD.permute(2, 0, 1, 3).flatten(2)

    @abc.abstractmethod
    def attend(self, query_BNSD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, hidden_B1SK: Tensor | None) -> Tensor:
        """Return the context, [B, N, S, D]."""


class Scores(nn.Module):
    """Scaled products of queries and keys, -inf where the key is hidden or, unsaid, later than the query."""

    def forward(self, query_BNSD: Tensor, key_BNKD: Tensor, scale: float, hidden_B1SK: Tensor | None = None) -> Tensor:
        """Return the scores, [B, N, S, K]."""
        num_queries, num_keys = query_BNSD.shape[2], key_BNKD.shape[2]
        scores_BNSK = torch.matmul(query_BNSD * scale, key_BNKD.transpose(2, 3))
        if hidden_B1SK is not None:
            return scores_BNSK.masked_fill(hidden_B1SK, float("-inf"))
        if num_queries == 1:  # the only query is at the last key
            return scores_BNSK
        later_SK = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores_BNSK.device)
        return scores_BNSK.masked_fill(later_SK.triu(num_keys - num_queries + 1), float("-inf"))


class Weights(nn.Module):
    """Softmax over the keys, in float32."""

    def forward(self, scores_BNSK: Tensor) -> Tensor:
        """Return the attention weights, [B, N, S, K], in the dtype of the scores."""
        return functional.softmax(scores_BNSK, dim=-1, dtype=torch.float32).to(scores_BNSK.dtype)


class Context(nn.Module):
    """Values, weighted."""

    def forward(self, weights_BNSK: Tensor, value_BNKD: Tensor) -> Tensor:
        """Return the context, [B, N, S, D]."""
        return torch.matmul(weights_BNSK, value_BNKD)


class UnfusedAttention(_CausalAttention):
    """Scores, softmax and context, each a module whose operators really run."""

    def __init__(self, **megatron: Any) -> None:
        super().__init__(**megatron)
        self.scores = Scores()
        self.weights = Weights()
        self.context = Context()

    def attend(self, query_BNSD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, hidden_B1SK: Tensor | None) -> Tensor:
        """Return the context, [B, N, S, D]."""
        heads_per_group = query_BNSD.shape[1] // key_BGKD.shape[1]
        if heads_per_group > 1:
            key_BGKD = key_BGKD.repeat_interleave(heads_per_group, dim=1)
            value_BGKD = value_BGKD.repeat_interleave(heads_per_group, dim=1)
        weights_BNSK = self.weights(self.scores(query_BNSD, key_BGKD, self.scale, hidden_B1SK))
        context_BNSD: Tensor = self.context(weights_BNSK, value_BGKD)
        return context_BNSD


class FusedAttention(_CausalAttention):
    """scaled_dot_product_attention: one operator."""

    def attend(self, query_BNSD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, hidden_B1SK: Tensor | None) -> Tensor:
        """Return the context, [B, N, S, D]."""
        num_queries, num_keys = query_BNSD.shape[2], key_BGKD.shape[2]
        visible = None
        if hidden_B1SK is not None:
            visible = hidden_B1SK.logical_not()
        elif num_queries not in (1, num_keys):
            visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query_BNSD.device)
            visible = visible.tril(num_keys - num_queries)
        return functional.scaled_dot_product_attention(
            query_BNSD,
            key_BGKD,
            value_BGKD,
            attn_mask=visible,
            is_causal=visible is None and num_queries == num_keys,
            scale=self.scale,
            enable_gqa=query_BNSD.shape[1] != key_BGKD.shape[1],
        )
