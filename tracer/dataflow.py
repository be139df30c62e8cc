"""One rank's dataflow: who reads what whom last wrote (DESIGN rule 3).

Theory of operation. A storage's life is cut into generations: a fresh result begins one, and so does the same memory
reappearing under another size. Within a generation accesses are in program order. Where every write covers all that
is ever touched, which is nearly always, a read depends on the write before it, and NumPy finds that for all storages
at once. Where writes are partial (gradient buckets, caches, slices) the bytes are followed exactly: a map from byte
runs to their last writer. What was read before anything wrote it comes from before the recording: it gets a source
node, one for each named tensor (parameter, gradient, state) and one for what is left of a storage.

An empty tensor and a destination that is overwritten carry no bytes, yet the operator can't run before they exist:
that is an edge of 0 bytes from the node that made the storage.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.nodes import FRESH, HANDLE, READ, UPDATE, WRITE, Accesses
from truedag.tracer.regions import Runs, num_bytes, runs
from truedag.tracer.trace import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedRegion:
    """A named tensor that was there before the recording."""

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

    `layout` is the tensor that was read; 0 bytes: it only had to exist. `is_update`: `dst` then wrote it.
    """

    src: NDArray[np.int64]
    dst: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    layout: NDArray[np.int64]
    is_update: NDArray[np.bool_]
    sources: list[Source]


def trace_dataflow(
    accesses: Accesses,
    *,
    layouts: Mapping[int, Layout],
    storages: Mapping[int, tuple[int, int, int]],
    named: Sequence[NamedRegion],
    exact: bool = False,
) -> Dataflow:
    """Return the data edges among a rank's nodes.

    Args:
        accesses: in program order; a node's reads come before its writes.
        layouts: the trace's layouts.
        storages: the trace's storages, as (StorageImpl, address, bytes).
        named: the named tensors of before the recording. Every parameter becomes a source, read or not.
        exact: follow bytes everywhere; the result is the same, which a test holds.
    """
    order, generation = _generations(accesses, storages)
    kind, node = accesses.kind[order], accesses.node[order]
    storage, layout, offset = accesses.storage[order], accesses.layout[order], accesses.offset[order]
    begin, end, dense, size = _hulls(layout, offset, layouts)
    flow = _Flow(layouts)
    starts = np.flatnonzero(np.diff(generation, prepend=-1))
    stops = np.append(starts[1:], len(generation)) if len(starts) else starts
    by_storage: dict[int, list[NamedRegion]] = {}
    for region in named:
        by_storage.setdefault(region.storage, []).append(region)
    first_of_storage = _first_generations(storage, starts)

    simple = np.zeros(len(generation), bool)
    if len(generation):
        low = np.minimum.reduceat(np.where(end > begin, begin, np.iinfo(np.int64).max), starts)
        high = np.maximum.reduceat(end, starts)
        is_write = (kind == WRITE) | (kind == FRESH)
        lengths = stops - starts
        covering = ~is_write | (dense & (begin <= np.repeat(low, lengths)) & (end >= np.repeat(high, lengths)))
        begins_fresh = kind[starts] == FRESH
        fast = np.logical_and.reduceat(covering, starts) & begins_fresh & (not exact)
        simple = np.repeat(fast, lengths)
        _simple_edges(flow, simple, generation, kind, node, layout, size)
    for start, stop in zip(starts, stops, strict=True):
        if simple[start]:
            continue
        initial = by_storage.get(int(storage[start]), []) if first_of_storage[int(storage[start])] == start else []
        _exact_edges(
            flow,
            kind[start:stop].tolist(),
            node[start:stop].tolist(),
            layout[start:stop].tolist(),
            offset[start:stop].tolist(),
            initial,
        )
    touched = {int(storage[start]) for start in starts if first_of_storage[int(storage[start])] == start}
    for place, regions in by_storage.items():
        if place not in touched:
            for region in regions:
                if region.role == "parameter":
                    flow.add_source(region.role, region.name, region.layout)
    return flow.finish()


