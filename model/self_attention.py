"""Self-attention of a layer: megatron-core's projections, with a cache of keys and values where there is one.

Shape suffixes: S query positions, K key positions, B batch, H hidden size, N heads of this rank, G key and value heads
of this rank, D head width, F = N*D.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer import attention
from torch import Tensor

from truedag.model.errors import ModelError
from truedag.model.kv_cache import KVCache


class SelfAttention(attention.SelfAttention):  # type: ignore[misc]
    """megatron-core's self-attention with a forward pass of ours, the same for training, prefill and decoding.

    megatron-core's own keeps keys that are not rotated and rotates all of them again in every decode step, and knows
    one length for all rows of a batch.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: KVCache | None = None,
        rotary_pos_emb: Tensor | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; in the arguments' names, which are megatron-core's, hidden_states is [S, B, H].

        Args:
            hidden_states: what goes in; this rank's part of the sequence under sequence parallelism.
            attention_mask: for the core attention, where there is no cache.
            key_value_states: none; this is self-attention.
            inference_context: the cache, told what this pass is; None: the keys are those of the pass alone.
            rotary_pos_emb: angles of every position of the sequence, or of the cache, [K, 1, 1, D].
            rotary_pos_cos: none.
            rotary_pos_sin: none.
            rotary_pos_cos_sin: none.
            attention_bias: for the core attention.
            packed_seq_params: for the core attention.
            sequence_len_offset: none.
            inference_params: none; megatron-core's old name of inference_context.

        Returns:
            The projected context, [S, B, H] (split as hidden_states), and its bias.

        Raises:
            ModelError: an argument is given that is none.
        """
        unused = (key_value_states, rotary_pos_cos, rotary_pos_sin, rotary_pos_cos_sin, sequence_len_offset)
        if any(given is not None for given in (*unused, inference_params)):
            raise ModelError("the self-attention takes neither other states, nor other rotary embeddings, nor offsets")
        cache = inference_context
        query_SBND, key_SBGD, value_SBGD = self.get_query_key_value_tensors(hidden_states)
        if rotary_pos_emb is not None:
            angles = rotary_pos_emb if cache is None else cache.rotation(rotary_pos_emb, key_SBGD.shape[0])
            query_SBND, key_SBGD = self._rotate(query_SBND, angles), self._rotate(key_SBGD, angles)
        key_KBGD, value_KBGD = key_SBGD, value_SBGD
        if cache is not None:
            key_KBGD, value_KBGD, attention_mask = cache.extend(self.layer_number - 1, key_SBGD, value_SBGD)
        attend: Any = self._checkpointed_attention_forward if self._forgets() else self.core_attention
        context_SBF: Tensor = attend(
            query_SBND,
            key_KBGD,
            value_KBGD,
            attention_mask,
            attn_mask_type=self.attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )
        output_SBH, bias_H = self.linear_proj(context_SBF)
        return output_SBH, bias_H

    def _rotate(self, heads_SBND: Tensor, angles: Tensor) -> Tensor:
        rotated: Tensor = apply_rotary_pos_emb(heads_SBND, angles, config=self.config, cp_group=self.pg_collection.cp)
        return rotated

    def _forgets(self) -> bool:
        """Return whether the core attention is computed again in the backward pass."""
        return bool(self.checkpoint_core_attention and self.training)
