"""Text of a given width: how large it is set, and where it is broken."""

from __future__ import annotations

from collections.abc import Sequence

from truedag.tracer.views.font_metrics import text_width

FONT_SIZE = 8.0
LINE_HEIGHT = 9.8
_UNITS = frozenset(("B", "KiB", "MiB", "GiB", "TiB", "ns", "µs", "ms", "s"))


def wrap(text: Sequence[str], width: float, *, size: float = FONT_SIZE, bold: bool = False) -> list[str]:
    """Break lines at spaces, and words that are too long at dots, commas and low lines, so that none is wider.

    Args:
        text: the lines.
        width: in points.
        size: of the letters, in points.
        bold: whether they are bold.
    """
    lines: list[str] = []
    for line in text:
        current = ""
        for word in _words(line):
            longer = f"{current} {word}" if current else word
            if current and text_width(longer, size, bold=bold) > width:
                lines.append(current)
                longer = word
            current = longer
            while len(current) > 1 and text_width(current, size, bold=bold) > width:
                fits = max(
                    n for n in range(1, len(current)) if n == 1 or text_width(current[:n], size, bold=bold) <= width
                )
                cut = max((current.rfind(sign, 0, fits) + 1 for sign in ".,_ "), default=0) or fits
                lines.append(current[:cut].rstrip())
                current = current[cut:]
        if current:
            lines.append(current)
    return lines


def _words(line: str) -> list[str]:
    """Split at spaces, but not a number from its unit, nor from the x before it."""
    words: list[str] = []
    for word in line.split(" "):
        before = words[-1] if words else ""
        if (word.rstrip(",;.") in _UNITS and before[-1:].isdigit()) or (before == "x" and word[:1].isdigit()):
            words[-1] = f"{before} {word}"
        else:
            words.append(word)
    return words
