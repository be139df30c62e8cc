"""Read a trace file (`format.py`) into columns.

Theory of operation. The file keeps what cannot be computed: an event names its call, and its tensors and its
communication are the next of its thread. The reader sums up whose they are, takes operator and arguments from the call,
and gives every event and tensor a row with all of it, in whole arrays (the derived dtypes `EVENTS` and `REFS`).

A reader trusts nothing in the file: what indexes something is checked before. A file whose end is missing (a killed
rank, a recording still running, a copy that broke off) is read as far as it is complete, and says so: a thread ends
before its first event that names what is not there. In a file that the recorder closed and that has lost no end, that
is an error, but for a thread's last event: a recorder that runs out of room stops there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.errors import EmptyTraceError, TraceError
from truedag.tracer.record import format as layout
from truedag.tracer.record.chunks import TraceContent, broken, read_chunks
from truedag.tracer.record.format import ChunkKind, EventFlags
from truedag.tracer.record.tables import Calls, Layout, Tables, read_tables

__all__ = ["EVENTS", "REFS", "Layout", "ThreadTrace", "Trace", "read_trace"]

# `sequence`, `backward_sequence` -1: none; `first_ref` into the thread's refs; `comm` in its comms plus 1, 0: none.
EVENTS = np.dtype(
    [
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
        ("sequence", "<i8"),
        ("backward_sequence", "<i8"),
        ("first_ref", "<i8"),
        ("fwd_thread", "<u4"),
        ("op", "<u4"),
        ("label", "<u4"),
        ("context", "<u4"),
        ("flags", "<u4"),
        ("num_inputs", "<u4"),
        ("num_outputs", "<u4"),
        ("comm", "<u4"),
    ]
)
# `storage` and `layout` 0: memory that cannot be named.
REFS = np.dtype([("offset_bytes", "<i8"), ("storage", "<u4"), ("layout", "<u4"), ("arg", "<u2"), ("element", "<u2")])


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadTrace:
    """One thread's records as structured arrays, events and frees in the order of their ends.

    `events` and `refs` are `EVENTS` and `REFS`, the others `format.COMM`, `WORK`, `WAIT`, `FREE` and `PLACE`. A work's
    operator is 0 if it is unknown, a wait's communication if it was not recorded. `autograd_thread` is what events call
    this thread in `fwd_thread`, -1 if unknown.
    """

    thread: int
    autograd_thread: int
    os_thread: int  # 0: unknown
    pthread: int  # pthread_t, 0: unknown
    events: NDArray[np.void]
    refs: NDArray[np.void]
    comms: NDArray[np.void]
    works: NDArray[np.void]
    waits: NDArray[np.void]
    frees: NDArray[np.void]
    places: NDArray[np.void]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One rank's recording.

    `closed`: the recorder stopped in good order and nothing is missing. `truncated`: what is, '' if nothing; a file
    that is still being written, or whose process was killed, may well have lost nothing.
    """

    path: Path
    closed: bool
    truncated: str
    meta: dict[str, Any]
    threads: list[ThreadTrace]
    ops: dict[int, dict[str, Any]]
    layouts: dict[int, Layout]
    storage_records: NDArray[np.void]  # `format.STORAGE`, as first seen; the first is number 1
    groups: dict[int, dict[str, Any]]
    group_ranks: dict[str, dict[str, Any]]  # group name -> its global ranks in group order, its axis or None
    labels: dict[int, dict[str, Any]]
    contexts: dict[int, dict[str, Any]]
    lanes: list[dict[str, Any]]  # what was counted of each group's messages
    clock_samples: list[dict[str, Any]]  # how this host's clock compared with others', as CLOCK entries tell it
    named_tensors: list[dict[str, Any]]

    @property
    def rank(self) -> int:
        """The rank that recorded it."""
        return int(self.meta["rank"])

    @property
    def storages(self) -> dict[int, tuple[int, int, int]]:
        """The storages by number, as (StorageImpl, data address, bytes). Made anew at each call."""
        return dict(enumerate(self.storage_records.tolist(), 1))


