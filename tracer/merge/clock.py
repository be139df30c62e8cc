"""What brings a rank's times onto the graph's clock."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.clock_fit import Curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """What to add to a rank's times, and how wrong that may be (None: unknown).

    Clocks drift: `offset_ns` is what to add where the rank's recording began. `knots` are what to add when, as pairs
    (the rank's time, offset), straight between them and beyond; none: always `offset_ns`.
    """

    offset_ns: int
    error_ns: int | None
    knots: tuple[tuple[int, int], ...] = ()

    @property
    def drift_ppm(self) -> float:
        """How much the offset grows in a second, in µs, from the first knot to the last."""
        if len(self.knots) < 2:
            return 0.0
        (begin, first), (end, last) = self.knots[0], self.knots[-1]
        return (last - first) / (end - begin) * 1e6

    def correct(self, times_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bring times of the rank, in ns, onto the graph's clock; keeps their order."""
        if not self.knots:
            return times_ns + self.offset_ns
        knots, offsets = np.array(self.knots, np.int64).T
        return Curve(knots_ns=knots, offsets_ns=offsets, errors_ns=np.zeros(len(knots))).correct(times_ns)

    def at(self, time_ns: int) -> int:
        """Bring one time onto the graph's clock, as `correct` does."""
        knots = self.knots
        if len(knots) < 2:
            return time_ns + self.offset_ns
        left = min(max(bisect_right(knots, time_ns, key=_time_of) - 1, 0), len(knots) - 2)
        (begin, low), (end, high) = knots[left], knots[left + 1]
        base = knots[0][1]
        share = (time_ns - begin) / (end - begin)
        return time_ns + base + round(float(low - base) + share * (float(high - base) - float(low - base)))


def _time_of(knot: tuple[int, int]) -> int:
    return knot[0]
