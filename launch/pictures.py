"""The pictures and the page that belong to a run, or why there are none: the graph is there all the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """What was drawn: the SVG of the first sheet of each view, the simplest first; `why_not` says why there is none."""

    drawn: list[Path]
    why_not: str = ""


def draw_pictures(dag: Path, views: Path, *, show: Callable[[str], None]) -> Pictures:
    """Draw all views of a dataset; what its audit found is marked.

    Raises:
        GraphError: the dataset is broken.
    """
    from truedag.launch.run_audit import read_audit
    from truedag.tracer.errors import DrawError
    from truedag.tracer.views.draw import draw

    show("drawing")
    try:
        return Pictures(drawn=[one.svg for one in draw(dag, views, audit=read_audit(dag), progress=show)])
    except DrawError as error:
        return Pictures(drawn=[], why_not=str(error))
