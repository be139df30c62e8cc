r"""The trace file, version 2: what a recorder writes and a reader finds, one file a rank.

All numbers are little-endian. The file is a header (4096 bytes), then chunks, each in one piece::

    file header   magic "TRUEDAG\0", version u32, header bytes u32, closed u64 (1: the recorder stopped in good order)
    chunk         header (64 bytes: `CHUNK`), then `used` bytes of records, then room up to `bytes`

A chunk belongs to one thread and holds records of one kind: fixed records (the dtypes below) or tables (entries: kind
u32, id u32, bytes u32, zero u32, payload padded to 8). What `used` counts is complete, whenever the program ended.
Zeros where a chunk could begin mean: nothing more up to the next 8 MiB segment, or the end.

An event is an operator of the dispatcher as DESIGN's rule 2 counts them, pure views included. Its call (a table entry)
says which operator it is and which argument or result each of its tensors is; its tensors are the next so many refs of
its thread, and if it is a communication, the next comm. A ref is the number of a tensor of its thread, from 1 on in
the order of the tensor records; a tensor is a storage, a layout (dtype, sizes, strides) and an offset. Storages are
numbered from 1 on in the order of their records, which belong to no thread: a StorageImpl, and the memory that it had
when it was first seen. A place says that from a thread's so-manieth event on (counted from 0) it had other memory; so
does the same address of a StorageImpl that was freed and given out again. What a communication made inside for its
own use is among its results, with `arg` SCRATCH_ARG.

A work says when a communication really ran, a wait when a thread of the program waited for one, a free when memory was
given back. Times are CLOCK_MONOTONIC in ns. `tracer/record/native/trace_file.h` is the other side of this page;
`FORMAT.md` beside it is the page for people who write readers of their own.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

import numpy as np

FILE_MAGIC = b"TRUEDAG\0"
FORMAT_VERSION = 2
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
    TENSORS = 6
    STORAGES = 7
    FREES = 8
    WAITS = 9
    PLACES = 10


class TableKind(IntEnum):
    """What an entry of the tables tells; payloads are JSON but for layouts and calls.

    A layout is dtype, device type, itemsize and number of dimensions as int32, then sizes and strides (in elements) as
    int64. A call is operator, number of argument tensors and number of result tensors as uint32, then for each of the
    tensors `arg` (position among the schema's arguments, or returns) and `element` (position in a list) as uint16.
    """

    META = 1
    THREAD = 2
    OP = 3
    LAYOUT = 4
    GROUP = 6
    LABEL = 7
    CONTEXT = 8
    NAMED_TENSOR = 9
    GROUP_RANKS = 10
    CALL = 11
    LANES = 12
    CLOCK = 13


class EventFlags(IntFlag):
    """How an event came about, and how its record is to be read."""

    IN_BACKWARD = 1
    RANGE = 2
    FAILED = 4
    COMM = 8
    LONG = 16  # the duration is in units of 1024 ns


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
# The numbers that autograd gives nodes are kept modulo 2^32; NO_SEQUENCE is none.
EVENT = np.dtype(
    [
        ("start_ns", "<i8"),
        ("duration", "<u4"),
        ("call", "<u4"),
        ("sequence", "<u4"),
        ("backward_sequence", "<u4"),
        ("fwd_thread", "<u4"),
        ("label", "<u4"),
        ("context", "<u4"),
        ("flags", "<u4"),
    ]
)
REF = np.dtype([("tensor", "<u4")])
TENSOR = np.dtype([("offset_bytes", "<i8"), ("storage", "<u4"), ("layout", "<u4")])
STORAGE = np.dtype([("impl", "<u8"), ("address", "<u8"), ("bytes", "<u8")])
# From the thread's event number `event` on (from 0), the storage has this memory and no longer the one before.
PLACE = np.dtype([("storage", "<u4"), ("event", "<u4"), ("address", "<u8"), ("bytes", "<u8")])
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
FREE = np.dtype([("time_ns", "<i8"), ("address", "<u8")])
WAIT = np.dtype([("start_ns", "<i8"), ("end_ns", "<i8"), ("comm_id", "<u4"), ("reserved", "<u4")])
ENTRY = np.dtype([("kind", "<u4"), ("id", "<u4"), ("bytes", "<u4"), ("zero", "<u4")])

NO_SEQUENCE = 0xFFFFFFFF
# The arg of a tensor that a communication made inside for its own use.
SCRATCH_ARG = 0xFFFF

RECORDS = {
    ChunkKind.EVENTS: EVENT,
    ChunkKind.REFS: REF,
    ChunkKind.COMMS: COMM,
    ChunkKind.WORKS: WORK,
    ChunkKind.TENSORS: TENSOR,
    ChunkKind.STORAGES: STORAGE,
    ChunkKind.FREES: FREE,
    ChunkKind.WAITS: WAIT,
    ChunkKind.PLACES: PLACE,
}

# c10::ScalarType and c10::DeviceType by number, as layouts name them.
DTYPES = {
    0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64",
    8: "complex32", 9: "complex64", 10: "complex128", 11: "bool", 12: "qint8", 13: "quint8", 14: "qint32",
    15: "bfloat16", 23: "float8_e5m2", 24: "float8_e4m3fn", 25: "float8_e5m2fnuz", 26: "float8_e4m3fnuz",
    27: "uint16", 28: "uint32", 29: "uint64",
}  # fmt: skip
DEVICES = {0: "cpu", 1: "cuda", 14: "meta"}
