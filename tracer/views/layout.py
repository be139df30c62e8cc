"""Where everything stands on the page, in points, y downwards: a fixed design, no search for a good one.

A stage's panels stand below each other and stages side by side, in as many bands as make the page's longer side short.
In a panel of columns all columns share their rows, so that alike layers line up and their times can be compared by eye;
a column that is too long for the page is broken into slots (`slots.py`). A panel without columns is filled like a text,
left to right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

from truedag.tracer.views.boxes import ACROSS, STEP, Box, Column
from truedag.tracer.views.fitting import fit_text
from truedag.tracer.views.slots import Slots, cut_slots, list_lengths

BOX_WIDTH = 130.0
PITCH = 160.0  # from one column to the next
_ROW_GAP = 13.0
_STEP_ROW_GAP = 52.0
_PANEL_GAP = 24.0
PANEL_PAD = 14.0
_PANEL_HEAD = 38.0
_STAGE_PAD = 10.0
_STAGE_HEAD = 34.0
_MIN_STEP_COLUMNS = 3
_STEP_ROW = 110.0  # about what a row of a step's panel takes
CHANNEL = 26.0  # room below the rows of broken columns, for lines to a slot that is far away


@dataclass(slots=True)
class Rectangle:
    """A place on the page: its middle and size, in points, y downwards."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> float:
        """The left side."""
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        """The right side."""
        return self.x + self.width / 2

    @property
    def top(self) -> float:
        """The upper side."""
        return self.y - self.height / 2

    @property
    def bottom(self) -> float:
        """The lower side."""
        return self.y + self.height / 2


@dataclass(slots=True)
class Page:
    """Where boxes (by number), panels (by stage and name), stages and column heads stand, and how large all is.

    `lines` is the boxes' text as broken, its first `num_title` lines the title; `slots` has the place of boxes in
    columns, from left to right in their stage; `groups` has the columns that are broken into slots; `feet` is where the
    rows of a panel end.
    """

    boxes: dict[int, Rectangle] = field(default_factory=dict)
    lines: dict[int, list[str]] = field(default_factory=dict)
    num_title: dict[int, int] = field(default_factory=dict)
    panels: dict[tuple[int, str], Rectangle] = field(default_factory=dict)
    stages: dict[int, Rectangle] = field(default_factory=dict)
    heads: dict[tuple[int, str, Column], Rectangle] = field(default_factory=dict)
    groups: dict[tuple[int, str, Column], Rectangle] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)
    feet: dict[tuple[int, str], float] = field(default_factory=dict)
    width: float = 0.0
    height: float = 0.0


def lay_out(boxes: Sequence[Box], levels: Mapping[int, int], *, top: float) -> Page:
    """Place all boxes below `top`.

    Args:
        boxes: in topological order.
        levels: for each box the length of the longest way to it.
        top: height of what stands above, in points.
    """
    sizes = Page()
    held = Counter((box.stage, box.panel, box.column, box.level) for box in boxes if box.experts)
    for box in boxes:
        width = _half_width() if held[box.stage, box.panel, box.column, box.level] > 1 and box.experts else BOX_WIDTH
        fitted = fit_text(box.text, box.shape, width)
        sizes.num_title[box.fold], sizes.lines[box.fold] = fitted.num_title, fitted.lines
        sizes.boxes[box.fold] = Rectangle(0.0, 0.0, width, fitted.height)
    by_stage: dict[int, list[Box]] = {}
    for box in boxes:
        if box.panel != ACROSS:
            by_stage.setdefault(box.stage, []).append(box)
    pages: list[Page] = []
    for length in list_lengths(by_stage.values()):
        stages = {stage: _Stage(boxes=inside, slots=cut_slots(inside, length)) for stage, inside in by_stage.items()}
        ways = _list_bands({stage: one.num_columns for stage, one in stages.items()})
        pages += (_lay_bands(sizes, bands, boxes, stages, levels, top) for bands in ways)
    return min(pages, key=lambda page: (max(page.width, page.height), page.height))


