"""Few distinct numbers among many, numbered from 0 in their order."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def number_values(values: Ints) -> tuple[Ints, Ints]:
    """Return the distinct values in order, and the place of each value among them."""
    known = np.sort(pl.Series(values).unique().to_numpy())
    return known, np.searchsorted(known, values)


def sort_places(places: Ints, num_places: int) -> tuple[Ints, Ints]:
    """Return the order that brings equal places together, each in its old order, and where each place begins in it."""
    narrow = places.astype(np.uint16) if num_places <= 1 << 16 else places  # NumPy counts what is narrow
    order = np.argsort(narrow, kind="stable")
    return order, np.concatenate(([0], np.cumsum(np.bincount(places, minlength=num_places))))
