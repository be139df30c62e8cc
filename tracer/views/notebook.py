"""What a notebook shows of a drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

_MAX_SVG_BYTES = 4_000_000  # more makes a notebook slow to open


class Drawn(Protocol):
    """Something that was drawn into two files."""

    @property
    def svg(self) -> Path:
        """The picture to zoom into."""
        ...

    @property
    def png(self) -> Path:
        """The picture to look at."""
        ...


class Picture:
    """Shows itself in a notebook: as SVG, as PNG where the SVG is large; for classes that are `Drawn`."""

    __slots__ = ()

    def _repr_svg_(self: Drawn) -> str | None:
        return self.svg.read_text(encoding="utf-8") if self.svg.stat().st_size <= _MAX_SVG_BYTES else None

    def _repr_png_(self: Drawn) -> bytes | None:
        return self.png.read_bytes() if self.svg.stat().st_size > _MAX_SVG_BYTES else None
