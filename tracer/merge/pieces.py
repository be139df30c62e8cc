"""Dataflow of memory that is read and written in runs of bytes: cut at every end of a run, and followed piece by piece.

A generation's memory is cut wherever one of its accesses begins or ends. Between two cuts a write covers all or
nothing, so a read of a piece depends on the last write of that piece before it. Reads of several pieces are put
together again: the bytes of a tensor by who wrote them. What is read with gaps (a column) can be followed as long as it
lies between two cuts. All generations are done at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.accesses import EMPTY, FRESH, HANDLE, NAMED, READ, TOUCH, UPDATE, WRITE
from truedag.tracer.merge.flow import Flow, NamedRegion, Source
from truedag.tracer.merge.regions import Extent
from truedag.tracer.merge.sorting import order_by, ramp, stable_order

# A generation whose accesses have more pieces than this, on average, is better followed run by run.
_MANY_PIECES = 256
_NOBODY = np.iinfo(np.int64).min


@dataclass(frozen=True, slots=True, kw_only=True)
class Generations:
    """All accesses of a rank by memory, then time, and the generations that they make up.

    Bytes `begin` to `end` of a storage are between the first and the last of the tensor's; 0, 0 for an empty one.
    """

    impl: NDArray[np.int64]  # [generations]
    starts: NDArray[np.int64]  # [generations] the first access
    lengths: NDArray[np.int64]  # [generations] how many
    kind: NDArray[np.int64]
    node: NDArray[np.int64]
    layout: NDArray[np.int64]
    offset: NDArray[np.int64]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    is_dense: NDArray[np.bool_]
    extents: Mapping[int, Extent]

    @property
    def is_read(self) -> NDArray[np.bool_]:
        """[accesses] Which read what is there, or may."""
        found: NDArray[np.bool_] = (self.kind == READ) | (self.kind == UPDATE) | (self.kind == TOUCH)
        return found


def piece_edges(
    flow: Flow,
    rows: Generations,
    wanted: NDArray[np.bool_],
    initial: Mapping[int, Sequence[NamedRegion]],
    late: Sequence[NamedRegion],
) -> NDArray[np.bool_]:
    """Find the edges of all generations that can be followed piece by piece; return which these are.

    Args:
        flow: takes edges and sources.
        rows: all accesses.
        wanted: [generations] which are asked for.
        initial: the named tensors that were there before, by generation.
        late: what was named on the way, by the NAMED accesses.
    """
    names, able = _effective_names(rows, wanted, initial)
    able &= _is_dense_where_written(rows, names, initial)
    runs = _runs(rows, able, names, initial)
    if len(runs.row):
        cut = _cut(runs)
        size = len(rows.starts)
        able[runs.generation[(cut.count > 1) & ~runs.is_dense]] = False
        pieces = np.bincount(runs.generation, cut.count, minlength=size)
        able &= pieces <= _MANY_PIECES * np.bincount(runs.generation, minlength=size)
        if not able[runs.generation].all():
            runs = _runs(rows, able, names, initial)
            cut = _cut(runs)
        if len(runs.row):
            _follow(flow, rows, runs, cut, initial, late)
    _follow_handles(flow, rows, able)
    return able


@dataclass(frozen=True, slots=True, kw_only=True)
class _Runs:
    """Reads and writes of bytes by generation, then time; named tensors of before the recording come first."""

    generation: NDArray[np.int64]
    row: NDArray[np.int64]  # the access; of a named tensor -1 - its place among the generation's
    is_write: NDArray[np.bool_]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    num_bytes: NDArray[np.int64]

    @property
    def is_dense(self) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self.end - self.begin == self.num_bytes
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """Where memory is cut, and of each run the first of its pieces and how many it has."""

    points: NDArray[np.int64]  # a piece goes from its point to the next
    first: NDArray[np.int64]
    count: NDArray[np.int64]


def _has_maker(rows: Generations) -> NDArray[np.bool_]:
    """[generations] Which begin with a result."""
    kind = rows.kind[rows.starts]
    found: NDArray[np.bool_] = (kind == FRESH) | (kind == EMPTY)
    return found


def _effective_names(
    rows: Generations, wanted: NDArray[np.bool_], initial: Mapping[int, Sequence[NamedRegion]]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the NAMED accesses that say what lies in memory that nobody wrote, and the generations without doubt.

    Where something was written before, or two names were said, that depends on the bytes.
    """
    generation = np.repeat(np.arange(len(rows.starts)), rows.lengths)
    able = wanted.copy()
    named = np.flatnonzero((rows.kind == NAMED) & (rows.num_bytes > 0))
    named = named[(wanted & ~_has_maker(rows))[generation[named]]]
    if not len(named):
        return named, able
    is_write = (rows.kind == WRITE) | (rows.kind == FRESH)
    last_write = np.maximum.accumulate(np.where(is_write, np.arange(len(is_write)), -1))
    of = generation[named]
    doubtful = last_write[named] >= rows.starts[of]
    doubtful |= np.isin(of, np.array(sorted(initial), np.int64))
    doubtful[1:] |= of[1:] == of[:-1]
    able[of[doubtful]] = False
    return named[able[of]], able


