r"""The trace file, version 1: what a recorder writes and a reader finds, one file a rank.

All numbers are little-endian. The file is a header (4096 bytes), then chunks, each in one piece::

    file header   magic "TRUEDAG\0", version u32, header bytes u32, closed u64 (1: the recorder stopped in good order)
    chunk         header (64 bytes: `CHUNK`), then `used` bytes of records, then room up to `bytes`

A chunk belongs to one thread and holds records of one kind: events, refs, comms, works (fixed records, the dtypes
below) or tables (entries: kind u32, id u32, bytes u32, zero u32, payload padded to 8). What `used` counts is complete,
whenever the program ended. Zeros where a chunk could begin mean: nothing more up to the next 8 MiB segment, or the end.

An event is an operator of the dispatcher as DESIGN's rule 2 counts them, pure views included; its tensors are
`num_inputs + num_outputs` refs of the same thread from `first_ref` on; a communication has a comm at `comm - 1`.
What a communication made inside for its own use is among its outputs, with `arg` SCRATCH_ARG. A tensor is a storage, a
byte offset and a layout (dtype, sizes, strides). A work says when a communication really ran. Times are
CLOCK_MONOTONIC in ns. `tracer/record/native/trace_file.h` is the other side of this page.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

import numpy as np

FILE_MAGIC = b"TRUEDAG\0"
FORMAT_VERSION = 1
FILE_HEADER_BYTES = 4096
CHUNK_MAGIC = 0x4B4E4843
SEGMENT_BYTES = 8 << 20
ALIGNMENT = 4096


class ChunkKind(IntEnum):
    """What a chunk holds."""

    EVENTS = 1
    REFS = 2
    COMMS = 3
    WORKS = 4
    TABLES = 5


class TableKind(IntEnum):
    """What an entry of the tables tells; payloads are JSON but for layouts and storages."""

    META = 1
    THREAD = 2
    OP = 3
    LAYOUT = 4
    STORAGE = 5
    GROUP = 6
    LABEL = 7
    CONTEXT = 8
    NAMED_TENSOR = 9
    GROUP_RANKS = 10
    LANES = 12


class EventFlags(IntFlag):
    """How an event came about."""

    IN_BACKWARD = 1
    RANGE = 2
    FAILED = 4


FILE_HEADER = np.dtype([("magic", "S8"), ("version", "<u4"), ("header_bytes", "<u4"), ("closed", "<u8")])
CHUNK = np.dtype(
    [
        ("magic", "<u4"),
        ("kind", "<u4"),
        ("thread", "<u4"),
        ("record_bytes", "<u4"),
        ("bytes", "<u8"),
        ("used", "<u8"),
        ("reserved", "<u8", (4,)),
    ]
)
EVENT = np.dtype(
    [
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
        ("sequence", "<i8"),
        ("backward_sequence", "<i8"),
        ("fwd_thread", "<u8"),
        ("first_ref", "<u8"),
        ("op", "<u4"),
        ("label", "<u4"),
        ("context", "<u4"),
        ("flags", "<u4"),
        ("num_inputs", "<u4"),
        ("num_outputs", "<u4"),
        ("comm", "<u4"),
        ("reserved", "<u4"),
    ]
)
REF = np.dtype(
    [
        ("offset_bytes", "<i8"),
        ("storage", "<u4"),
        ("layout", "<u4"),
        ("arg", "<u2"),
        ("element", "<u2"),
        ("reserved", "<u4"),
    ]
)
COMM = np.dtype(
    [
        ("sequence", "<i8"),
        ("order", "<i8"),
        ("group", "<u4"),
        ("peer", "<i4"),
        ("tag", "<i4"),
        ("reduce_op", "<i4"),
        ("async_op", "<u4"),
        ("id", "<u4"),
    ]
)
WORK = np.dtype([("start_ns", "<i8"), ("end_ns", "<i8"), ("comm_id", "<u4"), ("op", "<u4")])
ENTRY = np.dtype([("kind", "<u4"), ("id", "<u4"), ("bytes", "<u4"), ("zero", "<u4")])

# The arg of a tensor that a communication made inside for its own use.
SCRATCH_ARG = 0xFFFF

RECORDS = {ChunkKind.EVENTS: EVENT, ChunkKind.REFS: REF, ChunkKind.COMMS: COMM, ChunkKind.WORKS: WORK}

# c10::ScalarType and c10::DeviceType by number, as layouts name them.
DTYPES = {
    0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64",
    8: "complex32", 9: "complex64", 10: "complex128", 11: "bool", 12: "qint8", 13: "quint8", 14: "qint32",
    15: "bfloat16", 23: "float8_e5m2", 24: "float8_e4m3fn", 25: "float8_e5m2fnuz", 26: "float8_e4m3fnuz",
    27: "uint16", 28: "uint32", 29: "uint64",
}  # fmt: skip
DEVICES = {0: "cpu", 1: "cuda", 14: "meta"}
