"""Move clocks by as little as it takes for no effect to come before its cause.

Theory of operation. Each clock was fitted by itself; two of them may still make a message arrive before it was sent,
within their errors. What has to hold between two clocks is a half-space in the heights of all curves at all knots. The
true heights lie in all of them, so going to the nearest point of one that is violated, and on to the next, comes
closer to the truth each time, and ends where all hold. Source: Agmon 1954, Motzkin and Schoenberg 1954, the relaxation
method for linear inequalities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.clock_fit import Curve
from truedag.tracer.merge.facts import Facts

_MOST_ROUNDS = 500
_MOST_AT_ONCE = 256
_FARTHER = 1.2  # than the nearest point: comes to an end sooner


def measure_violations(facts: Facts, curves: Mapping[int, Curve]) -> NDArray[np.int64]:
    """Return by how many ns each effect comes before its cause; not above 0 where it does not."""
    violation = -facts.slack_ns
    for clock, curve in curves.items():
        cause, effect = facts.before == clock, facts.after == clock
        violation[cause] += curve.correct(facts.before_ns[cause])
        violation[effect] -= curve.correct(facts.after_ns[effect])
    return violation


def repair(facts: Facts, curves: Mapping[int, Curve], reference: int) -> dict[int, Curve]:
    """Return curves that violate no fact, and whose errors have grown by as much as they were moved.

    Where facts contradict each other, whatever the curves, these are returned as they are. The reference is not moved.
    """
    moving = dict(curves)
    for turn in range(_MOST_ROUNDS + 1):
        violation = measure_violations(facts, moving)
        if violation.max(initial=0) <= 0:
            break
        if turn == _MOST_ROUNDS:
            return dict(curves)
        worst = np.argsort(-violation, kind="stable")[:_MOST_AT_ONCE]
        worst = worst[violation[worst] > 0]
        _project(facts.take(worst), moving, reference)
    return {
        clock: replace(
            curve, errors_ns=curve.errors_ns + np.abs(curve.offsets_ns - curves[clock].offsets_ns).astype(np.float64)
        )
        for clock, curve in moving.items()
    }


def _project(facts: Facts, curves: dict[int, Curve], reference: int) -> None:
    """Go to the nearest point of one half-space after the other."""
    for i in range(len(facts.before)):
        row = facts.take(np.array([i]))
        violation = int(measure_violations(row, curves)[0])
        if violation <= 0:
            continue
        parts = []
        for clock, time_ns, sign in (
            (int(row.before[0]), row.before_ns, -1.0),
            (int(row.after[0]), row.after_ns, 1.0),
        ):
            if clock != reference:
                left, right, share = (column[0] for column in curves[clock].weigh(time_ns))
                weights = np.zeros(len(curves[clock].knots_ns))
                weights[left] += 1.0 - share
                weights[right] += share
                parts.append((clock, sign * weights))
        length = sum(float(weights @ weights) for _, weights in parts)
        for clock, weights in parts:
            step = weights * (_FARTHER * violation + 1.0) / length
            curve = curves[clock]
            moved = curve.offsets_ns + np.where(step > 0, np.ceil(step), np.floor(step)).astype(np.int64)
            curves[clock] = replace(curve, offsets_ns=moved)
