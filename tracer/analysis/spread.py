"""How a figure varies over the recorded steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of several values of one figure: how many, the least, quantiles (linear between values), the most, the mean."""

    num: int
    least: float
    median: float
    p90: float
    most: float
    mean: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Return the spread; None of no values."""
        if not values:
            return None
        median, p90 = np.quantile(np.asarray(values, float), [0.5, 0.9])
        return cls(
            num=len(values), least=min(values), median=float(median), p90=float(p90), most=max(values),
            mean=float(np.mean(values)),
        )  # fmt: skip
