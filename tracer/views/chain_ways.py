"""The ways of messages between the stages of the chain: past all boxes, each in a lane of its own.

To the stage below or above a message goes along the margin of its section, through the gap between the two, and along
the other's margin. To a stage in another column of sections it goes through the gap between columns; where that is not
the same for both, below all sections.
"""

from __future__ import annotations

from collections.abc import Sequence

from truedag.tracer.views.chain import Chain
from truedag.tracer.views.chain_page import COLUMN_GAP, ChainPage
from truedag.tracer.views.layout import Rectangle
from truedag.tracer.views.routes import Point

_LANE = 4.0
_NUM_LANES = 5
_ABOVE = 5.0


def find_ways(chain: Chain, page: ChainPage) -> dict[tuple[int, int], tuple[Point, ...]]:
    """Return the corners of each message's line between two stages, by the numbers of its ends."""
    used: dict[object, int] = {}
    turns = {stage: turn for turn, stage in enumerate(sorted(page.sections))}

    def take(key: object) -> float:
        lane = used.get(key, 0)
        used[key] = lane + 1
        return _LANE * (lane % _NUM_LANES)

    ways = {}
    for (src, dst), (_, _, is_message) in chain.ties.items():
        stages = (chain.parts[src].stage, chain.parts[dst].stage)
        if not is_message or stages[0] == stages[1]:
            continue
        sides = (_side(page, src, is_source=True), _side(page, dst, is_source=False))
        columns = [page.columns[stage] for stage in stages]
        if columns[0] == columns[1] and abs(turns[stages[0]] - turns[stages[1]]) == 1:
            shift = take(frozenset(stages))
            middle = _through_gap([page.sections[stage] for stage in stages], sides, shift)
        else:
            # Between column k and the next one is gap k + 1; 0 is left of all.
            gaps = [column + (side > 0) for column, side in zip(columns, sides, strict=True)]
            middle = _through_columns(page, gaps, [take(gap) for gap in dict.fromkeys(gaps)])
        xs = (middle[0][0], middle[-1][0])
        lead, end = _end(page, src, sides[0], xs[0]), _end(page, dst, sides[1], xs[1])
        ways[src, dst] = (*lead, *(middle if len(middle) > 1 else ()), *reversed(end))
    return ways


def _side(page: ChainPage, number: int, *, is_source: bool) -> int:
    """Choose the side on which a message leaves or reaches a box: the nearer end of its row; -1 is left."""
    place, row = page.places[number], page.rows[number]
    to_left, to_right = place.left - row.left, row.right - place.right
    if to_left == to_right:
        return 1 if is_source else -1
    return -1 if to_left < to_right else 1


def _end(page: ChainPage, number: int, side: int, x: float) -> tuple[Point, ...]:
    """Lead from a box to a margin or gap: straight from its side at the end of its row, else above the row."""
    place, row = page.places[number], page.rows[number]
    border = place.right if side > 0 else place.left
    if abs((row.right if side > 0 else row.left) - border) < place.width:
        return ((border, place.y), (x, place.y))
    high = row.top - _ABOVE
    return ((place.x, place.top), (place.x, high), (x, high))


def _through_gap(sections: Sequence[Rectangle], sides: Sequence[int], shift: float) -> list[Point]:
    one, other = sections
    low, high = (one, other) if one.y < other.y else (other, one)
    gap = (low.bottom + high.top) / 2 - _LANE * (_NUM_LANES - 1) / 2 + shift
    xs = [
        section.left + 16.0 - shift if side < 0 else section.right - 16.0 + shift
        for section, side in zip(sections, sides, strict=True)
    ]
    return [(xs[0], gap), (xs[1], gap)]


def _through_columns(page: ChainPage, gaps: Sequence[int], shifts: Sequence[float]) -> list[Point]:
    xs = [
        page.lefts[gap] + (8.0 if gap == 0 else 12.0 - COLUMN_GAP / 2) + (-shift / 2 if gap == 0 else shift - 8.0)
        for gap, shift in zip(dict.fromkeys(gaps), shifts, strict=True)
    ]
    if len(xs) == 1:
        return [(xs[0], 0.0)]
    low = page.bottom + 7.0
    return [(xs[0], low), (xs[1], low)]
