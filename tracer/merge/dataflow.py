"""One rank's dataflow: who reads what whom last wrote (DESIGN rule 3).

Theory of operation. The life of a StorageImpl is cut into generations: a fresh result begins one, and so does memory
that came from outside the dispatcher. A storage that moves, grows or shrinks stays what it was, with its writers.
Within a generation accesses are in program order. Where every write covers all that is ever touched, which is nearly
always, a read depends on the write before it, and NumPy finds that for all storages at once. Where writes are partial
(gradient buckets, caches, slices) the bytes are followed exactly (`last_writers`). What was read before anything wrote
it comes from before the recording, or, in memory that was made empty, from code that the dispatcher does not see: it
gets a source node, one for each named tensor (parameter, gradient, state) and one for what is left of a storage.

An empty tensor and a destination that is overwritten carry no bytes, yet the operator can't run before they exist:
that is an edge of 0 bytes from the node that made the storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.last_writers import LastWriters, Place
from truedag.tracer.merge.nodes import CUT, EMPTY, FRESH, HANDLE, NAMED, READ, TOUCH, UPDATE, WRITE, Accesses
from truedag.tracer.merge.regions import Extent, extent
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
    late: Sequence[NamedRegion] = (),
    exact: bool = False,
) -> Dataflow:
    """Return the data edges among a rank's nodes.

    Args:
        accesses: in program order; a node's reads come before its writes.
        layouts: the trace's layouts.
        storages: the trace's storages, as (StorageImpl, address, bytes).
        named: the named tensors of before the recording. Every parameter becomes a source, read or not.
        late: tensors that were named during the recording, by the NAMED accesses; those that no node had written by
            then are sources.
        exact: follow bytes everywhere; the result is the same, which a test holds.
    """
    order, generation = _generations(accesses, storages)
    kind, node = accesses.kind[order], accesses.node[order]
    storage, layout, offset = accesses.storage[order], accesses.layout[order], accesses.offset[order]
    extents = {number: extent(one) for number, one in layouts.items()}
    begin, end, dense, size = _hulls(layout, offset, extents)
    flow = _Flow(layouts, extents)
    starts = np.flatnonzero(np.diff(generation, prepend=-1))
    stops = np.append(starts[1:], len(generation)) if len(starts) else starts
    initial = _initial_regions(kind, storage, starts, storages, named)

    simple = np.zeros(len(generation), bool)
    if len(generation):
        low = np.minimum.reduceat(np.where(end > begin, begin, np.iinfo(np.int64).max), starts)
        high = np.maximum.reduceat(end, starts)
        is_write = (kind == WRITE) | (kind == FRESH)
        lengths = stops - starts
        covering = ~is_write | (dense & (begin <= np.repeat(low, lengths)) & (end >= np.repeat(high, lengths)))
        written = np.maximum.accumulate(np.where(is_write, np.arange(len(kind)), -1)) >= np.repeat(starts, lengths)
        known = ~np.isin(kind, (READ, UPDATE, TOUCH)) | (size == 0) | written
        begins_fresh = np.isin(kind[starts], (FRESH, EMPTY))
        fast = np.logical_and.reduceat(covering & known, starts) & begins_fresh & (not exact)
        simple = np.repeat(fast, lengths)
        _simple_edges(flow, simple, generation, kind, node, layout, size)
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if simple[start]:
            continue
        _exact_edges(
            flow,
            kind[start:stop].tolist(),
            node[start:stop].tolist(),
            layout[start:stop].tolist(),
            offset[start:stop].tolist(),
            initial.pop(start, []),
            late,
        )
    for regions in initial.values():
        for region in regions:
            if region.role == "parameter":
                flow.add_source(region.role, region.name, region.layout)
    return flow.finish()


def _impls(storages: Mapping[int, tuple[int, int, int]]) -> NDArray[np.int64]:
    """Number the StorageImpl of every storage."""
    impl_of = np.zeros(max(storages, default=0) + 1, np.int64)
    numbers: dict[int, int] = {}
    for number, (address, _, _) in storages.items():
        impl_of[number] = numbers.setdefault(address, len(numbers))
    return impl_of


def _generations(
    accesses: Accesses, storages: Mapping[int, tuple[int, int, int]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order the accesses by memory, then time, and number the generations."""
    impl = _impls(storages)[accesses.storage]
    order = np.lexsort((np.arange(len(impl)), impl))
    impl, kind = impl[order], accesses.kind[order]
    boundary = np.isin(kind, (FRESH, EMPTY, CUT))
    boundary[:1] = True
    boundary[1:] |= impl[1:] != impl[:-1]
    return order, np.cumsum(boundary) - 1


