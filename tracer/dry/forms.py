"""Sizes as linear forms of told numbers, found on a few ranks and evaluated for others.

Theory of operation. Ranks of one program differ in sizes because they were told different numbers of tokens. A size of
theirs is a multiple of one of these numbers, plus a constant: a dimension is a number of tokens, and bytes, FLOPs and
what flows along an edge are so many for each token. Which number it is shows in how a size goes up and down from rank
to rank: a size and the numbers that it may be a form of have the same direction in the space of the executed ranks.

Nothing is guessed. A size that is a form of no number has none. Where several numbers fit, all forms are evaluated, and
a rank of which they say different things is not known: it has to be executed, and tells them apart then. So has a rank
of which a number is otherwise that was the same on all executed ones: nobody saw what it does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.dry.world import Ints

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """What forms say of ranks that were not executed."""

    values: Ints
    """[sizes, ranks]; of a size that has no form, what the first executed rank has."""

    has_form: Bools
    """[sizes]"""

    is_known: Bools
    """[ranks] Whether all that fits says the same of it."""


def evaluate_forms(sizes: Ints, numbers: Ints, asked: Ints) -> Evaluated:
    """Find the forms of sizes, and evaluate them.

    Args:
        sizes: [sizes, executed] of the executed ranks, at least one.
        numbers: [executed, numbers] what these were told.
        asked: [ranks, numbers] what the others were told.
    """
    numbers, asked = numbers.astype(np.int64), asked.astype(np.int64)
    both = np.concatenate([numbers, asked])
    varying = np.flatnonzero((both != both[:1]).any(axis=0))
    both = np.unique(both[:, varying], axis=1)
    numbers, asked = both[: len(numbers)], both[len(numbers) :]
    seen = (numbers != numbers[:1]).any(axis=0)
    is_known: Bools = (asked[:, ~seen] == numbers[:1, ~seen]).all(axis=1)
    numbers, asked = numbers[:, seen], asked[:, seen]
    steps, directions = _directions(numbers.T)
    candidates: dict[bytes, list[int]] = {}
    for place, direction in enumerate(directions):
        candidates.setdefault(direction, []).append(place)
    values = np.repeat(sizes[:, :1], len(asked), axis=1)
    has_form = np.ones(len(sizes), bool)
    size_steps, size_directions = _directions(sizes)
    for place, (size_step, direction) in enumerate(zip(size_steps.tolist(), size_directions, strict=True)):
        if size_step == 0:
            continue
        said = None
        for number in candidates.get(direction, ()):
            factor, rest = divmod(size_step, int(steps[number]))
            constant = int(sizes[place, 0]) - factor * int(numbers[0, number])
            if rest or constant < 0:
                continue
            found = factor * asked[:, number] + constant
            if said is None:
                said = values[place] = found
            else:
                is_known &= said == found
        has_form[place] = said is not None
    return Evaluated(values=values, has_form=has_form, is_known=is_known)


def _directions(rows: Ints) -> tuple[Ints, list[bytes]]:
    """Return how far each row goes from its first value, in whole steps of its direction, and that; 0: it stays."""
    moved = rows - rows[:, :1]
    steps: Ints = np.gcd.reduce(moved, axis=1) if rows.shape[1] else np.zeros(len(rows), np.int64)
    directions = moved // np.maximum(steps, 1)[:, None]
    return steps, [direction.tobytes() for direction in np.ascontiguousarray(directions)]
