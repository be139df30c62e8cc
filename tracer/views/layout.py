"""Where everything stands on the page, in points, y downwards: a fixed design, no search for a good one.

A stage's panels stand below each other and stages side by side, in as many bands as make the page's longer side short.
In a panel of columns all columns share their rows, so that alike layers line up and their times can be compared by eye;
boxes that carry experts share a row two by two. A panel without columns is filled like a text, left to right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

from truedag.tracer.views.boxes import ACROSS, STEP, Box, Column
from truedag.tracer.views.fitting import fit_text

BOX_WIDTH = 130.0
PITCH = 160.0  # from one column to the next
_ROW_GAP = 13.0
_STEP_ROW_GAP = 52.0
_PANEL_GAP = 24.0
_PANEL_PAD = 14.0
_PANEL_HEAD = 38.0
_STAGE_PAD = 10.0
_STAGE_HEAD = 34.0
_MIN_STEP_COLUMNS = 3
_STEP_ROW = 110.0  # about what a row of a step's panel takes


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

    `lines` is the boxes' text as broken, its first `num_title` lines the title.
    """

    boxes: dict[int, Rectangle] = field(default_factory=dict)
    lines: dict[int, list[str]] = field(default_factory=dict)
    num_title: dict[int, int] = field(default_factory=dict)
    panels: dict[tuple[int, str], Rectangle] = field(default_factory=dict)
    stages: dict[int, Rectangle] = field(default_factory=dict)
    heads: dict[tuple[int, str, Column], Rectangle] = field(default_factory=dict)
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
    for box in boxes:
        width = _half_width() if box.experts else BOX_WIDTH
        fitted = fit_text(box.text, box.shape, width)
        sizes.num_title[box.fold], sizes.lines[box.fold] = fitted.num_title, fitted.lines
        sizes.boxes[box.fold] = Rectangle(0.0, 0.0, width, fitted.height)
    by_stage: dict[int, list[Box]] = {}
    for box in boxes:
        if box.panel != ACROSS:
            by_stage.setdefault(box.stage, []).append(box)
    ways = _list_bands({stage: _num_columns(inside) for stage, inside in by_stage.items()})
    pages = [_lay_bands(sizes, bands, boxes, by_stage, levels, top) for bands in ways]
    return min(pages, key=lambda page: (max(page.width, page.height), page.height))


def _lay_bands(
    sizes: Page,
    bands: Sequence[Sequence[int]],
    boxes: Sequence[Box],
    by_stage: Mapping[int, Sequence[Box]],
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


def _columns(boxes: Sequence[Box]) -> list[Column]:
    return sorted({box.column for box in boxes if box.column is not None})


def _num_columns(boxes: Sequence[Box]) -> int:
    free = sum(box.panel == STEP for box in boxes)
    square = max(_MIN_STEP_COLUMNS, round(sqrt(free * _STEP_ROW / PITCH)))  # as wide as high
    return max(len(_columns(boxes)), min(square, free), 1)


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
    page: Page, band: Sequence[int], by_stage: Mapping[int, Sequence[Box]], levels: Mapping[int, int], top: float
) -> float:
    x = _STAGE_PAD
    lefts = {}
    for stage in band:
        lefts[stage] = x
        x += _num_columns(by_stage[stage]) * PITCH + 2 * (_STAGE_PAD + _PANEL_PAD) + _PANEL_GAP
    y = top + _STAGE_HEAD
    names = list(dict.fromkeys(box.panel for stage in band for box in by_stage[stage] if box.column is not None))
    for name in names:
        y = _lay_columns(page, name, {s: [b for b in by_stage[s] if b.panel == name] for s in band}, by_stage, lefts, y)
        y += _PANEL_GAP
    bottoms = [y - _PANEL_GAP]
    for stage in band:
        free = [box for box in by_stage[stage] if box.panel == STEP]
        if free:
            bottoms.append(_lay_step(page, stage, free, levels, lefts[stage], y, _num_columns(by_stage[stage])))
    for stage in band:
        width = _num_columns(by_stage[stage]) * PITCH + 2 * (_STAGE_PAD + _PANEL_PAD)
        bottom = max(bottoms) + _STAGE_PAD
        page.stages[stage] = Rectangle(lefts[stage] + width / 2, (top + bottom) / 2, width, bottom - top)
    return max(bottoms) + _STAGE_PAD


def _rows(boxes: Sequence[Box]) -> list[list[Box]]:
    """Take a column's boxes in order, a row each; those that carry experts two by two."""
    rows: list[list[Box]] = []
    for box in sorted(boxes, key=lambda box: (box.level, box.experts != "", _first_expert(box), box.fold)):
        last = rows[-1] if rows else []
        if box.experts and len(last) == 1 and last[0].experts and last[0].level == box.level:
            last.append(box)
        else:
            rows.append([box])
    return rows


def _first_expert(box: Box) -> int:
    return int(box.experts.partition(",")[0]) if box.experts else -1


def _lay_columns(
    page: Page,
    name: str,
    boxes: Mapping[int, Sequence[Box]],
    by_stage: Mapping[int, Sequence[Box]],
    lefts: Mapping[int, float],
    top: float,
) -> float:
    grids = {
        (stage, column): _rows([box for box in inside if box.column == column])
        for stage, inside in boxes.items()
        for column in _columns(inside)
    }
    heights: list[float] = []
    for rows in grids.values():
        for i, row in enumerate(rows):
            tall = max(page.boxes[box.fold].height for box in row)
            if i == len(heights):
                heights.append(tall)
            heights[i] = max(heights[i], tall)
    tops = [top + _PANEL_HEAD + 14.0 + sum(heights[:i]) + i * _ROW_GAP for i in range(len(heights))]
    bottom = (tops[-1] + heights[-1] if heights else top) + _PANEL_PAD
    for (stage, column), rows in grids.items():
        place = _columns(by_stage[stage]).index(column)
        x = lefts[stage] + _STAGE_PAD + _PANEL_PAD + (place + 0.5) * PITCH
        page.heads[stage, name, column] = Rectangle(x, top + _PANEL_HEAD, PITCH, 12.0)
        for i, row in enumerate(rows):
            for k, box in enumerate(row):
                spot = page.boxes[box.fold]
                spot.x = x if not box.experts else x + (k - 0.5) * (_half_width() + 6.0)
                spot.y = tops[i] + heights[i] / 2
    for stage, inside in boxes.items():
        if inside:
            width = _num_columns(by_stage[stage]) * PITCH + 2 * _PANEL_PAD
            page.panels[stage, name] = Rectangle(
                lefts[stage] + _STAGE_PAD + width / 2, (top + bottom) / 2, width, bottom - top
            )
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
            page.boxes[box.fold].x = left + _STAGE_PAD + _PANEL_PAD + (i + 0.5) * PITCH
            page.boxes[box.fold].y = y + tall / 2
        y += tall + _STEP_ROW_GAP
    bottom = y - _STEP_ROW_GAP / 2 + 4.0  # lines and words below the last row
    width = columns * PITCH + 2 * _PANEL_PAD
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
    bottom = y - _STEP_ROW_GAP + _PANEL_PAD
    page.panels[-1, ACROSS] = Rectangle((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    return bottom
