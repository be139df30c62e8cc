"""Read a trace file (`format.py`) into columns.

A reader trusts nothing in the file: sizes and counts are checked against the file before they are used. A file whose
end is missing (a killed rank, a recording still running) is read as far as it is complete, and says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.errors import EmptyTraceError, TraceError
from truedag.tracer.record import format as layout
from truedag.tracer.record.format import ChunkKind, TableKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a tensor lies in its storage. Sizes and strides in elements."""

    dtype: str
    device: str
    itemsize: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements, each counted once however often a stride repeats it."""
        count = 1
        for size in self.sizes:
            count *= size
        return count * self.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadTrace:
    """One thread's records as structured arrays (`format.EVENT`, `REF`, `COMM`, `WORK`)."""

    thread: int
    autograd_thread: int
    os_thread: int  # 0: unknown
    pthread: int  # pthread_t, 0: unknown
    events: NDArray[np.void]
    refs: NDArray[np.void]
    comms: NDArray[np.void]
    works: NDArray[np.void]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One rank's recording."""

    path: Path
    closed: bool
    meta: dict[str, Any]
    threads: list[ThreadTrace]
    ops: dict[int, dict[str, Any]]
    layouts: dict[int, Layout]
    storages: dict[int, tuple[int, int, int]]  # id -> StorageImpl, data address, bytes
    groups: dict[int, dict[str, Any]]
    group_ranks: dict[str, dict[str, Any]]  # group name -> its global ranks in group order, its axis or None
    labels: dict[int, dict[str, Any]]
    contexts: dict[int, dict[str, Any]]
    named_tensors: list[dict[str, Any]]
    lanes: list[dict[str, Any]]  # what was counted of each group's messages (`counters.py`)

    @property
    def rank(self) -> int:
        """The rank that recorded it."""
        return int(self.meta["rank"])


