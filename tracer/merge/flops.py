"""Floating-point operations of an operator from its shapes; a multiplication and an addition count as two.

Convention and scope follow torch.utils.flop_counter: matrix products and fused attention count, element-wise operators
do not and are unknown (None), not 0. Fused attention counts all pairs of positions, causal or not, as unfused attention
computes them; its backward pass computes the scores again. Grouped products, for which torch has no formula, count the
products of their groups. A convolution counts its products with the filter, and each gradient of its input and of its
filter as many, groups or not (torch's formula of the filter's gradient leaves groups out).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod

from truedag.tracer.record.trace import Layout

_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::dot"})
_CONVOLUTIONS = frozenset(
    {
        "aten::convolution", "aten::_convolution", "aten::convolution_overrideable", "aten::cudnn_convolution",
        "aten::_slow_conv2d_forward",
    }
)  # fmt: skip
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
    if op in _CONVOLUTIONS:
        return _count_convolution(inputs[0].sizes, inputs[1].sizes, outputs[0].sizes)
    if op == "aten::convolution_backward" and len(inputs) >= 3:
        gradient, begun, weight = (one.sizes for one in inputs[:3])
        # The gradient of a bias has one dimension.
        return _count_convolution(begun, weight, gradient) * sum(len(one.sizes) == len(begun) for one in outputs)
    if _ATTENTION.fullmatch(op):
        return _count_attention([one.sizes for one in inputs], is_backward="backward" in op)
    return None


def _count_convolution(sizes: Sequence[int], weight: Sequence[int], results: Sequence[int]) -> int:
    """Each position is multiplied with the whole filter: of the result, or where it is transposed, of the input.

    Which it is the channels tell; where these are as many, it is taken for the one that has fewer positions.
    """
    positions = {False: prod(results[2:]), True: prod(sizes[2:])}
    is_plain = weight[0] == results[1] and sizes[1] % weight[1] == 0
    is_transposed = weight[0] == sizes[1] and results[1] % weight[1] == 0
    if is_plain != is_transposed:
        return 2 * sizes[0] * prod(weight) * positions[is_transposed]
    return 2 * sizes[0] * prod(weight) * min(positions.values())


def _count_attention(sizes: Sequence[Sequence[int]], *, is_backward: bool) -> int | None:
    """Scores and context are a product each; the gradients of query, key, value and scores one each, and the scores."""
    query, key, value = sizes[is_backward : 3 + is_backward]
    if len(query) != 4 or len(key) != 4 or len(value) != 4:
        return None
    batch, heads, length, width = query
    pairs = 2 * batch * heads * length * key[2]
    return pairs * (3 * width + 2 * value[3]) if is_backward else pairs * (width + value[3])
