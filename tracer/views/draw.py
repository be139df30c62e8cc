"""Draw a graph as it was asked for: `detailed`, `simplified`, `comprehensive`, as DOT, SVG and PNG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truedag.tracer.graph import Graph
from truedag.tracer.views.comprehensive import draw_comprehensive
from truedag.tracer.views.detailed import Choice, draw_detailed
from truedag.tracer.views.faults import Faults
from truedag.tracer.views.notebook import Picture
from truedag.tracer.views.scope import find_scope
from truedag.tracer.views.sheet import Sheet, write_sheets
from truedag.tracer.views.simplified import draw_simplified

__all__ = ["VIEWS", "Choice", "Drawing", "draw"]

_DRAWERS = {"simplified": draw_simplified, "comprehensive": draw_comprehensive, "detailed": draw_detailed}
VIEWS = tuple(_DRAWERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing(Picture):
    """What was drawn.

    Attributes:
        view: one of VIEWS.
        dot: the DOT file of its first sheet, with every folded node and edge.
        svg: the picture to zoom into; it leads to the other sheets.
        png: the picture to look at.
        sheets: the SVG of every sheet.
        num_shown: nodes on the first sheet.
        num_nodes: nodes of the dataset that they stand for.
        num_total: all nodes of the dataset.
    """

    view: str
    dot: Path
    svg: Path
    png: Path
    sheets: tuple[Path, ...]
    num_shown: int
    num_nodes: int
    num_total: int


def draw(
    dag_dir: Path,
    views_dir: Path,
    *,
    views: Sequence[str] = VIEWS,
    choice: Choice | None = None,
    audit: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Drawing]:
    """Draw a dataset into `views_dir`/VIEW.{dot,svg,png}, and into VIEW/ where one sheet does not hold it.

    Args:
        dag_dir: the dataset.
        views_dir: where the pictures go.
        views: which of VIEWS.
        choice: what of the graph is drawn in detail; None: all.
        audit: what an audit found, as `audit.report.to_json` has it, is marked; None: none was made.
        progress: is told what goes on.

    Raises:
        GraphError: there is no dataset, or it is broken.
        DrawError: graphviz could not draw it, what was chosen is not in it, or the files cannot be written. What was
            there before may be replaced.
    """
    say = progress or (lambda _: None)
    scope = find_scope(Graph.open(dag_dir), Faults.of(audit))
    chosen = choice or Choice()
    linked = [view for view in VIEWS if view in views or (views_dir / f"{view}.svg").exists()]
    made = {view: how(scope, chosen, say, linked=linked) for view, how in _DRAWERS.items() if view in views}
    write_sheets([sheet for sheets in made.values() for sheet in sheets], views_dir, say)
    return [_drawing(view, sheets, views_dir, scope.num_total) for view, sheets in made.items()]


def _drawing(view: str, sheets: Sequence[Sheet], views: Path, num_total: int) -> Drawing:
    first = sheets[0]
    return Drawing(
        view=view,
        dot=views / f"{first.name}.dot",
        svg=views / f"{first.name}.svg",
        png=views / f"{first.name}.png",
        sheets=tuple(views / f"{sheet.name}.svg" for sheet in sheets),
        num_shown=first.num_shown,
        num_nodes=first.num_nodes,
        num_total=num_total,
    )
