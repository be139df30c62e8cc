"""Lists of tensors in words (`bfloat16[2,64] int64[64]`), with a slot for each dimension."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from truedag.tracer.dry.world import Ints

_DIMENSION = re.compile(r"(?<=[\[,])\d+(?=[,\]])")
_TENSOR = re.compile(r"([a-z0-9_]+)\[([^\]]*)\]")
_BITS = re.compile(r"\d+")
_SLOT = "?"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorText:
    """A text whose dimensions are left open."""

    pieces: tuple[str, ...]
    """Around the dimensions."""

    @classmethod
    def read(cls, text: str) -> tuple[TensorText, list[int]]:
        """Return a text with its dimensions left open, and these."""
        return cls(pieces=tuple(_DIMENSION.split(text))), [int(one) for one in _DIMENSION.findall(text)]

    def __str__(self) -> str:
        """Return it for people."""
        return "n".join(self.pieces)

    def write(self, dimensions: Sequence[int]) -> str:
        """Return the text with these dimensions."""
        rest = (f"{size}{piece}" for size, piece in zip(dimensions, self.pieces[1:], strict=True))
        return self.pieces[0] + "".join(rest)

    def weigh(self, dimensions: Ints) -> Ints:
        """Return the bytes of all tensors, [ranks], with these dimensions, [slots, ranks]."""
        weights = [item_bytes(dtype) * dimensions[slots].prod(axis=0) for dtype, slots in self.tensors()]
        found: Ints = np.sum(weights, axis=0, dtype=np.int64) + np.zeros(dimensions.shape[1], np.int64)
        return found

    def tensors(self) -> list[tuple[str, slice]]:
        """Return each tensor's dtype, and which of the slots are its dimensions."""
        found = []
        first = 0
        for dtype, sizes in _TENSOR.findall(_SLOT.join(self.pieces)):
            last = first + sizes.count(_SLOT)
            found.append((dtype, slice(first, last)))
            first = last
        return found


def item_bytes(dtype: str) -> int:
    """Return the bytes of an element."""
    bits = _BITS.search(dtype)
    return 1 if bits is None else max(int(bits[0]) // 8, 1)
