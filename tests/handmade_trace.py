"""Trace files by hand: chunks and table entries of whatever one likes, to be read or refused."""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from truedag.tracer.record import format as layout
from truedag.tracer.record.format import ChunkKind, TableKind

RELU = b'{"name":"aten::relu","overload":"","schema":"aten::relu(Tensor self) -> Tensor"}'
REDUCE = b'{"name":"c10d::allreduce_","overload":"","schema":""}'
GROUP = b'{"name":"0","rank":0,"size":1,"backend":"gloo"}'


def entry(kind: int, number: int, payload: bytes) -> bytes:
    """An entry of the tables."""
    return struct.pack("<4I", kind, number, len(payload), 0) + payload + bytes(-len(payload) % 8)


def call(number: int, op: int, inputs: Sequence[tuple[int, int]], outputs: Sequence[tuple[int, int]]) -> bytes:
    """A call: `inputs` and `outputs` are (arg, element)."""
    words = [word for slot in (*inputs, *outputs) for word in slot]
    return entry(TableKind.CALL, number, struct.pack(f"<3I{len(words)}H", op, len(inputs), len(outputs), *words))


def chunk(kind: int, body: bytes, *, thread: int = 0, room: int = 0) -> bytes:
    """A chunk, with so much room after its records as well."""
    size = -(-(layout.CHUNK.itemsize + len(body) + room) // layout.ALIGNMENT) * layout.ALIGNMENT
    record_bytes = 0 if kind == ChunkKind.TABLES else layout.RECORDS[ChunkKind(kind)].itemsize
    header = struct.pack("<4I2Q32x", layout.CHUNK_MAGIC, kind, thread, record_bytes, size, len(body))
    return (header + body).ljust(size, b"\0")


def records(kind: ChunkKind, *rows: tuple[Any, ...], thread: int = 0) -> bytes:
    """A chunk of records."""
    return chunk(kind, np.array(list(rows), layout.RECORDS[kind]).tobytes(), thread=thread)


def event(call: int, *, start: int = 1000, duration: int = 10, flags: int = 0) -> tuple[int, ...]:
    """An event of nothing in particular."""
    return (start, duration, call, layout.NO_SEQUENCE, layout.NO_SEQUENCE, 0, 0, 0, flags)


def header(*, closed: int = 1) -> bytes:
    """A file's header."""
    return struct.pack("<8s2IQ", layout.FILE_MAGIC, layout.FORMAT_VERSION, layout.FILE_HEADER_BYTES, closed).ljust(
        layout.FILE_HEADER_BYTES, b"\0"
    )


def tables(*more: bytes) -> bytes:
    """Tables of rank 0 of 1: relu of one float32[2, 3] is call 1, an all-reduce of one is call 2."""
    entries = (
        entry(TableKind.META, 0, b'{"rank":0,"world_size":1}'),
        entry(TableKind.OP, 1, RELU),
        entry(TableKind.OP, 2, REDUCE),
        entry(TableKind.GROUP, 1, GROUP),
        entry(TableKind.LAYOUT, 1, struct.pack("<4i4q", 6, 0, 4, 2, 2, 3, 3, 1)),
        call(1, 1, [(0, 0)], [(0, 0)]),
        call(2, 2, [(0, 0)], []),
    )
    return chunk(ChunkKind.TABLES, b"".join((*entries, *more)))


def memory(*, thread: int = 0) -> bytes:
    """Two storages and a tensor in each."""
    storages = records(ChunkKind.STORAGES, (0x51, 0xA0, 24), (0x52, 0xB0, 24)) if thread == 0 else b""
    return storages + records(ChunkKind.TENSORS, (0, 1, 1), (0, 2, 1), thread=thread)