def read_trace(path: Path) -> Trace:
    """Read a trace file, compressed by gzip or not, also while it is being written.

    Raises:
        EmptyTraceError: its rank ended before it could say which rank it was, and recorded nothing.
        TraceError: the file is missing, is no trace, is of another version, or is broken (with the offset).
    """
    content = read_chunks(path)
    whole = content.closed and not content.truncated
    tables = read_tables(path, content.tables, whole=not content.truncated)
    if "rank" not in tables.meta or "world_size" not in tables.meta:
        if not any(len(records.rows) for records in content.records.values()):
            raise EmptyTraceError(f"{path} holds nothing: its rank ended before recording began")
        raise TraceError(f"{path} is broken: it holds records and does not say which rank recorded them")
    threads, missing = _Assembly(path, content, tables, strict=whole).threads()
    num_storages = len(content.storages.rows)
    return Trace(
        path=path,
        closed=whole and not missing,
        truncated="; ".join(said for said in (content.truncated, missing) if said),
        meta=tables.meta,
        threads=threads,
        ops=tables.ops,
        layouts=tables.layouts,
        storage_records=content.storages.rows,
        groups=tables.groups,
        group_ranks=tables.group_ranks,
        labels=tables.labels,
        contexts=tables.contexts,
        lanes=tables.lanes,
        clock_samples=tables.clock_samples,
        named_tensors=[
            told
            for told in tables.named_tensors
            if 0 < told["storage"] <= num_storages and told["layout"] in tables.layouts
        ],
    )


