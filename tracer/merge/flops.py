"""Floating-point operations of an operator from its shapes; a multiplication and an addition count as two.

Convention and scope follow torch.utils.flop_counter: matrix products and fused attention count, element-wise operators
do not and are unknown (None), not 0. Fused attention counts all pairs of positions, causal or not, as unfused attention
computes them; its backward pass computes the scores again. Grouped products, for which torch has no formula, count the
products of their groups.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod

from truedag.tracer.record.trace import Layout

_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::dot"})
_GROUPED = "aten::_grouped_mm"
_ATTENTION = re.compile(r"aten::_scaled_dot_product_\w*attention\w*")


def count_flops(op: str, inputs: Sequence[Layout], outputs: Sequence[Layout]) -> int | None:
    """Return the operations of an operator on tensors of these layouts, None where no formula is known.

    Source: torch/utils/flop_counter.py, mm_flop to sdpa_backward_flop_count.
    """
    if len(inputs) < 2 or not outputs:
        return None
    if op in _PRODUCTS:
        left = inputs[-2]  # the bias of addmm and baddbmm comes first
        return 2 * prod(outputs[0].sizes) * left.sizes[-1]
    if op == _GROUPED:
        rows, columns = inputs[0].sizes, inputs[1].sizes
        # Two matrices share the contracted dimension among the groups; else each group has a whole one.
        is_shared = len(rows) == len(columns) == 2
        return 2 * (prod(rows) * columns[-1] if is_shared else prod(outputs[0].sizes) * rows[-1])
    if _ATTENTION.fullmatch(op):
        return _count_attention([one.sizes for one in inputs], is_backward="backward" in op)
    return None


def _count_attention(sizes: Sequence[Sequence[int]], *, is_backward: bool) -> int | None:
    """Scores and context are a product each; the gradients of query, key, value and scores one each, and the scores."""
    query, key, value = sizes[is_backward : 3 + is_backward]
    if len(query) != 4 or len(key) != 4 or len(value) != 4:
        return None
    batch, heads, length, width = query
    pairs = 2 * batch * heads * length * key[2]
    return pairs * (3 * width + 2 * value[3]) if is_backward else pairs * (width + value[3])
