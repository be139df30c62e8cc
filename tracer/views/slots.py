"""Columns of boxes, each broken into slots beside each other where it is too long for the page.

A slot is read downwards and goes on in the next: to its right, or to its left in a phase that runs through the layers
from the last to the first. All phases of a stage have the same slots, so that a layer stands below itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from truedag.tracer.views.boxes import Box, Column

_MOST_SLOTS = 4  # of a column
Row = list[Box]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """The slots of a stage.

    Attributes:
        num: how many there are, from left to right.
        rows: for each panel and column the places of its slots, in reading order, each with its rows.
    """

    num: int
    rows: Mapping[tuple[str, Column], list[tuple[int, list[Row]]]]


def list_lengths(stages: Iterable[Sequence[Box]]) -> list[int]:
    """List how many rows a slot may have: all of the longest column of any stage, half of it, and so on."""
    longest = max((len(rows) for boxes in stages for rows in _columns(boxes).values()), default=1)
    return sorted({-(-longest // num) for num in range(1, _MOST_SLOTS + 1)}, reverse=True)


def cut_slots(boxes: Sequence[Box], length: int) -> Slots:
    """Break the columns of a stage into slots of at most so many rows, of about equal length."""
    columns = _columns(boxes)
    widths: dict[Column, int] = {}
    for (_, column), rows in columns.items():
        widths[column] = max(widths.get(column, 1), -(-len(rows) // length))
    lefts: dict[Column, int] = {}
    num = 0
    for column in sorted(widths):
        lefts[column] = num
        num += widths[column]
    falling = {box.panel for box in boxes if box.falls}
    found = {}
    for (panel, column), rows in columns.items():
        size = -(-len(rows) // -(-len(rows) // length))
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        last = lefts[column] + widths[column] - 1
        found[panel, column] = [
            (last - i if panel in falling else lefts[column] + i, part) for i, part in enumerate(parts)
        ]
    return Slots(num=num, rows=found)


def _columns(boxes: Sequence[Box]) -> dict[tuple[str, Column], list[Row]]:
    columns: dict[tuple[str, Column], list[Box]] = {}
    for box in boxes:
        if box.column is not None:
            columns.setdefault((box.panel, box.column), []).append(box)
    return {key: _rows(inside) for key, inside in columns.items()}


def _rows(boxes: Sequence[Box]) -> list[Row]:
    """Take a column's boxes in order, a row each; those that carry experts two by two."""
    rows: list[Row] = []
    for box in sorted(boxes, key=lambda box: (box.level, box.experts != "", _first_expert(box), box.fold)):
        last = rows[-1] if rows else []
        if box.experts and len(last) == 1 and last[0].experts and last[0].level == box.level:
            last.append(box)
        else:
            rows.append([box])
    return rows


def _first_expert(box: Box) -> int:
    return int(box.experts.partition(",")[0]) if box.experts else -1