@dataclass(frozen=True, slots=True)
class _Stage:
    """What stands in a stage, and how its columns are broken."""

    boxes: Sequence[Box]
    slots: Slots

    @property
    def num_columns(self) -> int:
        """How many boxes wide it is."""
        free = sum(box.panel == STEP for box in self.boxes)
        square = max(_MIN_STEP_COLUMNS, round(sqrt(free * _STEP_ROW / PITCH)))  # as wide as high
        return max(self.slots.num, min(square, free), 1)


def _lay_bands(
    sizes: Page,
    bands: Sequence[Sequence[int]],
    boxes: Sequence[Box],
    by_stage: Mapping[int, _Stage],
    levels: Mapping[int, int],
    top: float,
) -> Page:
    page = Page(
        boxes={fold: Rectangle(0.0, 0.0, one.width, one.height) for fold, one in sizes.boxes.items()},
        lines=sizes.lines,
        num_title=sizes.num_title,
    )
    y = top
    for band in bands:
        y = _lay_band(page, band, by_stage, levels, y) + _PANEL_GAP
    across = [box for box in boxes if box.panel == ACROSS]
    if across:
        y = _lay_across(page, across, levels, y) + _PANEL_GAP
    page.height = y
    page.width = max((stage.right for stage in page.stages.values()), default=BOX_WIDTH)
    return page


def _half_width() -> float:
    return (BOX_WIDTH - 6.0) / 2


