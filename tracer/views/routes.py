"""The ways lines take over the page: straight between neighbours, else through the gutters between columns and rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from truedag.tracer.views.boxes import ACROSS, STEP, Box
from truedag.tracer.views.layout import PITCH, Page, Rectangle
from truedag.tracer.views.ties import Tie

Point = tuple[float, float]
_NUM_LANES = 4
_LANE = 2.6
_CLEAR = 5.0
_FAR = 400.0  # stages below each other
_RADIUS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A line's corners, from its source's border to its target's, in points, y downwards."""

    tie: Tie
    points: tuple[Point, ...]
    is_aside: bool


def find_routes(ties: Sequence[Tie], boxes: Sequence[Box], page: Page) -> list[Route]:
    """Find each line's way."""
    by_fold = {box.fold: box for box in boxes}
    tops: dict[tuple[int, str, object], list[float]] = {}
    for box in boxes:
        if box.column is not None:
            tops.setdefault((box.stage, box.panel, box.column), []).append(page.boxes[box.fold].y)
    rows = {key: sorted(set(found)) for key, found in tops.items()}
    lanes: dict[object, list[list[tuple[float, float]]]] = {}
    steps = _find_step_rows(boxes, page)
    routes = []
    for tie in ties:
        src, dst = by_fold[tie.src], by_fold[tie.dst]
        a, b = page.boxes[tie.src], page.boxes[tie.dst]
        is_aside = False
        if tie.kind == "p2p":
            is_far = abs(src.stage - dst.stage) != 1 or abs(a.y - b.y) > _FAR
            points = _below(a, b, page.panels[src.stage, src.panel]) if is_far else _sideways(a, b)
        elif src.column is None or dst.column is None:
            is_across = ACROSS in (src.panel, dst.panel)
            points = (
                _across(a, b, page.panels[-1, ACROSS]) if is_across else _in_step(a, b, steps[tie.src], steps[tie.dst])
            )
        elif src.column == dst.column:
            here = rows[src.stage, src.panel, src.column]
            if here.index(b.y) - here.index(a.y) == 1:
                points = ((a.x, a.bottom), (b.x, b.top)) if a.x == b.x else _step_down(a, b)
            else:
                is_aside = True
                lane = _take_lane(lanes.setdefault((src.stage, src.panel, src.column), []), a.y, b.y)
                x = max(a.x, b.x) if len({a.width, b.width}) > 1 else a.x
                x = max(a.right, b.right, _full_right(a, b)) + _CLEAR + lane * _LANE
                points = ((a.right, a.y + 3), (x, a.y + 3), (x, b.y - 3), (b.right, b.y - 3))
        else:
            is_last = a.y == rows[src.stage, src.panel, src.column][-1]
            is_first = b.y == rows[dst.stage, dst.panel, dst.column][0]
            is_aside = not (is_last and is_first)
            points = _to_next_column(a, b, is_last=is_last, is_first=is_first)
        routes.append(Route(tie=tie, points=points, is_aside=is_aside))
    return routes


def round_corners(points: Sequence[Point]) -> list[Point]:
    """Return the control points of a cubic B-spline along the line with its corners rounded: 3n + 1 of them."""
    control = [points[0]]
    for i in range(1, len(points)):
        begin, end = control[-1], points[i]
        if i + 1 == len(points):
            control += _straight(begin, end)
            continue
        before = _towards(end, points[i - 1], _RADIUS)
        after = _towards(end, points[i + 1], _RADIUS)
        control += [*_straight(begin, before), end, end, after]
    return control


def _straight(a: Point, b: Point) -> list[Point]:
    return [(a[0] + (b[0] - a[0]) * k / 3, a[1] + (b[1] - a[1]) * k / 3) for k in (1, 2, 3)]


def _towards(a: Point, b: Point, distance: float) -> Point:
    length = ((b[0] - a[0]) ** 2 + (b[1] - a[1]) ** 2) ** 0.5
    share = 0.0 if length == 0 else min(0.5, distance / length)
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share)


def _full_right(a: Rectangle, b: Rectangle) -> float:
    """The right side of the column that a half-wide box stands in."""
    wide = a if a.width >= b.width else b
    return wide.right


