"""Where the parts of the chain stand: a section for each stage, in it a row for each phase, in points, y downwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from truedag.tracer.views.chain import AFTER, ALONE, BEFORE, Part
from truedag.tracer.views.layout import Rectangle

WIDTH, PITCH, ROW_GAP = 124.0, 144.0, 34.0
COLUMN_GAP = 36.0
_STAGE_HEAD, _PAD = 38.0, 12.0
_PER_ROW = 24


@dataclass(slots=True)
class ChainPage:
    """Where all stands.

    Attributes:
        places: of the parts, by number.
        sections: of the stages.
        columns: for each stage the column of sections that it stands in, from left to right.
        rows: of each part its row: as high as the highest part there.
        lefts: for each column of sections where it begins; the last is where all end.
        bottom: where the last section ends.
    """

    places: list[Rectangle]
    sections: dict[int, Rectangle] = field(default_factory=dict)
    columns: dict[int, int] = field(default_factory=dict)
    rows: dict[int, Rectangle] = field(default_factory=dict)
    lefts: list[float] = field(default_factory=lambda: [0.0])
    bottom: float = 0.0

    @property
    def width(self) -> float:
        """How wide all is."""
        return self.lefts[-1]

    def move_down(self, distance: float) -> None:
        """Move all down, as the head above it needs."""
        rows = {id(row): row for row in self.rows.values()}
        for place in (*self.places, *self.sections.values(), *rows.values()):
            place.y += distance
        self.bottom += distance


def place_chain(parts: Sequence[Part], heights: Sequence[float]) -> ChainPage:
    """Place parts of given heights, in as many columns of sections as make the page's longer side short."""
    pages = [_place_in(parts, heights, count) for count in range(1, len({part.stage for part in parts}) + 1)]
    return min(pages, key=lambda page: (max(page.width, page.bottom), page.bottom))


def _place_in(parts: Sequence[Part], heights: Sequence[float], num_columns: int) -> ChainPage:
    page = ChainPage([Rectangle(0.0, 0.0, WIDTH, height) for height in heights])
    stages = sorted({part.stage for part in parts})
    per_column = -(-len(stages) // num_columns)
    for column, begin in enumerate(range(0, len(stages), per_column)):
        top, right = 0.0, 0.0
        for stage in stages[begin : begin + per_column]:
            section = _place_stage(page, parts, stage, (page.lefts[-1] + _PAD, top))
            page.sections[stage], page.columns[stage] = section, column
            top, right = section.bottom + ROW_GAP, max(right, section.right)
        page.lefts.append(right + COLUMN_GAP - _PAD)
        page.bottom = max(page.bottom, top - ROW_GAP)
    return page


def _place_stage(page: ChainPage, parts: Sequence[Part], stage: int, corner: tuple[float, float]) -> Rectangle:
    """Place the parts of a stage, a row for each phase; return its section."""
    left, top = corner
    inside = [i for i, part in enumerate(parts) if part.stage == stage]
    y, wide = top + _STAGE_HEAD, 0.0
    phases = dict.fromkeys(parts[i].phase for i in inside if parts[i].slot != ALONE)
    rows = [[i for i in inside if parts[i].phase == phase and parts[i].slot != ALONE] for phase in phases]
    rows += [[i for i in inside if parts[i].slot == ALONE]]
    for row in rows:
        ordered = sorted(row, key=lambda i: _column(parts, parts[i]))
        for begin in range(0, len(ordered), _PER_ROW):
            line = ordered[begin : begin + _PER_ROW]
            tall = max(page.places[i].height for i in line)
            across = Rectangle(left + _PAD + len(line) * PITCH / 2, y + tall / 2, len(line) * PITCH, tall)
            for k, i in enumerate(line):
                page.places[i].x, page.places[i].y = left + _PAD + (k + 0.5) * PITCH, y + tall / 2
                page.rows[i] = across
            wide = max(wide, across.width)
            y += tall + ROW_GAP
    bottom = y - ROW_GAP + _PAD
    return Rectangle(left + wide / 2 + _PAD, (top + bottom) / 2, wide + 2 * _PAD, bottom - top)


def _column(parts: Sequence[Part], part: Part) -> tuple[int, int, str]:
    """Order a row: what comes in stands on the side of the first layer, what goes out on the other."""
    layers = [one.slot for one in parts if one.stage == part.stage and one.phase == part.phase and one.slot >= 0]
    is_falling = len(layers) > 1 and layers[0] > layers[-1]
    # What is received is read by the layers, what is sent may come from what runs after them; what is received after
    # them is of no use to them.
    after = (3 if part.is_receive else 2) if part.label else 1
    away = {BEFORE: -1 if part.label else -2, AFTER: after}.get(part.slot, 0)
    return (-away if is_falling else away, part.slot, part.label)