def _is_dense_where_written(
    rows: Generations, names: NDArray[np.int64], initial: Mapping[int, Sequence[NamedRegion]]
) -> NDArray[np.bool_]:
    """[generations] Which are written in runs only."""
    is_write = (rows.kind == WRITE) | (rows.kind == FRESH)
    is_write[names] = True
    gaps = is_write & ~rows.is_dense & (rows.num_bytes > 0)
    found: NDArray[np.bool_] = ~np.logical_or.reduceat(gaps, rows.starts)
    for generation, regions in initial.items():
        where = [rows.extents[region.layout] for region in regions]
        found[generation] &= all(one.is_dense or one.num_bytes == 0 for one in where)
    return found


def _runs(
    rows: Generations, able: NDArray[np.bool_], names: NDArray[np.int64], initial: Mapping[int, Sequence[NamedRegion]]
) -> _Runs:
    generation = np.repeat(np.arange(len(rows.starts)), rows.lengths)
    is_write = (rows.kind == WRITE) | (rows.kind == FRESH)
    is_write[names] = True
    row = np.flatnonzero((is_write | rows.is_read) & (rows.num_bytes > 0) & able[generation])
    before = [
        (one, -1 - place, region.offset + where.low, region.offset + where.high)
        for one in sorted(initial)
        if able[one]
        for place, region in enumerate(initial[one])
        if (where := rows.extents[region.layout]).num_bytes
    ]
    columns = np.array(before, np.int64).reshape(-1, 4).T
    of = np.concatenate((columns[0], generation[row]))
    order = stable_order(of)
    begin, end = np.concatenate((columns[2], rows.begin[row])), np.concatenate((columns[3], rows.end[row]))
    return _Runs(
        generation=of[order],
        row=np.concatenate((columns[1], row))[order],
        is_write=np.concatenate((np.ones(len(before), bool), is_write[row]))[order],
        begin=begin[order],
        end=end[order],
        num_bytes=np.concatenate((columns[3] - columns[2], rows.num_bytes[row]))[order],
    )


def _cut(runs: _Runs) -> _Cut:
    # One number for generation and byte; where that is too large, bytes are numbered first.
    low, high = int(runs.begin.min(initial=0)), int(runs.end.max(initial=0))
    begin, end = runs.begin - low, runs.end - low
    values = None
    width = high - low + 1
    if int(runs.generation.max(initial=0)) >= (1 << 62) // width:
        values, place = np.unique(np.concatenate((begin, end)), return_inverse=True)
        begin, end = place[: len(begin)], place[len(begin) :]
        width = len(values)
    begin = runs.generation * width + begin
    end = runs.generation * width + end
    points = np.sort(np.concatenate((begin, end)))
    points = points[np.diff(points, prepend=-1) != 0]
    first = np.searchsorted(points, begin)
    count = np.searchsorted(points, end) - first
    points %= width
    return _Cut(points=points if values is None else values[points], first=first, count=count)


def _follow(
    flow: Flow,
    rows: Generations,
    runs: _Runs,
    cut: _Cut,
    initial: Mapping[int, Sequence[NamedRegion]],
    late: Sequence[NamedRegion],
) -> None:
    writer = _writers(flow, rows, runs, initial, late)
    run = np.repeat(np.arange(len(runs.row)), cut.count)
    piece = np.repeat(cut.first, cut.count) + ramp(cut.count)
    order = stable_order(piece)
    run, piece = run[order], piece[order]
    is_write = runs.is_write[run]
    place = np.arange(len(run))
    last = np.maximum.accumulate(np.where(is_write, place, -1))
    first = np.maximum.accumulate(np.where(np.diff(piece, prepend=-1) != 0, place, 0))
    reads = np.flatnonzero(~is_write)
    known = last[reads] >= first[reads]
    by = np.where(known, writer[run[np.maximum(last[reads], 0)]], _NOBODY)
    size = np.append(np.diff(cut.points), 0)[piece[reads]]
    run = run[reads]
    size = np.where(runs.is_dense[run], size, runs.num_bytes[run])
    run, by, size = _explain(flow, rows, runs, run, by, size, initial)
    run, by, size = _sum_up(run, by, size)
    row = runs.row[run]
    flow.extend(by, rows.node[row], size, rows.layout[row], rows.kind[row])


