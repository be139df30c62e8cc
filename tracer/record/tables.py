"""The tables of a trace: what its records name by number, checked entry by entry."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.record import format as layout
from truedag.tracer.record.chunks import broken
from truedag.tracer.record.format import TableKind

_ENTRY = struct.Struct("<4I")
_KINDS = {int(kind): kind for kind in TableKind}
_CALL_HEAD = 12
_LAYOUT_HEAD = 16
# What the rest of truedag takes for granted in the entries that are JSON.
_FIELDS: dict[TableKind, dict[str, type]] = {
    TableKind.THREAD: {"autograd_thread": int},
    TableKind.OP: {"name": str, "overload": str, "schema": str},
    TableKind.GROUP: {"name": str, "rank": int, "size": int},
    TableKind.GROUP_RANKS: {"name": str, "ranks": list},
    TableKind.CLOCK: {"clock": str, "peer_clock": str, "pings": list},
    TableKind.NAMED_TENSOR: {
        "name": str,
        "role": str,
        "storage": int,
        "layout": int,
        "offset_bytes": int,
        "time_ns": int,
    },
}


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
class Entry:
    """One entry of the tables; `offset` is where it begins in the file."""

    id: int
    offset: int
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """The calls by number: arrays of one row a call, row 0 and numbers that were not given included.

    The tensors of a call are `num_inputs + num_outputs` slots from `first_slot` on.
    """

    known: NDArray[np.bool_]
    op: NDArray[np.uint32]
    num_inputs: NDArray[np.uint32]
    num_outputs: NDArray[np.uint32]
    first_slot: NDArray[np.int64]
    arg: NDArray[np.uint16]
    element: NDArray[np.uint16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Everything that the tables tell, by number where they are numbered."""

    meta: dict[str, Any]
    threads: dict[int, dict[str, Any]]
    ops: dict[int, dict[str, Any]]
    layouts: dict[int, Layout]
    calls: Calls
    groups: dict[int, dict[str, Any]]
    group_ranks: dict[str, dict[str, Any]]
    labels: dict[int, dict[str, Any]]
    contexts: dict[int, dict[str, Any]]
    lanes: list[dict[str, Any]]
    clock_samples: list[dict[str, Any]]
    named_tensors: list[dict[str, Any]]


def read_tables(path: Path, chunks: Sequence[tuple[int, bytes]], *, whole: bool) -> Tables:
    """Read the tables from their chunks (offset in the file, entries).

    Args:
        path: for what is said of a broken file.
        chunks: in the order of the file.
        whole: the file has lost no end: an entry that is not all there is a broken one.

    Raises:
        TraceError: an entry is broken.
    """
    entries: dict[TableKind, list[Entry]] = {kind: [] for kind in TableKind}
    for offset, body in chunks:
        _split(path, offset, body, entries, whole=whole)

    def told(kind: TableKind) -> list[tuple[Entry, dict[str, Any]]]:
        return [(entry, _json(path, kind, entry)) for entry in entries[kind]]

    def by_number(kind: TableKind) -> dict[int, dict[str, Any]]:
        return {entry.id: value for entry, value in told(kind)}

    meta: dict[str, Any] = {}
    for entry, value in told(TableKind.META):
        meta.update(value)
        rank, world_size = meta.get("rank", 0), meta.get("world_size", 1)
        if type(rank) is not int or type(world_size) is not int or not 0 <= rank < world_size < 2**31:
            raise broken(path, entry.offset, f"rank {rank!r} of {world_size!r}")
    _check_numbers(path, entries[TableKind.OP], "operator")
    _check_numbers(path, entries[TableKind.LAYOUT], "layout")
    ops = by_number(TableKind.OP)
    return Tables(
        meta=meta,
        threads=by_number(TableKind.THREAD),
        ops=ops,
        layouts={entry.id: _layout(path, entry) for entry in entries[TableKind.LAYOUT]},
        calls=_calls(path, entries[TableKind.CALL], ops),
        groups=by_number(TableKind.GROUP),
        group_ranks={value["name"]: value for _, value in told(TableKind.GROUP_RANKS)},
        labels=by_number(TableKind.LABEL),
        contexts=by_number(TableKind.CONTEXT),
        lanes=[value for _, value in told(TableKind.LANES)],
        clock_samples=[value for _, value in told(TableKind.CLOCK)],
        named_tensors=[value for _, value in told(TableKind.NAMED_TENSOR)],
    )