class _Assembly:
    """Puts the threads together from their records and the tables."""

    def __init__(self, path: Path, content: TraceContent, tables: Tables, *, strict: bool) -> None:
        self._path = path
        self._records = content.records
        self._num_storages = len(content.storages.rows)
        self._tables = tables
        self._strict = strict
        self._is_layout = np.zeros(max(tables.layouts, default=0) + 1, bool)
        self._is_layout[list(tables.layouts)] = True
        self._groups = np.array(sorted(tables.groups), np.int64)

    def threads(self) -> tuple[list[ThreadTrace], str]:
        """Return the threads, and what is missing at their ends."""
        numbers = sorted({thread for _, thread in self._records})
        parts = {}
        missing = []
        for thread in numbers:
            *parts[thread], lost = self._events(thread)
            if lost:
                missing.append(lost)
        no_ids = np.zeros(0, np.uint32)
        comm_ids = np.concatenate([no_ids, *(comms["id"] for _, _, comms in parts.values())])
        threads = []
        for thread in numbers:
            events, refs, comms = parts[thread]
            told = self._tables.threads.get(thread, {})
            works, waits = (self._rows(kind, thread) for kind in (ChunkKind.WORKS, ChunkKind.WAITS))
            works = works[np.isin(works["comm_id"], comm_ids)]
            places = self._rows(ChunkKind.PLACES, thread)
            works["op"][~np.isin(works["op"], list(self._tables.ops))] = 0
            threads.append(
                ThreadTrace(
                    thread=thread,
                    autograd_thread=told["autograd_thread"] & 0xFFFFFFFF if told else -1,
                    os_thread=told.get("os_thread", 0),
                    pthread=told.get("pthread", 0),
                    events=events,
                    refs=refs,
                    comms=comms,
                    works=works,
                    waits=waits[(waits["comm_id"] == 0) | np.isin(waits["comm_id"], comm_ids)],
                    frees=self._rows(ChunkKind.FREES, thread),
                    places=places[(places["storage"] > 0) & (places["storage"] <= self._num_storages)],
                )
            )
        return threads, "; ".join(missing)

    def _rows(self, kind: ChunkKind, thread: int) -> NDArray[np.void]:
        records = self._records.get((kind, thread))
        return np.zeros(0, layout.RECORDS[kind]) if records is None else records.rows

    def _events(self, thread: int) -> tuple[NDArray[np.void], NDArray[np.void], NDArray[np.void], str]:
        """A thread's events with their refs and comms, up to the first that names what is not there."""
        calls = self._tables.calls
        raw = self._rows(ChunkKind.EVENTS, thread)
        numbers = self._rows(ChunkKind.REFS, thread)["tensor"]
        comms = self._rows(ChunkKind.COMMS, thread)
        tensors, is_tensor = self._tensors(thread)
        call = raw["call"]
        lost = _Lost()
        lost.check(np.flatnonzero(call >= len(calls.known)), "call")
        call = call[: lost.first(len(call))]
        lost.check(np.flatnonzero(~calls.known[call]), "call")
        count = (calls.num_inputs.astype(np.int64) + calls.num_outputs)[call]
        end_ref = np.cumsum(count)
        lost.check(np.flatnonzero(end_ref > len(numbers)), "tensors")
        unknown = np.flatnonzero(numbers >= len(tensors))[:1]
        nameless = np.flatnonzero(~is_tensor[numbers[: unknown[0] if len(unknown) else None]])[:1]
        lost.check(np.searchsorted(end_ref, nameless if len(nameless) else unknown, side="right"), "tensor")
        is_comm = (raw["flags"][: len(call)] & np.uint32(EventFlags.COMM)) != 0
        comm = np.cumsum(is_comm, dtype=np.int64)
        lost.check(np.flatnonzero(comm > len(comms)), "communication")
        unknown = np.flatnonzero(~np.isin(comms["group"], self._groups))[:1]
        lost.check(np.flatnonzero(is_comm)[unknown[unknown < int(is_comm.sum())]], "group")

        num_events = lost.first(len(raw))
        said = self._say(thread, lost, num_events, len(raw))
        num_refs, num_comms = (int(sums[num_events - 1]) if num_events else 0 for sums in (end_ref, comm))
        events = _expand_events(raw[:num_events], calls)
        events["first_ref"] = end_ref[:num_events] - count[:num_events]
        events["comm"] = np.where(is_comm[:num_events], comm[:num_events], 0)
        refs = np.empty(num_refs, REFS)
        for name in ("offset_bytes", "storage", "layout"):
            refs[name] = tensors[name][numbers[:num_refs]]
        first_slot = calls.first_slot[call[:num_events]] - events["first_ref"]
        slot = np.arange(num_refs) + np.repeat(first_slot, count[:num_events])
        refs["arg"] = calls.arg[slot]
        refs["element"] = calls.element[slot]
        return events, refs, comms[:num_comms], said

    def _tensors(self, thread: int) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
        """A thread's tensors by number, 0 being memory without a name, and whether what they name is there."""
        rows = self._rows(ChunkKind.TENSORS, thread)
        tensors = np.zeros(len(rows) + 1, layout.TENSOR)
        tensors[1:] = rows
        tensors["layout"][tensors["storage"] == 0] = 0
        number = np.minimum(tensors["layout"], len(self._is_layout) - 1)
        known = (tensors["storage"] <= self._num_storages) & (number == tensors["layout"]) & self._is_layout[number]
        return tensors, known | (tensors["storage"] == 0)

    def _say(self, thread: int, lost: _Lost, num_events: int, num_raw: int) -> str:
        if num_events == num_raw:
            return ""
        what = f"event {num_events} of {num_raw} of thread {thread} names a {lost.what} that is not in the file"
        if self._strict and num_events < num_raw - 1:
            raise broken(self._path, self._records[ChunkKind.EVENTS, thread].offset(num_events), what)
        return what


def _expand_events(raw: NDArray[np.void], calls: Calls) -> NDArray[np.void]:
    """All of an event that its record and its call tell."""
    events = np.empty(len(raw), EVENTS)
    is_long = (raw["flags"] & np.uint32(EventFlags.LONG)) != 0
    events["start_ns"] = raw["start_ns"]
    events["end_ns"] = raw["start_ns"] + (raw["duration"].astype(np.int64) << np.where(is_long, 10, 0))
    for name in ("sequence", "backward_sequence"):
        events[name] = raw[name]
        events[name][raw[name] == layout.NO_SEQUENCE] = -1
    for name in ("fwd_thread", "label", "context", "flags"):
        events[name] = raw[name]
    for name in ("op", "num_inputs", "num_outputs"):
        events[name] = getattr(calls, name)[raw["call"]]
    return events


class _Lost:
    """The first event of a thread that names what is not there."""

    def __init__(self) -> None:
        self._event: int | None = None
        self.what = ""

    def check(self, events: NDArray[np.int64], what: str) -> None:
        """Hear of events, the first one first, that name something missing."""
        if len(events) and (self._event is None or int(events[0]) < self._event):
            self._event, self.what = int(events[0]), what

    def first(self, default: int) -> int:
        return default if self._event is None else self._event
