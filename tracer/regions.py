"""Which bytes of a storage a tensor occupies, exactly, for any strides.

A region is a sorted list of disjoint byte runs [begin, end). A dense tensor is one run; a strided one is as many as its
strides leave gaps. Repeated elements (stride 0) and overlapping ones count once.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from truedag.tracer.trace import Layout

Runs: TypeAlias = tuple[tuple[int, int], ...]


def runs(layout: Layout, offset_bytes: int) -> Runs:
    """Return the byte runs of a tensor that begins at `offset_bytes` of its storage; () for an empty one."""
    sizes, strides = layout.sizes, layout.strides
    if any(size == 0 for size in sizes):
        return ()
    item = layout.itemsize
    length = item
    outer: list[tuple[int, int]] = []
    for size, stride in sorted(zip(sizes, strides, strict=True), key=lambda pair: abs(pair[1])):
        if size == 1 or stride == 0:
            continue
        step = stride * item
        if not outer and abs(step) <= length:
            length += (size - 1) * abs(step)
            if step < 0:
                offset_bytes += (size - 1) * step
        else:
            outer.append((size, step))
    begins = np.array([offset_bytes], np.int64)
    for size, step in outer:
        begins = (begins[:, None] + np.arange(size, dtype=np.int64) * step).ravel()
    if len(begins) == 1:
        return ((offset_bytes, offset_bytes + length),)
    begins = np.unique(begins)
    ends = begins + length
    joined = np.flatnonzero(begins[1:] > ends[:-1])
    first = np.concatenate(([0], joined + 1))
    last = np.concatenate((joined, [len(begins) - 1]))
    return tuple(zip(begins[first].tolist(), ends[last].tolist(), strict=True))


def num_bytes(region: Runs) -> int:
    """Count a region's bytes."""
    return sum(end - begin for begin, end in region)
