"""The edges and sources of one rank's dataflow while they are found, and when they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.accesses import TOUCH, UPDATE
from truedag.tracer.merge.last_writers import Place
from truedag.tracer.merge.regions import extent
from truedag.tracer.merge.sorting import order_edges
from truedag.tracer.record.trace import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedRegion:
    """A named tensor that no recorded node made."""

    name: str
    role: str
    storage: int
    layout: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Something written before recording began; its node is -1 - its place in the list of sources."""

    role: str  # parameter, gradient, state, input
    name: str | None
    layout: int  # 0: of a whole storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataflow:
    """Edges of one rank as columns; `src` below 0 is a source.

    `layout` is the tensor that was read; 0 bytes: it only had to exist. `is_update`: `dst` then wrote it. They are in
    the order of `src`, `dst`, bytes and layout.
    """

    src: NDArray[np.int64]
    dst: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    layout: NDArray[np.int64]
    is_update: NDArray[np.bool_]
    sources: list[Source]


class Flow:
    """Collects edges and sources."""

    def __init__(self, layouts: Mapping[int, Layout]) -> None:
        self._layouts = layouts
        self._places: dict[tuple[int, int], Place] = {}
        self._columns: list[tuple[NDArray[np.int64], ...]] = []
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._sources: list[tuple[int, int, Source]] = []

    def place(self, layout: int, offset: int) -> Place:
        """Return where a tensor of a layout lies whose first element is at `offset`."""
        known = self._places.get((layout, offset))
        if known is None:
            where = extent(self._layouts[layout])
            known = self._places[layout, offset] = Place(
                layout=self._layouts[layout],
                offset=offset,
                begin=offset + where.low,
                end=offset + where.high,
                num_bytes=where.num_bytes,
            )
        return known

    def add_source(self, source: Source, generation: int, turn: int) -> int:
        """Add a source and return its node; sources are put in the order of generations, and turns in them."""
        self._sources.append((generation, turn, source))
        return -len(self._sources)

    def add(self, src: int, dst: int, count: int, layout: int, kind: int) -> None:
        """Add an edge."""
        self._rows.append((src, dst, count, layout, kind))

    def extend(self, *columns: NDArray[np.int64]) -> None:
        """Add edges: src, dst, bytes, layout, kind of the access."""
        self._columns.append(columns)

    def finish(self) -> Dataflow:
        """Return all edges but those of a node that reads what it wrote itself, through a second result."""
        rows = np.array(self._rows, np.int64).reshape(-1, 5)
        columns = [*self._columns, tuple(rows.T)]
        src, dst, count, layout, kind = (np.concatenate([part[i] for part in columns]) for i in range(5))
        src, sources = self._keep_read_sources(src)
        keep = src != dst
        if not keep.all():
            src, dst, count, layout, kind = (column[keep] for column in (src, dst, count, layout, kind))
        order = order_edges(src, dst, count, layout, kind)
        return Dataflow(
            src=src[order],
            dst=dst[order],
            num_bytes=count[order],
            layout=layout[order],
            is_update=np.isin(kind[order], (UPDATE, TOUCH)),
            sources=sources,
        )

    def _keep_read_sources(self, src: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[Source]]:
        """Drop sources that nobody read, but for parameters: an unused parameter is worth knowing."""
        read = np.zeros(len(self._sources) + 1, bool)
        read[-src[src < 0]] = True
        order = sorted(range(len(self._sources)), key=lambda place: self._sources[place][:2])
        kept = [i for i in order if self._sources[i][2].role == "parameter" or read[i + 1]]
        number = np.zeros(len(self._sources) + 1, np.int64)
        number[np.array(kept, np.int64) + 1] = -1 - np.arange(len(kept))
        return np.where(src < 0, number[np.maximum(-src, 0)], src), [self._sources[i][2] for i in kept]
