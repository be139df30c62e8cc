"""How wide text is in the drawings' font, read from the font itself: glyph widths of a TrueType file."""

from __future__ import annotations

import struct
from functools import cache, lru_cache
from pathlib import Path

from truedag.tracer.views.fonts import font_file


class Font:
    """Advance widths of a TrueType font, in em.

    Source: Microsoft, "OpenType specification" 1.9, tables head, hhea, hmtx and cmap (format 4).
    """

    def __init__(self, path: Path) -> None:
        """Read its tables."""
        self._data = path.read_bytes()
        (num_tables,) = struct.unpack_from(">H", self._data, 4)
        entries = (struct.unpack_from(">4sIII", self._data, 12 + 16 * i) for i in range(num_tables))
        self._tables = {tag.decode(): offset for tag, _, offset, _ in entries}
        (self._num_metrics,) = struct.unpack_from(">H", self._data, self._tables["hhea"] + 34)
        units: int = struct.unpack_from(">H", self._data, self._tables["head"] + 18)[0]
        glyphs = self._read_glyphs()
        self._unknown = self._advance(0) / units
        self._widths = {code: self._advance(glyph) / units for code, glyph in glyphs.items()}

    def _read_glyphs(self) -> dict[int, int]:
        base = self._tables["cmap"]
        (num,) = struct.unpack_from(">H", self._data, base + 2)
        for i in range(num):
            platform, encoding, offset = struct.unpack_from(">HHI", self._data, base + 4 + 8 * i)
            if (platform, encoding) == (3, 1):
                return self._read_segments(base + offset)
        raise ValueError("the font has no Unicode table")

    def _read_segments(self, at: int) -> dict[int, int]:
        form, _, _, double = struct.unpack_from(">HHHH", self._data, at)
        assert form == 4
        num = double // 2
        ends = struct.unpack_from(f">{num}H", self._data, at + 14)
        starts = struct.unpack_from(f">{num}H", self._data, at + 16 + double)
        deltas = struct.unpack_from(f">{num}h", self._data, at + 16 + 2 * double)
        ranges_at = at + 16 + 3 * double
        ranges = struct.unpack_from(f">{num}H", self._data, ranges_at)
        glyphs: dict[int, int] = {}
        for i in range(num):
            for code in range(starts[i], ends[i] + 1):
                if ranges[i]:
                    place = ranges_at + 2 * i + ranges[i] + 2 * (code - starts[i])
                    (glyph,) = struct.unpack_from(">H", self._data, place) if code != 0xFFFF else (0,)
                    glyphs[code] = (glyph + deltas[i]) & 0xFFFF if glyph else 0
                else:
                    glyphs[code] = (code + deltas[i]) & 0xFFFF
        return glyphs

    def width(self, text: str) -> float:
        """Return how wide a text is, in em."""
        return sum(self._widths.get(ord(sign), self._unknown) for sign in text)

    def _advance(self, glyph: int) -> int:
        place = min(glyph, self._num_metrics - 1)
        (advance,) = struct.unpack_from(">H", self._data, self._tables["hmtx"] + 4 * place)
        return int(advance)


@lru_cache(maxsize=1 << 16)
def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Return how wide a text is in the drawings' font, in points."""
    return _font(bold).width(text) * size


@cache
def _font(bold: bool) -> Font:
    return Font(font_file(bold=bold))
