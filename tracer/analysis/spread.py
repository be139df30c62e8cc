"""How a figure varies over the recorded steps.

The time of a step, over all steps; each share of a rank's time, over all ranks and steps: one value for each rank in
each step. Quantiles lie between two values where they fall between two: the median of 1 and 2 is 1.5, and 90 % of the
way from the least to the most in order is the 90 % column.
"""

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
