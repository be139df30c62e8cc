"""One rank's dataflow: who reads what whom last wrote (DESIGN rule 3).

Theory of operation. The life of a StorageImpl is cut into generations: a fresh result begins one, and so does memory
that came from outside the dispatcher. A storage that moves, grows or shrinks stays what it was, with its writers.
Within a generation accesses are in program order, and there are three ways to follow them, each for all generations of
its kind at once but the last, and all with the same result, which a test holds:

- Where every write covers all that is ever touched, which is most of them, a read depends on the write before it.
- Where writes are runs of bytes (gradient buckets, caches, slices, what was there before the recording), memory is cut
  wherever an access begins or ends, and between the cuts it is as above (`pieces`).
- Where they are neither (a column of a matrix), the bytes are followed one generation after the other (`last_writers`).

What was read before anything wrote it comes from before the recording, or, in memory that was made empty, from code
that the dispatcher does not see: it gets a source node, one for each named tensor (parameter, gradient, state) and one
for what is left of a storage.

An empty tensor and a destination that is overwritten carry no bytes, yet the operator can't run before they exist:
that is an edge of 0 bytes from the node that made the storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.accesses import CUT, EMPTY, FRESH, HANDLE, NAMED, TOUCH, WRITE, Accesses
from truedag.tracer.merge.flow import Dataflow, Flow, NamedRegion, Source
from truedag.tracer.merge.last_writers import LastWriters
from truedag.tracer.merge.pieces import Generations, piece_edges
from truedag.tracer.merge.regions import Extent, extent
from truedag.tracer.merge.sorting import stable_order
from truedag.tracer.record.trace import Layout

__all__ = ["Dataflow", "NamedRegion", "Source", "trace_dataflow"]


def trace_dataflow(
    accesses: Accesses,
    *,
    layouts: Mapping[int, Layout],
    impls: NDArray[np.int64],
    named: Sequence[NamedRegion],
    late: Sequence[NamedRegion] = (),
    exact: bool = False,
) -> Dataflow:
    """Return the data edges among a rank's nodes.

    Args:
        accesses: in program order; a node's reads come before its writes.
        layouts: the trace's layouts.
        impls: [storages + 1] the StorageImpl of each storage by number, as any number.
        named: the named tensors of before the recording. Every parameter becomes a source, read or not.
        late: tensors that were named during the recording, by the NAMED accesses; those that no node had written by
            then are sources.
        exact: follow bytes everywhere, generation by generation.
    """
    flow = Flow(layouts)
    rows = _generations(accesses, impls, {number: extent(one) for number, one in layouts.items()})
    initial, unread = _initial_regions(rows, impls, named)
    simple = np.zeros(len(rows.starts), bool)
    pieced = simple
    if not exact and len(rows.starts):
        simple = _simple_generations(rows)
        _simple_edges(flow, rows, np.repeat(simple, rows.lengths))
        pieced = piece_edges(flow, rows, ~simple, initial, late)
    for generation in np.flatnonzero(~simple & ~pieced).tolist():
        _exact_edges(flow, rows, generation, initial.get(generation, ()), late)
    for region in unread:
        if region.role == "parameter":
            flow.add_source(Source(role=region.role, name=region.name, layout=region.layout), len(rows.starts), 0)
    return flow.finish()


def _generations(accesses: Accesses, impls: NDArray[np.int64], extents: Mapping[int, Extent]) -> Generations:
    """Order the accesses by memory, then time, and number the generations."""
    impl = impls[accesses.storage]
    order = stable_order(impl)
    impl, kind = impl[order], accesses.kind[order]
    boundary = (kind == FRESH) | (kind == EMPTY) | (kind == CUT)
    boundary[:1] = True
    boundary[1:] |= impl[1:] != impl[:-1]
    table = np.zeros((3, max(extents, default=0) + 1), np.int64)
    for number, one in extents.items():
        table[:, number] = one.low, one.high, one.num_bytes
    layout = accesses.layout[order]
    offset = accesses.offset[order]
    low, high, size = (column[layout] for column in table)
    starts = np.flatnonzero(boundary)
    return Generations(
        impl=impl[starts],
        kind=kind,
        node=accesses.node[order],
        layout=layout,
        offset=offset,
        begin=offset + low,
        end=np.where(size > 0, offset + high, 0),
        num_bytes=size,
        is_dense=(size > 0) & (size == high - low),
        starts=starts,
        lengths=np.diff(starts, append=len(kind)),
        extents=extents,
    )


def _initial_regions(
    rows: Generations, impls: NDArray[np.int64], named: Sequence[NamedRegion]
) -> tuple[dict[int, list[NamedRegion]], list[NamedRegion]]:
    """Named tensors by the generation that they were there before, and those that were there before none.

    It is the first of their StorageImpl, unless that one begins with new memory already.
    """
    first: dict[int, int] = {}
    wanted = {int(impls[region.storage]) for region in named}
    here = np.flatnonzero(np.isin(rows.impl, np.array(sorted(wanted), np.int64)))
    for generation in here.tolist():
        first.setdefault(int(rows.impl[generation]), generation)
    found: dict[int, list[NamedRegion]] = {}
    unread: dict[int, list[NamedRegion]] = {}
    for region in named:
        impl = int(impls[region.storage])
        generation = first.get(impl, -1)
        if generation >= 0 and rows.kind[rows.starts[generation]] not in (FRESH, EMPTY, CUT):
            found.setdefault(generation, []).append(region)
        else:
            unread.setdefault(impl, []).append(region)
    return found, [region for regions in unread.values() for region in regions]


def _simple_generations(rows: Generations) -> NDArray[np.bool_]:
    """Which generations begin with a fresh result and are written as a whole before each read."""
    kind, starts = rows.kind, rows.starts
    low = np.minimum.reduceat(np.where(rows.end > rows.begin, rows.begin, np.iinfo(np.int64).max), starts)
    high = np.maximum.reduceat(rows.end, starts)
    is_write = (kind == WRITE) | (kind == FRESH)
    covers = rows.is_dense & (rows.begin <= np.repeat(low, rows.lengths)) & (rows.end >= np.repeat(high, rows.lengths))
    written = np.maximum.accumulate(np.where(is_write, np.arange(len(kind)), -1)) >= np.repeat(starts, rows.lengths)
    known = ~rows.is_read | (rows.num_bytes == 0) | written
    begins_fresh = (kind[starts] == FRESH) | (kind[starts] == EMPTY)
    found: NDArray[np.bool_] = np.logical_and.reduceat((covers | ~is_write) & known, starts) & begins_fresh
    return found


def _simple_edges(flow: Flow, rows: Generations, simple: NDArray[np.bool_]) -> None:
    """Every read depends on the last write before it, every handle on the node that began the generation."""
    kind, node = rows.kind, rows.node
    is_write = (kind == WRITE) | (kind == FRESH)
    last_write = np.maximum.accumulate(np.where(is_write, np.arange(len(kind)), -1))
    first = np.repeat(rows.starts, rows.lengths)
    reads = np.flatnonzero(simple & rows.is_read)
    source = np.where(rows.num_bytes[reads] > 0, last_write[reads], first[reads])
    flow.extend(node[source], node[reads], rows.num_bytes[reads], rows.layout[reads], kind[reads])
    handles = np.flatnonzero(simple & (kind == HANDLE))
    nothing = np.zeros(len(handles), np.int64)
    flow.extend(node[first[handles]], node[handles], nothing, rows.layout[handles], kind[handles])


def _exact_edges(
    flow: Flow,
    rows: Generations,
    generation: int,
    initial: Sequence[NamedRegion],
    late: Sequence[NamedRegion],
) -> None:
    """Follow one generation byte by byte."""
    owners = LastWriters()
    maker: int | None = None
    is_empty = False
    for place, tensor in enumerate(initial):
        source = flow.add_source(Source(role=tensor.role, name=tensor.name, layout=tensor.layout), generation, place)
        owners.write(flow.place(tensor.layout, tensor.offset), source)
    rest: int | None = None
    start = int(rows.starts[generation])
    here = slice(start, start + int(rows.lengths[generation]))
    columns = (column[here].tolist() for column in (rows.kind, rows.node, rows.layout, rows.offset))
    for turn, (kind, node, layout, offset) in enumerate(zip(*columns, strict=True), len(initial)):
        place_of = flow.place(layout, offset)
        if kind in (FRESH, EMPTY):
            maker, is_empty = node, kind == EMPTY
        if kind in (WRITE, FRESH):
            owners.write(place_of, node)
        elif kind in (EMPTY, CUT):
            continue
        elif kind == NAMED:
            if maker is None and place_of.num_bytes and not owners.read(place_of)[0]:
                told = late[-1 - node]
                before = Source(role=told.role, name=told.name, layout=told.layout)
                owners.write(place_of, flow.add_source(before, generation, turn))
        elif kind == HANDLE or place_of.num_bytes == 0:
            if maker is not None:
                flow.add(maker, node, 0, layout, kind)
        else:
            found, unknown = owners.read(place_of)
            if unknown and kind == TOUCH and maker is not None:
                found.setdefault(maker, 0)  # it may only have written there
            elif unknown and maker is not None and not is_empty:
                found[maker] = found.get(maker, 0) + unknown  # a fresh result that does not fill its storage
            elif unknown:
                if rest is None:
                    rest = flow.add_source(Source(role="input", name=None, layout=layout), generation, turn)
                found[rest] = found.get(rest, 0) + unknown
                if maker is not None:
                    found.setdefault(maker, 0)
            for writer, count in found.items():
                flow.add(writer, node, count, layout, kind)
