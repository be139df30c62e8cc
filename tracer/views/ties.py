"""Which of the folded graph's edges are drawn as lines of their own, and which are bundled, so that nothing is hidden.

Lines: inside a column or to the next one, messages, inside a step's panel, and all that meet a communication across
stages. Bundles: from a column to the same column of another phase (what forward keeps for backward), and between
columns and the step's panel (gradients). What is left is written on the node it leads to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from truedag.tracer.analysis.quantities import write_bytes
from truedag.tracer.views.boxes import ACROSS, STEP, Box, Column
from truedag.tracer.views.captions import count


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """A folded edge, or a bundle of them."""

    src: int
    dst: int
    kind: str
    num_edges: int
    num_bytes: int

    def describe(self) -> str:
        """Say what it stands for."""
        return f"{count(self.num_edges, 'edge')}, {write_bytes(self.num_bytes)}"


@dataclass(slots=True)
class Ties:
    """How every folded edge between boxes is shown.

    Attributes:
        lines: drawn on their own.
        bundled: the others.
        links: (stage, column, panel, panel) to edges and bytes.
        stubs_in: for a step's box, from which phase how many edges and bytes come.
        stubs_out: for a step's box, to which phase they go.
        notes: for a box, what else leads to it, in words.
    """

    lines: list[Tie] = field(default_factory=list)
    bundled: list[Tie] = field(default_factory=list)
    links: dict[tuple[int, Column, str, str], list[int]] = field(default_factory=dict)
    stubs_in: dict[int, dict[str, list[int]]] = field(default_factory=dict)
    stubs_out: dict[int, dict[str, list[int]]] = field(default_factory=dict)
    notes: dict[int, list[str]] = field(default_factory=dict)


def sort_ties(edges: pl.DataFrame, boxes: Sequence[Box]) -> Ties:
    """Decide how each folded edge between boxes is shown."""
    by_fold = {box.fold: box for box in boxes}
    columns = {
        stage: sorted({box.column for box in boxes if box.stage == stage and box.column is not None})
        for stage in {box.stage for box in boxes}
    }
    ties = Ties()
    notes: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0, 0])
    for row in edges.to_dicts():
        src, dst = by_fold.get(row["src"]), by_fold.get(row["dst"])
        if src is None or dst is None:
            continue
        tie = Tie(src=src.fold, dst=dst.fold, kind=row["kind"], num_edges=row["num_edges"], num_bytes=row["bytes"])
        if _is_line(tie, src, dst, columns):
            ties.lines.append(tie)
            continue
        ties.bundled.append(tie)
        if dst.panel == STEP and src.panel != STEP:
            into = ties.stubs_in.setdefault(dst.fold, {}).setdefault(_place(src, dst), [0, 0])
        elif src.panel == STEP and dst.panel != STEP:
            into = ties.stubs_out.setdefault(src.fold, {}).setdefault(_place(dst, src), [0, 0])
        elif src.column is not None and (src.stage, src.column) == (dst.stage, dst.column):
            into = ties.links.setdefault((src.stage, src.column, src.panel, dst.panel), [0, 0])
        else:
            into = notes[dst.fold, _name(src, dst)]
        into[0] += tie.num_edges
        into[1] += tie.num_bytes
    for (fold, place), (num, size) in notes.items():
        ties.notes.setdefault(fold, []).append(f"+ {count(num, 'edge')} from {place}, {write_bytes(size)}")
    return ties


def count_levels(edges: pl.DataFrame, boxes: Sequence[Box]) -> dict[int, int]:
    """Count the edges on the longest way to each box; edges lead from lower to higher numbers."""
    levels = {box.fold: 0 for box in boxes}
    for src, dst in edges.sort("src").select("src", "dst").iter_rows():
        if src in levels and dst in levels:
            levels[dst] = max(levels[dst], levels[src] + 1)
    return levels


def _is_line(tie: Tie, src: Box, dst: Box, columns: Mapping[int, Sequence[Column]]) -> bool:
    if tie.kind == "p2p" or (ACROSS in (src.panel, dst.panel) and {src.panel, dst.panel} <= {ACROSS, STEP}):
        return True
    if (src.stage, src.panel) != (dst.stage, dst.panel):
        return False
    if src.column is None or dst.column is None:
        return True
    places = columns[src.stage]
    return abs(places.index(src.column) - places.index(dst.column)) <= 1


def _place(box: Box, near: Box) -> str:
    return box.panel if box.stage == near.stage else f"{box.panel} of stage {box.stage}"


def _name(box: Box, near: Box) -> str:
    where = {0: "before the layers", 2: "after the layers"}
    column = "" if box.column is None else where.get(box.column[0], f"layer {box.column[1]}")
    panel = "" if (box.stage, box.panel) == (near.stage, near.panel) else _place(box, near)
    return " ".join(part for part in (panel, column) if part) or box.text[0]
