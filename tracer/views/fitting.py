"""Break text so that every line of it fits into the shape that it stands in, at its own height."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from truedag.tracer.views.font_metrics import text_width
from truedag.tracer.views.layout_text import FONT_SIZE, LINE_HEIGHT, wrap

_ROOM = 1.5  # points that stay free on each side
_SHARES = {
    "box": (0.95,),
    "ellipse": (0.88, 0.82, 0.76, 0.7, 0.62, 0.54),
    "parallelogram": (0.8, 0.74, 0.68, 0.62, 0.54),
}
_PADS = {"box": (8.0,), "ellipse": (18.0, 24.0, 30.0), "parallelogram": (8.0, 14.0)}
# Of a parallelogram as graphviz draws it, in shares of the width that it was given: half of it, and how far its sides
# lean over its whole height. Measured on graphviz 14.1.
_HALF, _LEAN = 0.412, 0.212


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Lines, how many of them are the title, and how high their box is, in points."""

    lines: list[str]
    num_title: int
    height: float


def fit_text(text: Sequence[str], shape: str, width: float) -> Fitted:
    """Break text for a box, an ellipse or a parallelogram of a width; its first line is the title, in bold."""
    fitted = Fitted(lines=[], num_title=0, height=0.0)
    for share in _SHARES[shape]:
        title = wrap(text[:1], width * share, bold=True)
        lines = title + wrap([line for line in text[1:] if line], width * share)
        for pad in _PADS[shape]:
            fitted = Fitted(lines=lines, num_title=len(title), height=LINE_HEIGHT * len(lines) + pad)
            if _fits(fitted, shape, width):
                return fitted
    return fitted


def border(shape: str, width: float, height: float, off: float, sign: int) -> float:
    """Return how far from its middle a shape ends on its right (sign 1) or left (-1), `off` below its middle."""
    if shape == "parallelogram":
        return sign * width * (_HALF - sign * _LEAN * off / height)
    return sign * _half(shape, width, height, off)


def _fits(fitted: Fitted, shape: str, width: float) -> bool:
    middle = (len(fitted.lines) - 1) / 2
    for i, line in enumerate(fitted.lines):
        off = abs(i - middle) * LINE_HEIGHT + 0.4 * FONT_SIZE
        wide = text_width(line, FONT_SIZE, bold=i < fitted.num_title)
        if wide / 2 + _ROOM > _half(shape, width, fitted.height, off):
            return False
    return True


def _half(shape: str, width: float, height: float, off: float) -> float:
    """Return how far a shape reaches to the side, `off` above or below its middle."""
    if shape == "ellipse":
        return float(width / 2 * max(0.0, 1 - (2 * off / height) ** 2) ** 0.5)
    if shape == "parallelogram":
        return width * (_HALF - _LEAN * off / height)
    return width / 2
