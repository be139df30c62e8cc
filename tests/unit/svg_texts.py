"""The boxes of a drawing's SVG with the text in them, and how far a text stands out of its box."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

from truedag.tracer.views.font_metrics import text_width

_SVG = "{http://www.w3.org/2000/svg}"


def overhangs(path: Path) -> Iterator[tuple[str, float]]:
    """Give for each line of text in a box how many points it stands out of it (less than 0: room is left)."""
    root = ET.parse(path).getroot()
    for node in root.iter(f"{_SVG}g"):
        if node.get("class") != "node":
            continue
        shape = next((one for one in node.iter() if one.tag[len(_SVG) :] in ("polygon", "ellipse", "path")), None)
        if shape is None:
            continue
        for text in node.iter(f"{_SVG}text"):
            said = text.text or ""
            size, x, y = (float(text.get(name, "0")) for name in ("font-size", "x", "y"))
            wide = text_width(said, size, bold=text.get("font-weight") == "bold")
            left = x - wide / 2 if text.get("text-anchor") == "middle" else x
            for edge in (y - 0.7 * size, y):  # from the capitals' height to the base line
                low, high = _span(shape, edge)
                yield said, max(low - left, left + wide - high)


def links(path: Path) -> list[str]:
    """List where the links of an SVG lead."""
    root = ET.parse(path).getroot()
    found = (one.get("{http://www.w3.org/1999/xlink}href") for one in root.iter(f"{_SVG}a"))
    return [way for way in found if way]


def _span(shape: ET.Element, y: float) -> tuple[float, float]:
    """Return where a shape begins and ends at a height."""
    if shape.tag == f"{_SVG}ellipse":
        cx, cy, rx, ry = (float(shape.get(name, "0")) for name in ("cx", "cy", "rx", "ry"))
        half = rx * max(0.0, 1 - ((y - cy) / ry) ** 2) ** 0.5
        return cx - half, cx + half
    told = shape.get("points") or shape.get("d") or ""
    points = [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", told)]
    if shape.tag == f"{_SVG}path":  # a rounded box
        return min(x for x, _ in points), max(x for x, _ in points)
    cuts = []
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        if ay != by and min(ay, by) <= y <= max(ay, by):
            cuts.append(ax + (bx - ax) * (y - ay) / (by - ay))
    return (min(cuts), max(cuts)) if cuts else (min(x for x, _ in points), min(x for x, _ in points))
