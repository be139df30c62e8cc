"""Floating-point operations of an operator from its shapes; a multiplication and an addition count as two.

Convention and scope follow torch.utils.flop_counter: matrix products count, element-wise operators do not and are
unknown (None), not 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from truedag.tracer.record.trace import Layout

_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::dot"})


def count_flops(op: str, inputs: Sequence[Layout], outputs: Sequence[Layout]) -> int | None:
    """Return 2 x (elements of the result) x (length of the contracted dimension) for matrix products, else None."""
    if op not in _PRODUCTS or len(inputs) < 2 or not outputs:
        return None
    left = inputs[-2]  # the bias of addmm and baddbmm comes first
    return 2 * prod(outputs[0].sizes) * left.sizes[-1]