def _split(path: Path, offset: int, body: bytes, entries: dict[TableKind, list[Entry]], *, whole: bool) -> None:
    position = 0
    while position < len(body):
        begin = position + _ENTRY.size
        is_whole = begin <= len(body)
        if is_whole:
            kind, number, size, _ = _ENTRY.unpack_from(body, position)
            if kind not in _KINDS:
                raise broken(path, offset + position, "no table entry begins there")
            is_whole = begin + size <= len(body)
        if not is_whole:
            if whole:
                raise broken(path, offset + position, "half a table entry")
            return
        entries[_KINDS[kind]].append(Entry(id=number, offset=offset + position, payload=body[begin : begin + size]))
        position = begin + (size + 7) // 8 * 8


def _json(path: Path, kind: TableKind, entry: Entry) -> dict[str, Any]:
    try:
        value = json.loads(entry.payload)
    except (ValueError, RecursionError) as error:
        raise broken(path, entry.offset, f"a table entry is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise broken(path, entry.offset, "a table entry is no JSON object")
    for name, wanted in _FIELDS.get(kind, {}).items():
        said = value.get(name)
        if type(said) is not wanted or (isinstance(said, int) and not -(2**63) <= said < 2**63):
            raise broken(path, entry.offset, f"{kind.name.lower()} without {name}")
    if kind is TableKind.THREAD and not all(type(value.get(name, 0)) is int for name in ("os_thread", "pthread")):
        raise broken(path, entry.offset, "a thread without a number")
    ranks = value.get("ranks", [])
    if kind in (TableKind.GROUP, TableKind.GROUP_RANKS) and not (
        isinstance(ranks, list) and all(type(rank) is int and 0 <= rank < 2**31 for rank in ranks)
    ):
        raise broken(path, entry.offset, "a group whose ranks are no ranks")
    if kind is TableKind.CLOCK and not all(_is_ping(ping) for ping in value["pings"]):
        raise broken(path, entry.offset, "a ping that is not of four times")
    return value


def _is_ping(ping: object) -> bool:
    return isinstance(ping, list) and len(ping) == 4 and all(type(one) is int and abs(one) < 2**62 for one in ping)


def _check_numbers(path: Path, entries: Sequence[Entry], what: str) -> None:
    """Numbers are given from 1 on; arrays are made by them."""
    for entry in entries:
        if not 0 < entry.id <= 2 * len(entries) + 4096:
            raise broken(path, entry.offset, f"{what} number {entry.id} where the file holds {len(entries)}")


def _layout(path: Path, entry: Entry) -> Layout:
    payload = entry.payload
    if len(payload) < _LAYOUT_HEAD:
        raise broken(path, entry.offset, f"a layout of {len(payload)} bytes")
    dtype, device, itemsize, ndim = struct.unpack_from("<4i", payload)
    if ndim < 0 or len(payload) != _LAYOUT_HEAD + 16 * ndim:
        raise broken(path, entry.offset, f"a layout of {len(payload)} bytes with {ndim} dimensions")
    dims = struct.unpack_from(f"<{2 * ndim}q", payload, _LAYOUT_HEAD)
    if itemsize < 0 or any(size < 0 for size in dims[:ndim]):
        raise broken(path, entry.offset, "a layout of negative size")
    return Layout(
        dtype=layout.DTYPES.get(dtype, f"dtype{dtype}"),
        device=layout.DEVICES.get(device, f"device{device}"),
        itemsize=itemsize,
        sizes=dims[:ndim],
        strides=dims[ndim:],
    )


def _calls(path: Path, entries: Sequence[Entry], ops: dict[int, dict[str, Any]]) -> Calls:
    _check_numbers(path, entries, "call")
    num_rows = max((entry.id for entry in entries), default=0) + 1
    known = np.zeros(num_rows, bool)
    heads = np.zeros((num_rows, 3), np.uint32)
    first_slot = np.zeros(num_rows, np.int64)
    slots = []
    num_slots = 0
    for entry in entries:
        size = len(entry.payload)
        if size < _CALL_HEAD:
            raise broken(path, entry.offset, f"a call of {size} bytes")
        op, num_inputs, num_outputs = struct.unpack_from("<3I", entry.payload)
        if size != _CALL_HEAD + 4 * (num_inputs + num_outputs):
            raise broken(path, entry.offset, f"a call of {size} bytes with {num_inputs + num_outputs} tensors")
        known[entry.id] = op in ops
        heads[entry.id] = op, num_inputs, num_outputs
        first_slot[entry.id] = num_slots
        slots.append(entry.payload[_CALL_HEAD:])
        num_slots += num_inputs + num_outputs
    words = np.frombuffer(b"".join(slots), np.dtype("<u2")).reshape(-1, 2)
    return Calls(
        known=known,
        op=heads[:, 0],
        num_inputs=heads[:, 1],
        num_outputs=heads[:, 2],
        first_slot=first_slot,
        arg=words[:, 0],
        element=words[:, 1],
    )
