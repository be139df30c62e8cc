"""Panels of given sizes on a sheet: in columns or in rows, in their order, so that the sheet is as small as may be.

A sheet is as wide as high, times the square root of two one way or the other, as paper is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

_NUM_TRIES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Upper left corners of the panels, and how large all is."""

    corners: tuple[tuple[float, float], ...]
    width: float
    height: float

    @property
    def side(self) -> float:
        """The shorter side of the sheet of paper that holds it."""
        return paper_side(self.width, self.height)


def paper_side(width: float, height: float) -> float:
    """Return the shorter side of the smallest sheet of paper that holds a page."""
    return min(max(width / sqrt(2), height), max(width, height / sqrt(2)))


def pack(sizes: Sequence[tuple[float, float]], gaps: tuple[float, float]) -> Packing:
    """Place panels (width, height) with gaps (beside, below) in between; there is at least one."""
    packings = []
    for is_down in (False, True):
        across = [_turn((width + gaps[0], height + gaps[1]), is_down=is_down) for width, height in sizes]
        most, all_of_them = max(one[0] for one in across), sum(one[0] for one in across)
        for i in range(_NUM_TRIES + 1):
            limit = most * (all_of_them / most) ** (i / _NUM_TRIES)
            corners, size = _fill(across, limit)
            width, height = _turn(size, is_down=is_down)
            placed = tuple(_turn(corner, is_down=is_down) for corner in corners)
            packings.append(Packing(corners=placed, width=width - gaps[0], height=height - gaps[1]))
    return min(packings, key=lambda one: one.side)


def _turn(pair: tuple[float, float], *, is_down: bool) -> tuple[float, float]:
    return (pair[1], pair[0]) if is_down else pair


def _fill(sizes: Sequence[tuple[float, float]], limit: float) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Fill lines that are no longer than the limit, one after the other."""
    corners: list[tuple[float, float]] = []
    along = depth = tall = longest = 0.0
    for length, height in sizes:
        if along > 0 and along + length > limit + 0.5:
            along, depth, tall = 0.0, depth + tall, 0.0
        corners.append((along, depth))
        along += length
        tall, longest = max(tall, height), max(longest, along)
    return corners, (longest, depth + tall)