def read_trace(path: Path) -> Trace:
    """Read a trace file.

    Raises:
        EmptyTraceError: its rank ended before it could say which rank it was, and recorded nothing.
        TraceError: the file is missing, is no trace, is of another version, or is broken (with the offset).
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from error
    closed = _check_header(path, data)
    pieces: dict[tuple[ChunkKind, int], list[NDArray[np.void]]] = {}
    tables: dict[TableKind, list[tuple[int, bytes]]] = {kind: [] for kind in TableKind}
    for offset, kind, thread, used in _chunks(path, data):
        body = data[offset : offset + used]
        if kind is ChunkKind.TABLES:
            _read_entries(path, offset, body.tobytes(), tables)
        else:
            pieces.setdefault((kind, thread), []).append(body.view(layout.RECORDS[kind]))
    meta: dict[str, Any] = {}
    for _, payload in tables[TableKind.META]:
        meta.update(_json(path, payload))
    if "rank" not in meta:
        if not any(len(piece) for pile in pieces.values() for piece in pile):
            raise EmptyTraceError(f"{path} holds nothing: its rank ended before recording began")
        raise TraceError(f"{path} is broken: it holds records and does not say which rank recorded them")
    return Trace(
        path=path,
        closed=closed,
        meta=meta,
        threads=_threads(path, pieces, {i: _json(path, payload) for i, payload in tables[TableKind.THREAD]}),
        ops={i: _json(path, payload) for i, payload in tables[TableKind.OP]},
        layouts={i: _layout(path, payload) for i, payload in tables[TableKind.LAYOUT]},
        storages={i: _storage(path, payload) for i, payload in tables[TableKind.STORAGE]},
        groups={i: _json(path, payload) for i, payload in tables[TableKind.GROUP]},
        group_ranks={told["name"]: told for told in (_json(path, entry) for _, entry in tables[TableKind.GROUP_RANKS])},
        labels={i: _json(path, payload) for i, payload in tables[TableKind.LABEL]},
        contexts={i: _json(path, payload) for i, payload in tables[TableKind.CONTEXT]},
        named_tensors=[_json(path, payload) for _, payload in tables[TableKind.NAMED_TENSOR]],
        lanes=[_json(path, payload) for _, payload in tables[TableKind.LANES]],
    )


def _check_header(path: Path, data: NDArray[np.uint8]) -> bool:
    if not data[: layout.FILE_HEADER_BYTES].any():
        raise EmptyTraceError(f"{path} holds nothing: its rank ended before recording began")
    if len(data) < layout.FILE_HEADER_BYTES or data[:8].tobytes() != layout.FILE_MAGIC:
        raise TraceError(f"{path} is no truedag trace: its first 8 bytes are not {layout.FILE_MAGIC!r}")
    header = data[: layout.FILE_HEADER.itemsize].view(layout.FILE_HEADER)[0]
    if header["version"] != layout.FORMAT_VERSION:
        raise TraceError(
            f"{path} is a trace of format version {header['version']}, this truedag reads version "
            f"{layout.FORMAT_VERSION}: merge it with the truedag that recorded it"
        )
    return bool(header["closed"])


def _chunks(path: Path, data: NDArray[np.uint8]) -> list[tuple[int, ChunkKind, int, int]]:
    """List the chunks as (offset of the records, kind, thread, bytes used)."""
    found = []
    position = layout.FILE_HEADER_BYTES
    while position + layout.CHUNK.itemsize <= len(data):
        header = data[position : position + layout.CHUNK.itemsize].view(layout.CHUNK)[0]
        if header["magic"] == 0:
            position = (position // layout.SEGMENT_BYTES + 1) * layout.SEGMENT_BYTES
            continue
        size, used, record = int(header["bytes"]), int(header["used"]), int(header["record_bytes"])
        if (
            header["magic"] != layout.CHUNK_MAGIC
            or size % layout.ALIGNMENT
            or not layout.CHUNK.itemsize + used <= size <= len(data) - position
            or int(header["kind"]) not in set(ChunkKind)
        ):
            raise TraceError(f"{path} is broken at byte {position}: no chunk begins there")
        kind = ChunkKind(int(header["kind"]))
        wanted = 0 if kind is ChunkKind.TABLES else layout.RECORDS[kind].itemsize
        if record != wanted or (wanted and used % wanted):
            raise TraceError(f"{path} is broken at byte {position}: {kind.name.lower()} of {record} bytes each")
        found.append((position + layout.CHUNK.itemsize, kind, int(header["thread"]), used))
        position += size
    return found


def _read_entries(path: Path, offset: int, body: bytes, tables: dict[TableKind, list[tuple[int, bytes]]]) -> None:
    position = 0
    while position < len(body):
        if position + layout.ENTRY.itemsize > len(body):
            raise TraceError(f"{path} is broken at byte {offset + position}: half a table entry")
        entry = np.frombuffer(body, layout.ENTRY, 1, position)[0]
        begin = position + layout.ENTRY.itemsize
        end = begin + int(entry["bytes"])
        if end > len(body) or int(entry["kind"]) not in set(TableKind):
            raise TraceError(f"{path} is broken at byte {offset + position}: no table entry begins there")
        tables[TableKind(int(entry["kind"]))].append((int(entry["id"]), body[begin:end]))
        position = begin + (int(entry["bytes"]) + 7) // 8 * 8


def _threads(
    path: Path, pieces: dict[tuple[ChunkKind, int], list[NDArray[np.void]]], told: dict[int, dict[str, Any]]
) -> list[ThreadTrace]:
    def whole(kind: ChunkKind, thread: int) -> NDArray[np.void]:
        parts = pieces.get((kind, thread))
        return np.concatenate(parts) if parts else np.zeros(0, layout.RECORDS[kind])

    threads = []
    for thread in sorted({thread for _, thread in pieces}):
        events, refs = whole(ChunkKind.EVENTS, thread), whole(ChunkKind.REFS, thread)
        comms, works = whole(ChunkKind.COMMS, thread), whole(ChunkKind.WORKS, thread)
        last_ref = events["first_ref"].astype(np.int64) + events["num_inputs"] + events["num_outputs"]
        if len(events) and (int(last_ref.max()) > len(refs) or int(events["comm"].max()) > len(comms)):
            raise TraceError(f"{path} is broken: thread {thread} has events that refer to records it does not hold")
        said = told.get(thread, {})
        threads.append(
            ThreadTrace(
                thread=thread,
                autograd_thread=int(said.get("autograd_thread", -1)),
                os_thread=int(said.get("os_thread", 0)),
                pthread=int(said.get("pthread", 0)),
                events=events,
                refs=refs,
                comms=comms,
                works=works,
            )
        )
    return threads


def _json(path: Path, payload: bytes) -> dict[str, Any]:
    try:
        value = json.loads(payload)
    except ValueError as error:
        raise TraceError(f"{path} is broken: a table entry is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise TraceError(f"{path} is broken: a table entry is no JSON object")
    return value


def _layout(path: Path, payload: bytes) -> Layout:
    if len(payload) < 16:
        raise TraceError(f"{path} is broken: a layout of {len(payload)} bytes")
    dtype, device, itemsize, ndim = (int(word) for word in np.frombuffer(payload, "<i4", 4))
    if ndim < 0 or len(payload) != 16 + 16 * ndim:
        raise TraceError(f"{path} is broken: a layout of {len(payload)} bytes with {ndim} dimensions")
    dims = tuple(int(word) for word in np.frombuffer(payload, "<i8", 2 * ndim, 16))
    return Layout(
        dtype=layout.DTYPES.get(dtype, f"dtype{dtype}"),
        device=layout.DEVICES.get(device, f"device{device}"),
        itemsize=itemsize,
        sizes=dims[:ndim],
        strides=dims[ndim:],
    )


def _storage(path: Path, payload: bytes) -> tuple[int, int, int]:
    if len(payload) != 24:
        raise TraceError(f"{path} is broken: a storage of {len(payload)} bytes")
    impl, address, size = (int(word) for word in np.frombuffer(payload, "<u8", 3))
    return impl, address, size
