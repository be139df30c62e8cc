"""Which attention heads ranks compute, as the shapes of what they ran say.

Scores of attention are normalised over [batch, heads, queries, keys], by a softmax or inside a fused operator that is
given queries of [batch, heads, queries, width]: the second dimension is the heads of the rank. Tensor parallelism cuts
the heads in the order of its places, as Megatron does. With context parallelism, which may exchange heads for
positions, nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl

from truedag.tracer.graph.tensor_types import read_tensors
from truedag.tracer.views.scope import Scope

_SOFTMAX = ("aten::_softmax", "aten::_safe_softmax")
_FUSED = "aten::_scaled_dot_product_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """How many heads each rank has of how many, by its place on tp."""

    num: int
    num_total: int

    def of(self, places: Iterable[int]) -> list[int]:
        """Return the heads of some places on tp."""
        return sorted(place * self.num + head for place in set(places) for head in range(self.num))


def find_heads(scope: Scope) -> Heads | None:
    """Find them; None where the ranks or layers have different numbers, or nobody told of tp."""
    if scope.size("tp") < 1 or scope.size("cp") > 1:
        return None
    is_attention = pl.col("op").is_in(_SOFTMAX) | (
        pl.col("op").str.starts_with(_FUSED) & ~pl.col("op").str.contains("backward")
    )
    texts = (
        scope.graph.nodes.filter((pl.col("kind") == "compute") & (pl.col("layer") >= 0) & is_attention)
        .filter(pl.col("category") != "routing")
        .select("inputs")
        .unique()
        .collect()["inputs"]
    )
    first = [next(iter(read_tensors(text)), None) for text in texts if text]
    nums = {shape[1] for tensor in first if tensor is not None and len(shape := tensor[1]) == 4}
    if len(nums) != 1:
        return None
    num = nums.pop()
    return Heads(num=num, num_total=num * scope.size("tp"))
