"""The keys and values that a rank keeps of the prompts it serves: written in prefill, read and extended in decoding.

Theory of operation: the cache is what megatron-core calls an inference context. Before a forward pass its owner says
which rows the pass works on and in which phase (`prefill`, `decode`); in the pass each attention layer of this rank
hands over its new keys and values (`extend`) and is given all that its queries may see. How long each row is, every
rank knows without a word between them: a row grows by its prompt, then by one position a decode step.

Rows of one length are written by one copy into their slots, which leaves every other slot alone, and read as a slice;
rows of different lengths are written by one indexed write, and read up to the longest, with what lies beyond a row's
own length hidden.

Shape suffixes: K positions of the cache, R its rows, S new positions, B rows of the pass, G key and value heads of this
rank, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from truedag.model.parameters import layer_name


class KVCache:
    """Keys (rotated) and values of `num_rows` rows, each up to `max_length` positions, for some layers. Local.

    The memory is taken once, at construction: 2 tensors [K, R, G, D] a layer, filled with zeros.
    """

    # What megatron-core asks of an inference context.
    materialize_only_last_token_logits = True
    """Only the last position of each row goes through the output head."""

    def __init__(
        self,
        layers: Iterable[int],
        *,
        max_length: int,
        num_rows: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Take the memory.

        Args:
            layers: the layers of this rank, by their numbers in the whole model (0-based).
            max_length: positions of a row, at most.
            num_rows: rows.
            num_heads: key and value heads of this rank.
            head_dim: width of a head.
            dtype: of keys and values.
            device: where they lie.
        """
        self.max_sequence_length = max_length
        shape = (max_length, num_rows, num_heads, head_dim)
        self.keys_KRGD = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in layers}
        self.values_KRGD = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in self.keys_KRGD}
        self.lengths = [0] * num_rows
        """Positions that each row holds, as the program knows them; the device keeps its own count."""
        self._lengths_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._numbers_R = torch.arange(num_rows, device=device)
        self._numbers_K = torch.arange(max_length, device=device)
        self._is_decode = False
        self._rows = range(0)
        # Of the pass's new tokens, where its rows are not equally long.
        self._positions_B: Tensor | None = None
        self._hidden_B11K: Tensor | None = None

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """Return all tensors by their names in the whole model: decoder.layers.3.self_attention.key_cache."""
        kinds = (("key_cache", self.keys_KRGD), ("value_cache", self.values_KRGD))
        kept = [
            (f"{layer_name(layer)}.self_attention.{kind}", tensors[layer])
            for layer in self.keys_KRGD
            for kind, tensors in kinds
        ]
        counts = [("cache.lengths", self._lengths_R), ("cache.rows", self._numbers_R)]
        return [*kept, *counts, ("cache.positions", self._numbers_K)]

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        kept = (*self.keys_KRGD.values(), *self.values_KRGD.values())
        return sum(tensor.nbytes for tensor in kept)

    def reset(self) -> None:
        """Forget all rows; what they held is overwritten later, and hidden until then."""
        self.lengths = [0] * len(self.lengths)

    def prefill(self, rows: range, length: int) -> None:
        """Say that the next forward pass is the prefill of empty rows, each with a prompt of `length` tokens."""
        assert all(self.lengths[row] == 0 for row in rows)
        self._is_decode, self._rows = False, rows
        self._positions_B = self._hidden_B11K = None
        for row in rows:
            self.lengths[row] = length
        self._lengths_R[rows.start : rows.stop].fill_(length)

    def decode(self, rows: range) -> None:
        """Say that the next forward pass has one new token of each of the rows, behind what the row holds."""
        self._is_decode, self._rows = True, rows
        places = [self.lengths[row] for row in rows]
        for row in rows:
            self.lengths[row] += 1
        lengths_B = self._lengths_R[rows.start : rows.stop]
        self._positions_B = self._hidden_B11K = None
        if len(set(places)) > 1:
            self._positions_B = lengths_B.clone()
            hidden_BK = self._numbers_K[: max(places) + 1] > self._positions_B[:, None]
            self._hidden_B11K = hidden_BK[:, None, None, :]
        lengths_B.add_(1)

    def rotation(self, table_K11D: Tensor, num_positions: int) -> Tensor:
        """Return the rows of the rotary table for the pass's tokens: [S, 1, 1, D], or [1, B, 1, D] of unequal rows.

        Args:
            table_K11D: the angles of every position up to `max_sequence_length`.
            num_positions: S, the new positions of each row.
        """
        if self._positions_B is not None:
            return table_K11D.index_select(0, self._positions_B).transpose(0, 1)
        end = self.lengths[self._rows.start]
        return table_K11D[end - num_positions : end]

    def extend(self, layer: int, key_SBGD: Tensor, value_SBGD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep a layer's new keys and values; return all that the pass's queries may see.

        Returns:
            keys and values, [K, B, G, D], and what is hidden from a row's query, [B, 1, 1, K]; None: nothing but what
            is later than the query.
        """
        rows = slice(self._rows.start, self._rows.stop)
        end = max(self.lengths[row] for row in self._rows)
        seen = []
        for cache_KRGD, new_SBGD in ((self.keys_KRGD[layer], key_SBGD), (self.values_KRGD[layer], value_SBGD)):
            own_KBGD = cache_KRGD[:, rows]
            if self._positions_B is not None:
                own_KBGD.index_put_((self._positions_B, self._numbers_R[: len(self._rows)]), new_SBGD[0])
            else:
                own_KBGD[end - new_SBGD.shape[0] : end].copy_(new_SBGD)
            # In prefill the new ones are all there are.
            seen.append(own_KBGD[:end] if self._is_decode else new_SBGD)
        return seen[0], seen[1], self._hidden_B11K

    def is_static_batching(self) -> bool:
        """Return True, for megatron-core: all rows of a pass are in one batch."""
        return True

    def is_dynamic_batching(self) -> bool:
        """Return False, for megatron-core."""
        return False

    def is_decode_only(self) -> bool:
        """Return, for megatron-core, whether the pass is a decode step."""
        return self._is_decode