def _generations(
    accesses: Accesses, storages: Mapping[int, tuple[int, int, int]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order the accesses by memory, then time, and number the generations."""
    impl_of = np.zeros(max(storages, default=0) + 1, np.int64)
    numbers: dict[int, int] = {}
    for number, (address, _, _) in storages.items():
        impl_of[number] = numbers.setdefault(address, len(numbers))
    impl = impl_of[accesses.storage]
    order = np.lexsort((np.arange(len(impl)), impl))
    impl, storage, kind = impl[order], accesses.storage[order], accesses.kind[order]
    boundary = np.ones(len(impl), bool)
    boundary[1:] = (impl[1:] != impl[:-1]) | (storage[1:] != storage[:-1]) | (kind[1:] == FRESH)
    return order, np.cumsum(boundary) - 1


def _first_generations(storage: NDArray[np.int64], starts: NDArray[np.int64]) -> dict[int, int]:
    """Where each storage's first generation starts: only that one can hold what was there before."""
    first: dict[int, int] = {}
    for start in starts.tolist():
        first.setdefault(int(storage[start]), start)
    return first


def _hulls(
    layout: NDArray[np.int64], offset: NDArray[np.int64], layouts: Mapping[int, Layout]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """First byte, byte after the last, whether nothing lies between them that is not the tensor's, and its bytes."""
    top = max(layouts, default=0) + 1
    low, high, dense, size = (
        np.zeros(top, np.int64),
        np.zeros(top, np.int64),
        np.zeros(top, bool),
        np.zeros(top, np.int64),
    )
    for number, one in layouts.items():
        region = runs(one, 0)
        if region:
            low[number], high[number] = region[0][0], region[-1][1]
        dense[number] = len(region) == 1
        size[number] = num_bytes(region)
    return offset + low[layout], np.where(size[layout] > 0, offset + high[layout], 0), dense[layout], size[layout]


def _simple_edges(
    flow: _Flow,
    simple: NDArray[np.bool_],
    generation: NDArray[np.int64],
    kind: NDArray[np.int64],
    node: NDArray[np.int64],
    layout: NDArray[np.int64],
    size: NDArray[np.int64],
) -> None:
    """Every read depends on the last write before it, every handle on the generation's first."""
    is_write = (kind == WRITE) | (kind == FRESH)
    position = np.arange(len(kind))
    last_write = np.maximum.accumulate(np.where(is_write, position, -1))
    first = np.searchsorted(generation, generation, side="left")
    reads = simple & ((kind == READ) | (kind == UPDATE))
    source = np.where(size > 0, last_write, first)
    flow.extend(node[source[reads]], node[reads], size[reads], layout[reads], kind[reads])
    handles = simple & (kind == HANDLE)
    nothing = np.zeros(int(handles.sum()), np.int64)
    flow.extend(node[first[handles]], node[handles], nothing, layout[handles], kind[handles])


def _exact_edges(
    flow: _Flow,
    kinds: list[int],
    nodes: list[int],
    layouts: list[int],
    offsets: list[int],
    initial: Sequence[NamedRegion],
) -> None:
    """Follow one generation byte by byte."""
    owners = _LastWriters()
    maker: int | None = None
    for tensor in initial:
        source = flow.add_source(tensor.role, tensor.name, tensor.layout)
        owners.write(flow.region(tensor.layout, tensor.offset), source)
    rest: int | None = None
    for kind, node, layout, offset in zip(kinds, nodes, layouts, offsets, strict=True):
        region = flow.region(layout, offset)
        if kind in (WRITE, FRESH):
            if kind == FRESH:
                maker = node
            owners.write(region, node)
        elif kind == HANDLE or not region:
            if maker is not None:
                flow.add(maker, node, 0, layout, kind)
        else:
            found, unknown = owners.read(region)
            if unknown and maker is not None:
                found[maker] = found.get(maker, 0) + unknown  # made without content there: empty memory
            elif unknown:
                if rest is None:
                    rest = flow.add_source("input", None, layout)
                found[rest] = found.get(rest, 0) + unknown
            for writer, count in found.items():
                flow.add(writer, node, count, layout, kind)


class _LastWriters:
    """A map from byte runs to who wrote them last: sorted, disjoint."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._writers: list[int] = []

    def write(self, region: Runs, writer: int) -> None:
        for begin, end in region:
            low, high = self._span(begin, end)
            begins, ends, writers = [begin], [end], [writer]
            if low < high and self._begins[low] < begin:
                begins.insert(0, self._begins[low])
                ends.insert(0, begin)
                writers.insert(0, self._writers[low])
            if low < high and self._ends[high - 1] > end:
                begins.append(end)
                ends.append(self._ends[high - 1])
                writers.append(self._writers[high - 1])
            self._begins[low:high], self._ends[low:high], self._writers[low:high] = begins, ends, writers

    def read(self, region: Runs) -> tuple[dict[int, int], int]:
        """Return the bytes read of each writer, and the bytes that nobody wrote."""
        found: dict[int, int] = {}
        unknown = 0
        for begin, end in region:
            covered = 0
            low, high = self._span(begin, end)
            for i in range(low, high):
                count = min(end, self._ends[i]) - max(begin, self._begins[i])
                found[self._writers[i]] = found.get(self._writers[i], 0) + count
                covered += count
            unknown += end - begin - covered
        return found, unknown

    def _span(self, begin: int, end: int) -> tuple[int, int]:
        """Return the range of runs that overlap [begin, end)."""
        low = bisect_right(self._ends, begin)
        high = low
        while high < len(self._begins) and self._begins[high] < end:
            high += 1
        return low, high


class _Flow:
    """Collects edges and sources."""

    def __init__(self, layouts: Mapping[int, Layout]) -> None:
        self._layouts = layouts
        self._regions: dict[tuple[int, int], Runs] = {}
        self._columns: list[tuple[NDArray[np.int64], ...]] = []
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._sources: list[Source] = []

    def region(self, layout: int, offset: int) -> Runs:
        known = self._regions.get((layout, offset))
        if known is None:
            known = self._regions[layout, offset] = runs(self._layouts[layout], offset)
        return known

    def add_source(self, role: str, name: str | None, layout: int) -> int:
        self._sources.append(Source(role=role, name=name, layout=layout))
        return -len(self._sources)

    def add(self, src: int, dst: int, count: int, layout: int, kind: int) -> None:
        self._rows.append((src, dst, count, layout, kind))

    def extend(self, *columns: NDArray[np.int64]) -> None:
        self._columns.append(columns)

    def finish(self) -> Dataflow:
        rows = np.array(self._rows, np.int64).reshape(-1, 5)
        columns = [*self._columns, tuple(rows.T)]
        src, dst, count, layout, kind = (np.concatenate([part[i] for part in columns]) for i in range(5))
        keep = src != dst  # a node that reads what it wrote itself, through a second result
        src, sources = self._keep_read_sources(src)
        order = np.lexsort((kind[keep], layout[keep], src[keep], dst[keep]))
        return Dataflow(
            src=src[keep][order],
            dst=dst[keep][order],
            num_bytes=count[keep][order],
            layout=layout[keep][order],
            is_update=kind[keep][order] == UPDATE,
            sources=sources,
        )

    def _keep_read_sources(self, src: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[Source]]:
        """Drop sources that nobody read, but for parameters: an unused parameter is worth knowing."""
        read = set(src[src < 0].tolist())
        kept = [i for i, one in enumerate(self._sources) if one.role == "parameter" or -1 - i in read]
        number = np.zeros(len(self._sources) + 1, np.int64)
        for new, old in enumerate(kept):
            number[old] = -1 - new
        return np.where(src < 0, number[-1 - np.minimum(src, -1)], src), [self._sources[i] for i in kept]
