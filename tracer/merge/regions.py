"""Which bytes of a storage a tensor occupies, exactly, for any strides.

A region is a sorted list of disjoint byte runs [begin, end). A dense tensor is one run; a strided one is as many as its
strides leave gaps, which can be millions, so what is asked most (the first and the last byte, how many there are,
whether they are one run) is computed from sizes and strides alone. Repeated elements (stride 0) and overlapping ones
count once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.record.trace import Layout

Runs: TypeAlias = NDArray[np.int64]  # [runs, 2]: begin, end


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Where a tensor lies, in bytes from its own beginning; all 0 for an empty one."""

    low: int
    high: int  # after the last byte
    num_bytes: int

    @property
    def is_dense(self) -> bool:
        """Whether its bytes are one run."""
        return 0 < self.num_bytes == self.high - self.low


def extent(layout: Layout) -> Extent:
    """Return where a tensor lies, without listing its runs as long as its elements do not interleave."""
    if 0 in layout.sizes:
        return Extent(low=0, high=0, num_bytes=0)
    item = layout.itemsize
    low, span, count = 0, item, item
    for size, step in _steps(layout):
        if step < 0:
            low += (size - 1) * step
        if abs(step) <= span == count:  # what lies inside is dense, and so is this
            count = span + (size - 1) * abs(step)
        elif abs(step) >= span:
            count *= size
        else:
            count = -1
            break
        span += (size - 1) * abs(step)
    if count < 0:
        region = runs(layout, 0)
        return Extent(low=int(region[0, 0]), high=int(region[-1, 1]), num_bytes=num_bytes(region))
    return Extent(low=low, high=low + span, num_bytes=count)


def runs(layout: Layout, offset_bytes: int) -> Runs:
    """Return the byte runs of a tensor that begins at `offset_bytes` of its storage; none for an empty one."""
    if 0 in layout.sizes:
        return np.zeros((0, 2), np.int64)
    length = layout.itemsize
    outer: list[tuple[int, int]] = []
    for size, step in _steps(layout):
        if not outer and abs(step) <= length:
            length += (size - 1) * abs(step)
            if step < 0:
                offset_bytes += (size - 1) * step
        else:
            outer.append((size, step))
    begins = np.array([offset_bytes], np.int64)
    for size, step in reversed(outer):  # the longest step first: then they come out in order, as a rule
        begins = (begins[:, None] + np.arange(size, dtype=np.int64) * step).ravel()
    begins = sorted_once(begins)
    gap = np.flatnonzero(begins[1:] > begins[:-1] + length)
    first = np.concatenate(([0], gap + 1))
    last = np.concatenate((gap, [len(begins) - 1]))
    return np.stack((begins[first], begins[last] + length), axis=1)


def sorted_once(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sort values, each kept once; fast for values that are a few sorted pieces."""
    if np.any(values[1:] <= values[:-1]):
        values = np.sort(values, kind="stable")
        values = values[np.diff(values, prepend=values[0] - 1) != 0]
    return values


def _steps(layout: Layout) -> list[tuple[int, int]]:
    """The dimensions that go anywhere, as (size, step in bytes), the shortest step first."""
    dims = zip(layout.sizes, layout.strides, strict=True)
    steps = [(size, stride * layout.itemsize) for size, stride in dims if size > 1 and stride != 0]
    return sorted(steps, key=lambda dim: abs(dim[1]))


def num_bytes(region: Runs) -> int:
    """Count a region's bytes."""
    return int((region[:, 1] - region[:, 0]).sum())
