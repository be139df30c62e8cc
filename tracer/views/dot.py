"""Write the drawing as DOT, every position given; the same drawing is the same text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from truedag.tracer.views.fonts import FAMILY
from truedag.tracer.views.layout import Rectangle
from truedag.tracer.views.layout_text import FONT_SIZE
from truedag.tracer.views.routes import Point, round_corners

_POINTS_PER_INCH = 72.0
_ARROW = 5.0
# A picture that holds one of these is no XML.
_CONTROLS = dict.fromkeys([*range(32), *range(127, 160), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF], " ")


@dataclass(slots=True)
class Dot:
    """A DOT text in the making; positions are points, y downwards from the page's top left corner."""

    name: str
    width: float
    height: float
    lines: list[str] = field(default_factory=list)

    def node(
        self, name: str, place: Rectangle, text: Sequence[str], *, num_bold: int = 1, **attributes: object
    ) -> None:
        """Add a node; the first lines of its text are bold."""
        label = "<BR/>".join(
            f"<B>{_escape(line)}</B>" if i < num_bold else _escape(line) for i, line in enumerate(text)
        )
        given = {
            "pos": self._point((place.x, place.y)),
            "width": f"{place.width / _POINTS_PER_INCH:.4f}",
            "height": f"{place.height / _POINTS_PER_INCH:.4f}",
            "label": f"<{label}>" if label else '""',
            **attributes,
        }
        self.lines.append(f"  {_quote(name)} {_attributes(given)};")

    def words(
        self,
        name: str,
        at: Point,
        text: str,
        *,
        size: float,
        bold: bool = False,
        align: str = "c",
        **attributes: object,
    ) -> None:
        """Add text alone; `at` is its middle, or its left end with align l."""
        label = f"<B>{_escape(text)}</B>" if bold else _escape(text)
        x = at[0]
        if align == "l":  # only a table's cell sets text to one side: it is wide enough for any font
            width = round(0.6 * len(text) * size)
            x += width / 2
            plain = 'BORDER="0" CELLPADDING="0" CELLSPACING="0" FIXEDSIZE="TRUE"'
            table = f'<TABLE {plain} WIDTH="{width}" HEIGHT="{size:.0f}">'
            label = f'{table}<TR><TD ALIGN="LEFT">{label}</TD></TR></TABLE>'
        given = {
            "pos": self._point((x, at[1])),
            "shape": "plaintext",
            "style": "",
            "width": "0",
            "height": "0",
            "fontsize": f"{size:g}",
            "label": f"<{label}>",
            **attributes,
        }
        self.lines.append(f"  {_quote(name)} {_attributes(given)};")

    def spline(self, src: str, dst: str, points: Sequence[Point], **attributes: object) -> None:
        """Add an edge along a cubic B-spline of 3n + 1 points, the last of which is the arrow's tip."""
        *way, last, end = points
        position = " ".join(f"{self._point(point)}" for point in (*way, last, _before(last, end)))
        given = {"pos": f"e,{self._point(end)} {position}", **attributes}
        self.lines.append(f"  {_quote(src)} -> {_quote(dst)} {_attributes(given)};")

    def hidden(self, src: str, dst: str, **attributes: object) -> None:
        """Add an edge that is not drawn: what stands for it says so."""
        self.lines.append(f"  {_quote(src)} -> {_quote(dst)} {_attributes({'style': 'invis', **attributes})};")

    def line(self, src: str, dst: str, points: Sequence[Point], **attributes: object) -> None:
        """Add an edge that takes the way of `points`."""
        *way, end = points
        tip = _before(way[-1], end)
        control = round_corners([*way, tip])
        position = " ".join([f"e,{self._point(end)}", *(self._point(point) for point in control)])
        self.lines.append(f"  {_quote(src)} -> {_quote(dst)} {_attributes({'pos': position, **attributes})};")

    def box(self, name: str, place: Rectangle, nodes: Iterable[str], **attributes: object) -> None:
        """Add a cluster around nodes; its place is given, graphviz draws it as it is."""
        low = self._point((place.left, place.bottom))
        high = self._point((place.right, place.top))
        inside = " ".join(_quote(node) + ";" for node in nodes)
        given = _attributes({"bb": f"{low},{high}", **attributes})
        self.lines.append(f"  subgraph {_quote('cluster ' + name)} {{ graph {given}; {inside} }}")

    def text(self, *, comment: str) -> str:
        """Return the whole DOT text."""
        head = [
            f"// {comment}",
            f"digraph {_quote(self.name)} {{",
            f'  graph [bb="0,0,{self.width:.2f},{self.height:.2f}", bgcolor=white, outputorder=edgesfirst, pad=0.15,'
            f' fontname={_quote(FAMILY)}, fontcolor="#222222"];',
            f'  node [fontname={_quote(FAMILY)}, fontsize={FONT_SIZE:g}, fontcolor="#1a1a1a", fixedsize=true,'
            ' margin="0,0", style=filled, penwidth=0.8];',
            f"  edge [fontname={_quote(FAMILY)}, arrowsize=0.45, penwidth=0.9];",
        ]
        return "\n".join([*head, *self.lines, "}", ""])

    def _point(self, point: Point) -> str:
        return f"{point[0]:.2f},{self.height - point[1]:.2f}"


def _before(a: Point, b: Point) -> Point:
    """Return the point on the line from a to b where its arrow's head begins."""
    length = ((b[0] - a[0]) ** 2 + (b[1] - a[1]) ** 2) ** 0.5
    share = 0.0 if length <= _ARROW else 1 - _ARROW / length
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share)


def _attributes(given: Mapping[str, object]) -> str:
    return "[" + ", ".join(f"{name}={_value(str(value))}" for name, value in given.items()) + "]"


def _value(text: str) -> str:
    return text if text.startswith("<") and text.endswith(">") else text if text == '""' else _quote(text)


def _escape(text: str) -> str:
    return escape(text.translate(_CONTROLS))


def _quote(text: str) -> str:
    return '"' + text.translate(_CONTROLS).replace("\\", "\\\\").replace('"', '\\"') + '"'
