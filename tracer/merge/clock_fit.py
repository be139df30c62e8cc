"""One clock against others, from what is known to have happened before what (DESIGN rule 5).

Theory of operation. What to add to a clock to get the time is looked for as a curve: straight between knots, which lie
where the clocks were compared. Each fact "this happened here before that happened there" bounds the curve at one moment
from above, or from below. Two clocks drift apart evenly, all but: so around a knot the curve is a line of unknown
height and slope, and a fact that is so far away from the knot bounds it less by as much as an uneven drift can have
moved it. Every bound cuts the plane of heights and slopes in two; what all of them leave is a convex polygon. Its
heights are those that the clock can have at the knot: the middle is the estimate, half of the range is the error.
Nothing in this is a guess about delays, so the error holds however long and uneven the ways were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

# Two clocks' rates differ by less: Linux steers a clock by 500 ppm at most, and quartz is off by 100 ppm or so.
# Source: adjtimex(2).
MOST_DRIFT = 1.5e-3
# In the time that a fit looks at, their difference changes by less: steered clocks in a steady state are far below it.
WANDER = 1e-6
_MOST_GAP_NS = 20_000_000_000
_SAME_BURST_NS = 100_000_000
_LEAST_STRETCHES = 64
_NEAREST = (32, 16, 8, 4, 2)
_LEAST_LOOSENING_NS = 500.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What to add to a clock: `offsets_ns` at the clock's times `knots_ns`, straight between them and beyond.

    At a knot the error is `errors_ns`; anywhere `error_ns` holds, up to the ends of the recording.
    """

    knots_ns: NDArray[np.int64]
    offsets_ns: NDArray[np.int64]
    errors_ns: NDArray[np.float64]

    @classmethod
    def zero(cls) -> Curve:
        """The reference's."""
        return cls(knots_ns=np.zeros(1, np.int64), offsets_ns=np.zeros(1, np.int64), errors_ns=np.zeros(1))

    @property
    def error_ns(self) -> float:
        """How wrong a corrected time may be."""
        gaps = np.diff(self.knots_ns)
        return float(self.errors_ns.max()) + WANDER * float(gaps.max(initial=0)) / 2

    def correct(self, times_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bring times of the clock onto the reference's; the order of times is kept."""
        base = int(self.offsets_ns[0])
        if len(self.knots_ns) == 1:
            return times_ns + base
        left, right, share = self.weigh(times_ns)
        heights = (self.offsets_ns - base).astype(np.float64)
        moved: NDArray[np.int64] = np.rint(heights[left] + share * (heights[right] - heights[left])).astype(np.int64)
        return times_ns + base + moved

    def weigh(self, times_ns: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Return the two knots that each time goes by, and how much of the second."""
        if len(self.knots_ns) == 1:
            nothing = np.zeros(len(times_ns), np.int64)
            return nothing, nothing, np.zeros(len(times_ns))
        left = np.clip(np.searchsorted(self.knots_ns, times_ns, "right") - 1, 0, len(self.knots_ns) - 2)
        begin = self.knots_ns[left]
        return left, left + 1, (times_ns - begin) / (self.knots_ns[left + 1] - begin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Bounds of one side: at the clock's `times_ns` the curve is at most, or at least, `offsets_ns`."""

    times_ns: NDArray[np.int64]
    offsets_ns: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> Bounds:
        """Return some of them."""
        return Bounds(times_ns=self.times_ns[rows], offsets_ns=self.offsets_ns[rows])


def fit_curve(upper: Bounds, lower: Bounds, bursts_ns: NDArray[np.int64], span_ns: tuple[int, int]) -> Curve | None:
    """Return the curve that two sides of bounds leave; None where there is nothing on one side.

    Args:
        upper: what it is at most.
        lower: what it is at least.
        bursts_ns: when the clocks were compared.
        span_ns: the times that the curve is wanted for, first and last.
    """
    if not len(upper.times_ns) or not len(lower.times_ns):
        return None
    bursts = _split_bursts(bursts_ns)
    knots = _choose_knots(bursts, span_ns)
    curve = None
    for _ in range(2):  # which bounds are the tightest can be told once the drift is known
        num_stretches = max(_LEAST_STRETCHES, 4 * len(knots))
        curve = _fit_knots(
            _thin(upper, curve, 1, num_stretches),
            _thin(lower, curve, -1, num_stretches),
            knots,
        )
    assert curve is not None
    return _doubt(curve, bursts, upper, lower)


def _doubt(curve: Curve, bursts: list[NDArray[np.int64]], upper: Bounds, lower: Bounds) -> Curve:
    """State no smaller error than what comparisons commonly leave by themselves, each without the others.

    A line that just fits between all bounds would be thought exact, and may be a clock that drifted unevenly.
    """
    lefts = []
    above, below = (each.offsets_ns - (curve.correct(each.times_ns) - each.times_ns) for each in (upper, lower))
    for burst in bursts:
        high, low = (
            rest[(each.times_ns >= burst[0]) & (each.times_ns <= burst[-1])]
            for rest, each in ((above, upper), (below, lower))
        )
        if len(high) and len(low):
            lefts.append(max(int(high.min()), -int(low.max())))
    if not lefts:
        return curve
    return replace(curve, errors_ns=np.maximum(curve.errors_ns, float(np.median(lefts))))


def _split_bursts(times_ns: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    times = np.sort(times_ns)
    return np.split(times, np.flatnonzero(np.diff(times) > _SAME_BURST_NS) + 1) if len(times) else []


def _choose_knots(bursts: list[NDArray[np.int64]], span_ns: tuple[int, int]) -> NDArray[np.int64]:
    """The ends of the span, the middle of each burst of comparisons, and more where there was none for long."""
    wanted = sorted([*span_ns, *(int(burst[len(burst) // 2]) for burst in bursts)])
    knots = [wanted[0]]
    for time in wanted:
        if time - knots[-1] > _SAME_BURST_NS or (time == wanted[-1] and time > knots[-1]):
            num_gaps = -(-(time - knots[-1]) // _MOST_GAP_NS)
            knots += np.linspace(knots[-1], time, num_gaps + 1)[1:].astype(np.int64).tolist()
    return np.array(knots, np.int64)


def _thin(bounds: Bounds, curve: Curve | None, sign: int, num_stretches: int) -> Bounds:
    """Keep the tightest in each stretch of time."""
    if len(bounds.times_ns) <= num_stretches:
        return bounds
    begin, end = int(bounds.times_ns.min()), int(bounds.times_ns.max())
    stretch = (bounds.times_ns - begin) // ((end - begin) // num_stretches + 1)
    rest = bounds.offsets_ns
    if curve is not None:
        rest = rest - (curve.correct(bounds.times_ns) - bounds.times_ns)
    order = np.lexsort((sign * rest, stretch))
    first = np.flatnonzero(np.diff(stretch[order], prepend=-1))
    return bounds.take(order[first])


def _fit_knots(upper: Bounds, lower: Bounds, knots_ns: NDArray[np.int64]) -> Curve:
    base = int(np.median(upper.offsets_ns))  # so that what is left is small enough for floats
    heights, errors = [], []
    for knot in knots_ns.tolist():
        low, high = _range_at(knot, upper, lower, base)
        heights.append(base + round((low + high) / 2))
        errors.append((high - low) / 2 + 1.0)
    return Curve(knots_ns=knots_ns, offsets_ns=np.array(heights, np.int64), errors_ns=np.array(errors))


def _range_at(knot: int, upper: Bounds, lower: Bounds, base: int) -> tuple[float, float]:
    """Between which heights the curve passes a knot.

    Where the bounds contradict each other, the clock did not drift evenly: then only nearer ones count. Where the
    nearest do, it was set, or a time was told wrongly, and these are loosened until they do not.
    """
    above = _half_planes(knot, upper, base, 1)
    below = _half_planes(knot, lower, base, -1)
    for num_nearest in _NEAREST:
        found = _cut_all(above[:num_nearest], below[:num_nearest], 0.0)
        if found is not None:
            return found
    loosening = _LEAST_LOOSENING_NS
    while (found := _cut_all(above[: _NEAREST[-1]], below[: _NEAREST[-1]], loosening)) is None:
        loosening *= 2
    return found


def _cut_all(
    above: list[tuple[float, float]], below: list[tuple[float, float]], loosening: float
) -> tuple[float, float] | None:
    """The range of heights that bounds on both sides leave; None: nothing."""
    high = min(limit + MOST_DRIFT * abs(distance) for distance, limit in above) + loosening
    low = max(limit - MOST_DRIFT * abs(distance) for distance, limit in below) - loosening
    if low > high:
        return None
    polygon = [(low, -MOST_DRIFT), (high, -MOST_DRIFT), (high, MOST_DRIFT), (low, MOST_DRIFT)]
    for distance, limit in above:
        polygon = _cut(polygon, 1.0, distance, limit + loosening)
    for distance, limit in below:
        polygon = _cut(polygon, -1.0, -distance, -limit + loosening)
    heights = [height for height, _ in polygon]
    return (min(heights), max(heights)) if heights else None


def _half_planes(knot: int, bounds: Bounds, base: int, sign: int) -> list[tuple[float, float]]:
    """The nearest bounds as (distance from the knot, limit there)."""
    distances = (bounds.times_ns - knot).astype(np.float64)
    limits = (bounds.offsets_ns - base) + sign * WANDER * np.abs(distances)
    nearest = np.argsort(np.abs(distances), kind="stable")[: _NEAREST[0]]
    return list(zip(distances[nearest].tolist(), limits[nearest].tolist(), strict=True))


def _cut(polygon: list[tuple[float, float]], x: float, y: float, limit: float) -> list[tuple[float, float]]:
    """Keep what of a convex polygon has x * height + y * slope <= limit. Source: Sutherland and Hodgman, 1974."""
    over = [x * height + y * slope - limit for height, slope in polygon]
    if max(over, default=0.0) <= 0.0:
        return polygon
    kept = []
    for i, (corner, excess) in enumerate(zip(polygon, over, strict=True)):
        last, last_excess = polygon[i - 1], over[i - 1]
        if (excess > 0.0) != (last_excess > 0.0):
            share = last_excess / (last_excess - excess)
            kept.append((last[0] + share * (corner[0] - last[0]), last[1] + share * (corner[1] - last[1])))
        if excess <= 0.0:
            kept.append(corner)
    return kept
