"""Which tensors go into each node and come out of it: few lists of layouts, described and counted once each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.flops import count_flops
from truedag.tracer.merge.sorting import first_places, number_lists, pair_numbers
from truedag.tracer.record.trace import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """An operator on tensors of certain layouts. 0 is a tensor without one: sparse, say."""

    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """The shapes that nodes have, and each node's."""

    number: NDArray[np.int64]  # [nodes]
    known: list[Shape]

    def num_bytes(self, layouts: Mapping[int, Layout]) -> tuple[list[int], list[int]]:
        """Return the bytes that go into each shape, and those that come out of it."""
        sizes = {0: 0} | {number: layout.num_bytes for number, layout in layouts.items()}
        return (
            [sum(sizes[one] for one in shape.inputs) for shape in self.known],
            [sum(sizes[one] for one in shape.outputs) for shape in self.known],
        )


def find_shapes(
    op: NDArray[np.int64],
    names: Mapping[int, str],
    inputs: tuple[NDArray[np.int64], NDArray[np.int64]],
    outputs: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> Shapes:
    """Find the shapes of a rank's nodes.

    Args:
        op: [nodes] the operators' numbers.
        names: of the operators.
        inputs: the nodes (ascending) of the tensors that go in, and their layouts.
        outputs: of those that come out.
    """
    begins = [np.searchsorted(node, np.arange(len(op) + 1)) for node, _ in (inputs, outputs)]
    lists = [number_lists(layout, begin) for (_, layout), begin in zip((inputs, outputs), begins, strict=True)]
    number = pair_numbers(pair_numbers(op, lists[0]), lists[1])
    known = []
    for place in first_places(number).tolist():
        into, out_of = (
            tuple(layout[begin[place] : begin[place + 1]].tolist())
            for (_, layout), begin in zip((inputs, outputs), begins, strict=True)
        )
        known.append(Shape(op=names[int(op[place])], inputs=into, outputs=out_of))
    return Shapes(number=number, known=known)


def shape_flops(layouts: Mapping[int, Layout], shape: Shape) -> int | None:
    """Return the floating-point operations of an operator of such a shape, None where they are unknown."""
    if 0 in shape.inputs or 0 in shape.outputs:
        return None  # of a tensor that has no strides
    return count_flops(shape.op, [layouts[i] for i in shape.inputs], [layouts[i] for i in shape.outputs])


def describe_tensors(layouts: Mapping[int, Layout], numbers: Sequence[int]) -> str:
    """Write tensors' types as `float32[2,64,512] int64[64]`."""
    known = (layouts[number] for number in numbers if number)
    return " ".join(f"{layout.dtype}[{','.join(map(str, layout.sizes))}]" for layout in known)
