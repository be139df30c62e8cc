"""The ways lines take over the page: straight between neighbours, else through the gutters between columns and rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from truedag.tracer.views.boxes import ACROSS, STEP, Box
from truedag.tracer.views.fitting import border
from truedag.tracer.views.layout import BOX_WIDTH, PANEL_PAD, PITCH, Page, Rectangle
from truedag.tracer.views.ties import Tie

Point = tuple[float, float]
_NUM_LANES = 4
_NUM_DEEP = 8
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
    ways = _ColumnWays(boxes, page)
    steps = _find_step_rows(boxes, page)
    routes = []
    feet: dict[tuple[int, str], int] = {}
    turns = {stage: turn for turn, stage in enumerate(sorted(page.stages))}
    for tie in ties:
        src, dst = by_fold[tie.src], by_fold[tie.dst]
        a, b = page.boxes[tie.src], page.boxes[tie.dst]
        is_aside = False
        if tie.kind == "p2p":
            is_near = abs(turns.get(src.stage, -1) - turns.get(dst.stage, -1)) == 1 and abs(a.y - b.y) <= _FAR
            if is_near and ways.face_each_other(src, dst):
                points = _sideways(a, b)
            else:
                place = (src.stage, src.panel)
                feet[place] = feet.get(place, 0) + 1
                foot = page.panels[place].bottom - 3.0 * feet[place]
                points = _below(a, b, foot, is_last=ways.is_last(src))
        elif src.column is None or dst.column is None:
            is_across = ACROSS in (src.panel, dst.panel)
            points = (
                _across(a, b, page.panels[-1, ACROSS]) if is_across else _in_step(a, b, steps[tie.src], steps[tie.dst])
            )
        else:
            points, is_aside = ways.find(src, dst)
        routes.append(Route(tie=tie, points=points, is_aside=is_aside))
    return routes


class _ColumnWays:
    """Ways between boxes in columns, in lanes: beside a slot, in the gutter to the next one, and below the rows."""

    def __init__(self, boxes: Sequence[Box], page: Page) -> None:
        """Note which rows each slot has."""
        self._page = page
        self._lanes: dict[object, list[list[tuple[float, float]]]] = {}
        rows: dict[tuple[int, str, int], set[float]] = {}
        for box in boxes:
            if box.column is not None:
                rows.setdefault(self._slot(box), set()).add(page.boxes[box.fold].y)
        self._rows = {slot: sorted(found) for slot, found in rows.items()}

    def find(self, src: Box, dst: Box) -> tuple[tuple[Point, ...], bool]:
        """Return a way, and whether it passes other boxes by."""
        a, b = self._page.boxes[src.fold], self._page.boxes[dst.fold]
        here, there = self._slot(src), self._slot(dst)
        rows, goals = self._rows[here], self._rows[there]
        is_last, is_first = a.y == rows[-1], b.y == goals[0]
        if here == there:
            if rows.index(b.y) - rows.index(a.y) == 1:
                return ((a.x, a.bottom), (b.x, b.top)) if a.x == b.x else _step_down(a, b), False
            return self._beside(src, dst), True
        if abs(here[2] - there[2]) == 1:
            return self._to_next(src, dst, is_last=is_last, is_first=is_first), not (is_last and is_first)
        return self._far(src, dst), True

    def is_last(self, box: Box) -> bool:
        """Whether nothing stands below a box in its slot, or it is in none."""
        return box.column is None or self._page.boxes[box.fold].y == self._rows[self._slot(box)][-1]

    def face_each_other(self, src: Box, dst: Box) -> bool:
        """Whether nothing of their stages stands between two boxes of stages beside each other."""
        if src.column is None or dst.column is None:
            return True
        left, right = sorted((src, dst), key=lambda box: self._page.boxes[box.fold].x)
        here, there = self._slot(left), self._slot(right)
        is_outer = here[2] == max(slot for *panel, slot in self._rows if tuple(panel) == here[:2])
        return is_outer and there[2] == min(slot for *panel, slot in self._rows if tuple(panel) == there[:2])

    def _slot(self, box: Box) -> tuple[int, str, int]:
        return (box.stage, box.panel, self._page.slots[box.fold])

    def _beside(self, src: Box, dst: Box) -> tuple[Point, ...]:
        """Pass the boxes between on the side to which the phase goes."""
        a, b = self._page.boxes[src.fold], self._page.boxes[dst.fold]
        sign = -1 if src.falls else 1
        lane = self._take(("beside", *self._slot(src)), a.y, b.y)
        x = self._middle(src) + sign * (BOX_WIDTH / 2 + _CLEAR + lane * _LANE)
        return (
            (_side(src, a, a.y + 3, sign), a.y + 3),
            (x, a.y + 3),
            (x, b.y - 3),
            (_side(dst, b, b.y - 3, sign), b.y - 3),
        )

    def _to_next(self, src: Box, dst: Box, *, is_last: bool, is_first: bool) -> tuple[Point, ...]:
        a, b = self._page.boxes[src.fold], self._page.boxes[dst.fold]
        sign = 1 if b.x > a.x else -1
        begin, end = a.bottom + 6.0 if is_last else a.y + 6, b.top - 7.0 if is_first else b.y - 8
        lane = self._take(("gutter", *self._slot(src), sign), min(begin, end), max(begin, end))
        gutter = self._middle(src) + sign * (PITCH / 2 + _CLEAR - 1 + lane * _LANE)
        lead: tuple[Point, ...] = ((_side(src, a, begin, sign), begin), (gutter, begin))
        if is_last:
            lead = ((a.x, a.bottom), (a.x, begin), (gutter, begin))
        if is_first:
            return (*lead, (gutter, end), (b.x, end), (b.x, b.top))
        return (*lead, (gutter, end), (_side(dst, b, end, -sign), end))

    def _far(self, src: Box, dst: Box) -> tuple[Point, ...]:
        """Go down beside the slot, below all rows, and up beside the other one."""
        a, b = self._page.boxes[src.fold], self._page.boxes[dst.fold]
        sign = 1 if b.x > a.x else -1
        foot = self._page.feet[src.stage, src.panel] + _CLEAR
        deep = self._take(("foot", src.stage, src.panel), min(a.x, b.x), max(a.x, b.x), num=_NUM_DEEP)
        low = foot + deep * _LANE
        down = self._take(("gutter", *self._slot(src), sign), a.y, low)
        before = (*self._slot(dst)[:2], self._slot(dst)[2] - sign)
        up = self._take(("gutter", *before, sign), b.y, low)
        x = self._middle(src) + sign * (PITCH / 2 + _CLEAR - 1 + down * _LANE)
        goal = self._middle(dst) - sign * (PITCH / 2 - _CLEAR + 1 - up * _LANE)
        begin, end = a.y + 6, b.y - 8
        return (
            (_side(src, a, begin, sign), begin), (x, begin), (x, low), (goal, low), (goal, end),
            (_side(dst, b, end, -sign), end),
        )  # fmt: skip

    def _middle(self, box: Box) -> float:
        """Where the middle of a box's slot is: those of experts stand two by two beside it."""
        x = self._page.boxes[box.fold].x
        panel = self._page.panels[box.stage, box.panel]
        first = panel.left + PANEL_PAD
        return first + (int((x - first) // PITCH) + 0.5) * PITCH

    def _take(self, key: object, low: float, high: float, *, num: int = _NUM_LANES) -> int:
        return _take_lane(self._lanes.setdefault(key, []), low, high, num)


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


def _side(box: Box, place: Rectangle, y: float, sign: int) -> float:
    """Where a box's border is at a height, on its right (sign 1) or left (-1)."""
    return place.x + border(box.shape, place.width, place.height, y - place.y, sign)


def _take_lane(taken: list[list[tuple[float, float]]], top: float, bottom: float, num: int) -> int:
    """Take the first lane that is free from top to bottom, the last one if none is."""
    for i, spans in enumerate(taken):
        if all(bottom <= low or top >= high for low, high in spans):
            spans.append((top, bottom))
            return i
    if len(taken) < num:
        taken.append([(top, bottom)])
        return len(taken) - 1
    taken[-1].append((top, bottom))
    return num - 1


def _step_down(a: Rectangle, b: Rectangle) -> tuple[Point, ...]:
    middle = (a.bottom + b.top) / 2
    return ((a.x, a.bottom), (a.x, middle), (b.x, middle), (b.x, b.top))


def _sideways(a: Rectangle, b: Rectangle) -> tuple[Point, ...]:
    start, end = ((a.right, a.y), (b.left, b.y)) if b.x > a.x else ((a.left, a.y), (b.right, b.y))
    middle = (start[0] + end[0]) / 2
    return (start, end) if a.y == b.y else (start, (middle, a.y), (middle, b.y), end)


def _below(a: Rectangle, b: Rectangle, foot: float, *, is_last: bool) -> tuple[Point, ...]:
    """Take the foot of the panel to a column that is far away, and the gutter beside it up."""
    side, aside = (b.right, b.right + 9.0) if a.x > b.x else (b.left, b.left - 9.0)
    lead: tuple[Point, ...] = ((a.x, a.bottom), (a.x, foot))
    if not is_last:
        gutter = a.right + 9.0
        lead = ((a.right, a.y), (gutter, a.y), (gutter, foot))
    return (*lead, (aside, foot), (aside, b.y), (side, b.y))


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