def _initial_regions(
    kind: NDArray[np.int64],
    storage: NDArray[np.int64],
    starts: NDArray[np.int64],
    storages: Mapping[int, tuple[int, int, int]],
    named: Sequence[NamedRegion],
) -> dict[int, list[NamedRegion]]:
    """Named tensors by where the generation starts that they were there before, or by -1 - n if there is none.

    It is the first of their StorageImpl, unless that one begins with new memory already.
    """
    impl_of = _impls(storages)
    first: dict[int, int] = {}
    for start, impl in zip(starts.tolist(), impl_of[storage[starts]].tolist(), strict=True):
        first.setdefault(impl, start if kind[start] not in (FRESH, EMPTY, CUT) else -1 - start)
    found: dict[int, list[NamedRegion]] = {}
    for region in named:
        impl = int(impl_of[region.storage])
        found.setdefault(first.get(impl, -1 - len(kind) - impl), []).append(region)
    return found


def _hulls(
    layout: NDArray[np.int64], offset: NDArray[np.int64], extents: Mapping[int, Extent]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """First byte, byte after the last, whether nothing lies between them that is not the tensor's, and its bytes."""
    table = np.zeros((max(extents, default=0) + 1, 3), np.int64)
    for number, one in extents.items():
        table[number] = one.low, one.high, one.num_bytes
    low, high, size = table[layout].T
    return offset + low, np.where(size > 0, offset + high, 0), (size > 0) & (size == high - low), size


def _simple_edges(
    flow: _Flow,
    simple: NDArray[np.bool_],
    generation: NDArray[np.int64],
    kind: NDArray[np.int64],
    node: NDArray[np.int64],
    layout: NDArray[np.int64],
    size: NDArray[np.int64],
) -> None:
    """Every read depends on the last write before it, every handle on the node that began the generation."""
    is_write = (kind == WRITE) | (kind == FRESH)
    position = np.arange(len(kind))
    last_write = np.maximum.accumulate(np.where(is_write, position, -1))
    first = np.searchsorted(generation, generation, side="left")
    reads = simple & np.isin(kind, (READ, UPDATE, TOUCH))
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
    late: Sequence[NamedRegion],
) -> None:
    """Follow one generation byte by byte."""
    owners = LastWriters()
    maker: int | None = None
    is_empty = False
    for tensor in initial:
        source = flow.add_source(tensor.role, tensor.name, tensor.layout)
        owners.write(flow.place(tensor.layout, tensor.offset), source)
    rest: int | None = None
    for kind, node, layout, offset in zip(kinds, nodes, layouts, offsets, strict=True):
        place = flow.place(layout, offset)
        if kind in (FRESH, EMPTY):
            maker, is_empty = node, kind == EMPTY
        if kind in (WRITE, FRESH):
            owners.write(place, node)
        elif kind in (EMPTY, CUT):
            continue
        elif kind == NAMED:
            if maker is None and place.num_bytes and not owners.read(place)[0]:
                tensor = late[-1 - node]
                owners.write(place, flow.add_source(tensor.role, tensor.name, tensor.layout))
        elif kind == HANDLE or place.num_bytes == 0:
            if maker is not None:
                flow.add(maker, node, 0, layout, kind)
        else:
            found, unknown = owners.read(place)
            if unknown and kind == TOUCH and maker is not None:
                found.setdefault(maker, 0)  # it may only have written there
            elif unknown and maker is not None and not is_empty:
                found[maker] = found.get(maker, 0) + unknown  # a fresh result that does not fill its storage
            elif unknown:
                if rest is None:
                    rest = flow.add_source("input", None, layout)
                found[rest] = found.get(rest, 0) + unknown
                if maker is not None:
                    found.setdefault(maker, 0)
            for writer, count in found.items():
                flow.add(writer, node, count, layout, kind)


class _Flow:
    """Collects edges and sources."""

    def __init__(self, layouts: Mapping[int, Layout], extents: Mapping[int, Extent]) -> None:
        self._layouts = layouts
        self._extents = extents
        self._places: dict[tuple[int, int], Place] = {}
        self._columns: list[tuple[NDArray[np.int64], ...]] = []
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._sources: list[Source] = []

    def place(self, layout: int, offset: int) -> Place:
        known = self._places.get((layout, offset))
        if known is None:
            where = self._extents[layout]
            known = self._places[layout, offset] = Place(
                layout=self._layouts[layout],
                offset=offset,
                begin=offset + where.low,
                end=offset + where.high,
                num_bytes=where.num_bytes,
            )
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
            is_update=np.isin(kind[keep][order], (UPDATE, TOUCH)),
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
