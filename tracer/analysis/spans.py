"""Stretches of time as arrays: unions, lengths, parts."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

Spans = NDArray[np.int64]  # [n, 2]: begin and end


def union(spans: Spans) -> Spans:
    """Join spans that touch or overlap; the result is sorted and disjoint."""
    spans = spans[spans[:, 1] > spans[:, 0]]
    if len(spans) == 0:
        return spans
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    reach = np.maximum.accumulate(spans[:, 1])
    first = np.concatenate(([True], spans[1:, 0] > reach[:-1]))
    begins = np.flatnonzero(first)
    last = np.concatenate((begins[1:] - 1, [len(spans) - 1]))
    return np.stack((spans[begins, 0], reach[last]), axis=1)


def length(spans: Spans) -> int:
    """Add up disjoint spans."""
    return int((spans[:, 1] - spans[:, 0]).sum())


def clip(spans: Spans, low: int, high: int) -> Spans:
    """Cut spans to a window; those outside become empty."""
    return np.clip(spans, low, high)


def spans_of(frame: pl.DataFrame, begin: str, end: str) -> Spans:
    """Take two columns; rows where one is unknown are left out."""
    return frame.select(pl.col(begin).cast(pl.Int64), pl.col(end).cast(pl.Int64)).drop_nulls().to_numpy().reshape(-1, 2)
