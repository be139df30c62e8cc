"""Lists of tensors in words (`bfloat16[2,64] int64[64]`), with a slot for each dimension."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from truedag.tracer.dry.world import Ints

_DIMENSION = re.compile(r"(?<=[\[,])\d+(?=[,\]])")
_TENSOR = re.compile(r"([a-z]+)(\d*)[a-z0-9_]*\[([^\]]*)\]")
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

    def write(self, dimensions: Sequence[int]) -> str:
        """Return the text with these dimensions."""
        rest = (f"{size}{piece}" for size, piece in zip(dimensions, self.pieces[1:], strict=True))
        return self.pieces[0] + "".join(rest)

    def weigh(self, dimensions: Ints) -> Ints:
        """Return the bytes of all tensors, [ranks], with these dimensions, [slots, ranks]."""
        total = np.zeros(dimensions.shape[1], np.int64)
        slot = 0
        for name, bits, sizes in _TENSOR.findall(_SLOT.join(self.pieces)):
            weight = np.full(dimensions.shape[1], 1 if name == "bool" else int(bits or 0) // 8)
            for _ in filter(None, sizes.split(",")):
                weight = weight * dimensions[slot]
                slot += 1
            total += weight
        return total