def _writers(
    flow: Flow,
    rows: Generations,
    runs: _Runs,
    initial: Mapping[int, Sequence[NamedRegion]],
    late: Sequence[NamedRegion],
) -> NDArray[np.int64]:
    """Who writes a run: its node, or the source that stands for what was there before."""
    writer = rows.node[np.maximum(runs.row, 0)]
    for run in np.flatnonzero((runs.row < 0) | (runs.is_write & (writer < 0))).tolist():
        generation, row = int(runs.generation[run]), int(runs.row[run])
        before = initial.get(generation, ())
        if row < 0:
            region, turn = before[-1 - row], -1 - row
        else:
            region, turn = late[-1 - int(writer[run])], len(before) + row - int(rows.starts[generation])
        writer[run] = flow.add_source(
            Source(role=region.role, name=region.name, layout=region.layout), generation, turn
        )
    return writer


def _explain(
    flow: Flow,
    rows: Generations,
    runs: _Runs,
    run: NDArray[np.int64],
    by: NDArray[np.int64],
    size: NDArray[np.int64],
    initial: Mapping[int, Sequence[NamedRegion]],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Say who stands for what nobody wrote: the maker of the memory, or a source for the rest of it."""
    open_ = np.flatnonzero(by == _NOBODY)
    if not len(open_):
        return run, by, size
    generation, row = runs.generation[run[open_]], runs.row[run[open_]]
    maker = np.where(_has_maker(rows), rows.node[rows.starts], _NOBODY)[generation]
    has_maker = maker != _NOBODY
    is_touch = has_maker & (rows.kind[row] == TOUCH)  # it may only have written there
    is_filled = has_maker & ~is_touch & (rows.kind[rows.starts[generation]] == FRESH)
    by, size = by.copy(), size.copy()
    by[open_] = maker  # a fresh result that does not fill its storage
    size[open_[is_touch]] = 0
    rest = np.flatnonzero(~is_touch & ~is_filled)
    order = rest[order_by(generation[rest], row[rest])]
    new = np.flatnonzero(np.diff(generation[order], prepend=-1) != 0)
    sources = np.zeros(len(rows.starts), np.int64)
    for one in order[new].tolist():
        here, first = int(generation[one]), int(row[one])
        turn = len(initial.get(here, ())) + first - int(rows.starts[here])
        sources[here] = flow.add_source(Source(role="input", name=None, layout=int(rows.layout[first])), here, turn)
    by[open_[rest]] = sources[generation[rest]]
    made = rest[has_maker[rest]]  # it had to exist
    return (
        np.concatenate((run, run[open_[made]])),
        np.concatenate((by, maker[made])),
        np.concatenate((size, np.zeros(len(made), np.int64))),
    )


def _sum_up(
    run: NDArray[np.int64], by: NDArray[np.int64], size: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Add up the bytes that one read has from one writer."""
    several = np.bincount(run)[run] > 1
    if not several.any():
        return run, by, size
    some = np.flatnonzero(several)
    some = some[order_by(run[some], by[some])]
    begins = np.flatnonzero((np.diff(run[some], prepend=-1) != 0) | (np.diff(by[some], prepend=0) != 0))
    sums = np.add.reduceat(size[some], begins)
    once = ~several
    return (
        np.concatenate((run[once], run[some][begins])),
        np.concatenate((by[once], by[some][begins])),
        np.concatenate((size[once], sums)),
    )


def _follow_handles(flow: Flow, rows: Generations, able: NDArray[np.bool_]) -> None:
    """Lead from the node that made a memory to all that only need it to exist."""
    chosen = np.repeat(able & _has_maker(rows), rows.lengths)
    here = np.flatnonzero(chosen & ((rows.kind == HANDLE) | (rows.is_read & (rows.num_bytes == 0))))
    maker = rows.node[np.repeat(rows.starts, rows.lengths)[here]]
    flow.extend(maker, rows.node[here], np.zeros(len(here), np.int64), rows.layout[here], rows.kind[here])