def _take_lane(taken: list[list[tuple[float, float]]], top: float, bottom: float) -> int:
    """Take the first lane that is free from top to bottom, the last one if none is."""
    for i, spans in enumerate(taken):
        if all(bottom <= low or top >= high for low, high in spans):
            spans.append((top, bottom))
            return i
    if len(taken) < _NUM_LANES:
        taken.append([(top, bottom)])
        return len(taken) - 1
    taken[-1].append((top, bottom))
    return _NUM_LANES - 1


def _step_down(a: Rectangle, b: Rectangle) -> tuple[Point, ...]:
    middle = (a.bottom + b.top) / 2
    return ((a.x, a.bottom), (a.x, middle), (b.x, middle), (b.x, b.top))


def _to_next_column(a: Rectangle, b: Rectangle, *, is_last: bool, is_first: bool) -> tuple[Point, ...]:
    sign = 1 if b.x > a.x else -1
    gutter = (a.x + b.x) / 2 + sign * 4.0
    side = a.right if sign > 0 else a.left
    lead: tuple[Point, ...] = ((side, a.y + 6), (gutter, a.y + 6))
    if is_last:
        low = a.bottom + 6.0
        lead = ((a.x, a.bottom), (a.x, low), (gutter, low))
    if is_first:
        high = b.top - 7.0
        return (*lead, (gutter, high), (b.x, high), (b.x, b.top))
    return (*lead, (gutter, b.y - 8), (b.left if sign > 0 else b.right, b.y - 8))


def _sideways(a: Rectangle, b: Rectangle) -> tuple[Point, ...]:
    start, end = ((a.right, a.y), (b.left, b.y)) if b.x > a.x else ((a.left, a.y), (b.right, b.y))
    middle = (start[0] + end[0]) / 2
    return (start, end) if a.y == b.y else (start, (middle, a.y), (middle, b.y), end)


def _below(a: Rectangle, b: Rectangle, panel: Rectangle) -> tuple[Point, ...]:
    """Take the foot of the panel to a column that is far away, and the gutter beside it up."""
    foot = panel.bottom - 6.0
    side, aside = (b.right, b.right + 9.0) if a.x > b.x else (b.left, b.left - 9.0)
    return ((a.x, a.bottom), (a.x, foot), (aside, foot), (aside, b.y), (side, b.y))


def _across(a: Rectangle, b: Rectangle, panel: Rectangle) -> tuple[Point, ...]:
    """Take the gutter beside the box of the stage, and a bus above the panel: down on the left, up on the right."""
    if a.y == b.y:
        return ((a.right, a.y), (b.left, b.y)) if a.x < b.x else ((a.left, a.y), (b.right, b.y))
    aside = (PITCH - a.width) / 2
    if b.y > a.y:
        bus = panel.top - 8.0
        return (
            (a.right, a.y + 8),
            (a.right + aside, a.y + 8),
            (a.right + aside, bus),
            (b.x - 6, bus),
            (b.x - 6, b.top),
        )
    bus, aside = panel.top - 14.0, (PITCH - b.width) / 2 - 4.0
    return ((a.x + 6, a.top), (a.x + 6, bus), (b.left - aside, bus), (b.left - aside, b.y - 8), (b.left, b.y - 8))


def _in_step(a: Rectangle, b: Rectangle, row: Rectangle, other: Rectangle) -> tuple[Point, ...]:
    """Go straight to the next box of a row, else below the row, or through gutters into the gap above the other row."""
    if a.y == b.y and 0 < b.x - a.x < PITCH * 1.5:
        return ((a.right, a.y), (b.left, b.y))
    if a.y == b.y:
        low = row.bottom + 22.0
        return ((a.x + 10, a.bottom), (a.x + 10, low), (b.x - 10, low), (b.x - 10, b.bottom))
    gutter = a.x + PITCH / 2 - 4
    high = other.top - 24.0
    return ((a.right, a.y + 5), (gutter, a.y + 5), (gutter, high), (b.x - 10, high), (b.x - 10, b.top))


def _find_step_rows(boxes: Sequence[Box], page: Page) -> dict[int, Rectangle]:
    """Return for each box of a step's panel its row: as high as the highest box there."""
    rows: dict[tuple[int, float], list[int]] = {}
    for box in boxes:
        if box.panel == STEP:
            rows.setdefault((box.stage, page.boxes[box.fold].y), []).append(box.fold)
    found = {}
    for (_, y), folds in rows.items():
        height = max(page.boxes[fold].height for fold in folds)
        found.update(dict.fromkeys(folds, Rectangle(0.0, y, 0.0, height)))
    return found