def _list_bands(sizes: Mapping[int, int]) -> list[list[list[int]]]:
    """List the ways to break stages of so many columns into bands of about equal width, the fewest bands first."""
    ways: list[list[list[int]]] = []
    for num_bands in range(1, max(len(sizes), 1) + 1):
        most = max(-(-sum(sizes.values()) // num_bands), max(sizes.values(), default=1))
        bands: list[list[int]] = []
        used = 0
        for stage in sorted(sizes):
            if not bands or used + sizes[stage] > most:
                bands.append([])
                used = 0
            bands[-1].append(stage)
            used += sizes[stage]
        if bands not in ways:
            ways.append(bands)
    return ways


def _lay_band(
    page: Page, band: Sequence[int], by_stage: Mapping[int, _Stage], levels: Mapping[int, int], top: float
) -> float:
    x = _STAGE_PAD
    lefts = {}
    for stage in band:
        lefts[stage] = x
        x += by_stage[stage].num_columns * PITCH + 2 * (_STAGE_PAD + PANEL_PAD) + _PANEL_GAP
    y = top + _STAGE_HEAD
    names = list(dict.fromkeys(box.panel for stage in band for box in by_stage[stage].boxes if box.column is not None))
    for name in names:
        y = _lay_columns(page, name, {stage: by_stage[stage] for stage in band}, lefts, y)
        y += _PANEL_GAP
    bottoms = [y - _PANEL_GAP]
    for stage in band:
        free = [box for box in by_stage[stage].boxes if box.panel == STEP]
        if free:
            bottoms.append(_lay_step(page, stage, free, levels, lefts[stage], y, by_stage[stage].num_columns))
    for stage in band:
        width = by_stage[stage].num_columns * PITCH + 2 * (_STAGE_PAD + PANEL_PAD)
        bottom = max(bottoms) + _STAGE_PAD
        page.stages[stage] = Rectangle(lefts[stage] + width / 2, (top + bottom) / 2, width, bottom - top)
    return max(bottoms) + _STAGE_PAD


def _lay_columns(
    page: Page, name: str, by_stage: Mapping[int, _Stage], lefts: Mapping[int, float], top: float
) -> float:
    """Lay the panels of a name, of all stages of a band: they share their rows."""
    grids = {
        (stage, column, place): rows
        for stage, one in by_stage.items()
        for (panel, column), slots in one.slots.rows.items()
        if panel == name
        for place, rows in slots
    }
    heights: list[float] = []
    for rows in grids.values():
        for i, row in enumerate(rows):
            tall = max(page.boxes[box.fold].height for box in row)
            if i == len(heights):
                heights.append(tall)
            heights[i] = max(heights[i], tall)
    first = top + _PANEL_HEAD + 24.0
    tops = [first + sum(heights[:i]) + i * _ROW_GAP for i in range(len(heights))]
    foot = tops[-1] + heights[-1]
    is_broken = len({(stage, column) for stage, column, _ in grids}) < len(grids)
    bottom = foot + (CHANNEL if is_broken else 0.0) + PANEL_PAD
    for (stage, column, place), rows in grids.items():
        x = lefts[stage] + _STAGE_PAD + PANEL_PAD + (place + 0.5) * PITCH
        slot = Rectangle(x, (first + foot) / 2, PITCH - 8.0, foot - first + 10.0)
        group = page.groups.get((stage, name, column), slot)
        low, high = min(group.left, slot.left), max(group.right, slot.right)
        page.groups[stage, name, column] = Rectangle((low + high) / 2, slot.y, high - low, slot.height)
        for i, row in enumerate(rows):
            for k, box in enumerate(row):
                spot = page.boxes[box.fold]
                spot.x = x if spot.width == BOX_WIDTH else x + (k - 0.5) * (_half_width() + 6.0)
                spot.y = tops[i] + heights[i] / 2
                page.slots[box.fold] = place
    for key in dict.fromkeys((stage, name, column) for stage, column, _ in grids):
        page.heads[key] = Rectangle(page.groups[key].x, top + _PANEL_HEAD, PITCH, 12.0)
        if page.groups[key].width < PITCH:
            del page.groups[key]
    for stage in dict.fromkeys(stage for stage, _, _ in grids):
        width = by_stage[stage].num_columns * PITCH + 2 * PANEL_PAD
        left = lefts[stage] + _STAGE_PAD
        page.panels[stage, name] = Rectangle(left + width / 2, (top + bottom) / 2, width, bottom - top)
        page.feet[stage, name] = foot
    return bottom


def _lay_step(
    page: Page, stage: int, boxes: Sequence[Box], levels: Mapping[int, int], left: float, top: float, columns: int
) -> float:
    ordered = sorted(boxes, key=lambda box: (levels[box.fold], box.fold))
    y = top + _PANEL_HEAD + 12.0
    for begin in range(0, len(ordered), columns):
        row = ordered[begin : begin + columns]
        tall = max(page.boxes[box.fold].height for box in row)
        for i, box in enumerate(row):
            page.boxes[box.fold].x = left + _STAGE_PAD + PANEL_PAD + (i + 0.5) * PITCH
            page.boxes[box.fold].y = y + tall / 2
        y += tall + _STEP_ROW_GAP
    bottom = y - _STEP_ROW_GAP / 2 + 4.0  # lines and words below the last row
    width = columns * PITCH + 2 * PANEL_PAD
    page.panels[stage, STEP] = Rectangle(left + _STAGE_PAD + width / 2, (top + bottom) / 2, width, bottom - top)
    return bottom


def _lay_across(page: Page, boxes: Sequence[Box], levels: Mapping[int, int], top: float) -> float:
    left = min(stage.left for stage in page.stages.values())
    right = max(stage.right for stage in page.stages.values())
    per_row = max(1, int((right - left) / PITCH))
    ordered = sorted(boxes, key=lambda box: (levels[box.fold], box.fold))
    y = top + _PANEL_HEAD
    for begin in range(0, len(ordered), per_row):
        row = ordered[begin : begin + per_row]
        tall = max(page.boxes[box.fold].height for box in row)
        for i, box in enumerate(row):
            page.boxes[box.fold].x = left + (right - left) * (i + 1) / (len(row) + 1)
            page.boxes[box.fold].y = y + tall / 2
        y += tall + _STEP_ROW_GAP
    bottom = y - _STEP_ROW_GAP + PANEL_PAD
    page.panels[-1, ACROSS] = Rectangle((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    return bottom
