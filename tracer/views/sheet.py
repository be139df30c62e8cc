"""A sheet of a drawing: one page with its head, and the links that lead to the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from truedag.tracer.errors import DrawError
from truedag.tracer.views.colours import stage_colour, tint
from truedag.tracer.views.dot import Dot
from truedag.tracer.views.font_metrics import text_width
from truedag.tracer.views.layout import Rectangle
from truedag.tracer.views.layout_text import wrap
from truedag.tracer.views.render import Picture, render_all

DPI = 96.0
MAX_PIXELS = 16_000  # of a bitmap's side; beyond, letters get smaller
_LEFT = 12.0
_TITLE = 44.0
_SIZE = 10.0
_LINE = 13.0
_SIGN_LINE = 20.0
_MARGIN = 12.0
GREY = stage_colour(-1)
_VIEWS = {"simplified": "strategy", "comprehensive": "all GPUs", "detailed": "all layers and operators"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """A line of the legend: a shape or a line, and what it means."""

    words: str
    shape: str = ""  # none: a line
    style: str = "solid"
    pen: float = 1.0
    width: float = 34.0
    fill: str = ""
    colour: str = GREY
    arrow: str = "forward"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A way to another sheet: its words, and the sheet's name."""

    words: str
    sheet: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What the head of a page says, broken into lines as its width allows, and how tall that is, in points."""

    title: str
    links: tuple[Link, ...]
    told: tuple[str, ...]
    signs: tuple[tuple[float, float, Sign], ...]
    height: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A page.

    Attributes:
        name: its path without suffix, below the folder of the views, with / between folders.
        title: what it is of.
        dot: its DOT text.
        width: in points.
        height: in points.
        num_shown: nodes on it that stand for nodes of the graph.
        num_nodes: how many nodes of the graph these are.
    """

    name: str
    title: str
    dot: str
    width: float
    height: float
    num_shown: int
    num_nodes: int


def link_views(linked: Sequence[str], *, but: str) -> tuple[Link, ...]:
    """Return the ways to the first sheets of other views, of those that there are."""
    return tuple(Link(words=words, sheet=name) for name, words in _VIEWS.items() if name in linked and name != but)


def plan_head(
    title: str, told: Sequence[str], signs: Sequence[Sign], *, width: float, links: Sequence[Link] = ()
) -> Head:
    """Break a page's head into lines."""
    lines = wrap(told, width - _LEFT, size=_SIZE)
    top = _TITLE + (_LINE + 3 if links else 0)
    x, y = _LEFT, top + _LINE * len(lines) + _LINE
    placed = []
    for sign in signs:
        wide = sign.width + 6 + text_width(sign.words, _SIZE) + 16
        if x > _LEFT and x + wide > width:
            x, y = _LEFT, y + _SIGN_LINE
        placed.append((x, y, sign))
        x += wide
    return Head(title=title, links=tuple(links), told=tuple(lines), signs=tuple(placed), height=y + _SIGN_LINE)


def draw_head(dot: Dot, head: Head, *, sheet: str) -> None:
    """Draw the head of a page; links lead from the sheet of this name."""
    dot.words("title", (_LEFT, 20), head.title, size=24, bold=True, align="l")
    x, y = _LEFT, _TITLE
    for i, link in enumerate(head.links):
        dot.words(
            f"link {i}",
            (x, y),
            link.words,
            size=_SIZE,
            align="l",
            URL=find_way(sheet, link.sheet),
            fontcolor="#0050a0",
        )
        x += text_width(link.words, _SIZE) + 22
    y += _LINE + 3 if head.links else 0
    for i, text in enumerate(head.told):
        dot.words(f"told {i}", (_LEFT, y + _LINE * i), text, size=_SIZE, align="l")
    for i, (x, y, sign) in enumerate(head.signs):
        if sign.shape:
            place = Rectangle(x + sign.width / 2, y, sign.width, 14)
            dot.node(f"sign {i}", place, (), shape=sign.shape, fillcolor=sign.fill, color=sign.colour)
        else:
            ends = [(x, y), (x + sign.width, y)]
            for end, at in zip(("begin", "end"), ends, strict=True):
                dot.node(f"sign {i} {end}", Rectangle(*at, 1.0, 1.0), (), shape="point", style="invis")
            look = {"style": sign.style, "penwidth": sign.pen, "color": sign.colour, "dir": sign.arrow}
            dot.line(f"sign {i} begin", f"sign {i} end", ends, **look)
        dot.words(f"sign {i} text", (x + sign.width + 6, y), sign.words, size=_SIZE, align="l")


def frame_stage(dot: Dot, stage: int, place: Rectangle, nodes: Sequence[str]) -> None:
    """Draw the frame of a stage around its nodes."""
    colour = stage_colour(stage)
    look = {"style": "filled,rounded", "fillcolor": tint(colour, 0.05), "color": colour, "penwidth": 1.6}
    dot.box(f"stage {stage}", place, nodes, **look)


def find_way(sheet: str, other: str) -> str:
    """Return the relative path from a sheet to another's SVG."""
    up = len(PurePosixPath(sheet).parts) - 1
    return "../" * up + f"{other}.svg"


def write_sheets(sheets: Sequence[Sheet], views: Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Write sheets as DOT, SVG and PNG below a folder.

    Raises:
        DrawError: graphviz could not draw one, or a file cannot be written.
    """
    pictures = []
    for sheet in sheets:
        path = views / f"{sheet.name}.dot"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(sheet.dot, encoding="utf-8")
        except OSError as error:
            raise DrawError(f"cannot write the drawing {path}: {error}") from error
        dpi = min(DPI, MAX_PIXELS / (max(sheet.width, sheet.height) + 2 * _MARGIN) * 72.0)
        pictures.append(
            Picture(dot=path, outputs=tuple(views / f"{sheet.name}.{suffix}" for suffix in ("svg", "png")), dpi=dpi)
        )
    say(f"drawing {len(sheets)} sheet{'' if len(sheets) == 1 else 's'}")
    render_all(pictures)
