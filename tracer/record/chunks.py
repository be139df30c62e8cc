"""The chunks of a trace file: where they lie, and their records, one array for each thread and kind.

A file may be read while it is written, may have lost its end, or be anything at all: what a number in it says is
checked against the file before it is used, and nothing is allocated for what the file does not hold. Whoever writes an
event has written what it names before; so where the recorder has not closed the file, the lengths of the chunks of
events are taken first and those of everything else afterwards, and no event is seen without what it names.

A file that was compressed by gzip is read as it is.
"""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.errors import EmptyTraceError, TraceError
from truedag.tracer.record import format as layout
from truedag.tracer.record.format import ChunkKind

_CHUNK = struct.Struct("<4I2Q32x")
_KINDS = {int(kind): kind for kind in ChunkKind}
_RECORD_BYTES = {int(kind): 0 if kind is ChunkKind.TABLES else layout.RECORDS[kind].itemsize for kind in ChunkKind}
_GZIP_MAGIC = b"\x1f\x8b"
# What a compressed trace may expand to. Records do not shrink to less than a hundredth; room that was never used does.
_GZIP_RATIO = 300
_GZIP_ROOM = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A chunk, as far as it is in the file; `offset` is where its records begin, `used` their bytes."""

    offset: int
    kind: ChunkKind
    thread: int
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """The records of one kind, of one thread or of all, in the order of their chunks."""

    rows: NDArray[np.void]
    chunks: tuple[Chunk, ...]

    def offset(self, row: int) -> int:
        """Where in the file a record lies."""
        place = row * self.rows.itemsize
        for chunk in self.chunks:
            if place < chunk.used:
                return chunk.offset + place
            place -= chunk.used
        raise IndexError(row)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceContent:
    """What a file holds. `truncated` says what is missing at its end, '' if nothing is."""

    closed: bool
    truncated: str
    records: dict[tuple[ChunkKind, int], Records]
    storages: Records
    tables: list[tuple[int, bytes]]  # offset in the file, entries


def broken(path: Path, offset: int, what: str) -> TraceError:
    """Say that a file is broken at a byte."""
    return TraceError(f"{path} is broken at byte {offset}: {what}")


def read_chunks(path: Path) -> TraceContent:
    """Read a file's chunks.

    Raises:
        EmptyTraceError: nothing was written into it.
        TraceError: it is missing, is no trace, is of another version, or is broken.
    """
    try:
        with path.open("rb", buffering=0) as file:
            if file.read(2) == _GZIP_MAGIC:
                unpacked, truncated = _unpack(path, file)
                return _read(path, unpacked, truncated)
            return _read(path, file, "")
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise TraceError(f"cannot read the trace {path}: it does not fit into memory") from error


def _unpack(path: Path, file: BinaryIO) -> tuple[BinaryIO, str]:
    limit = _GZIP_ROOM + _GZIP_RATIO * file.seek(0, io.SEEK_END)
    file.seek(0)
    unpacked = io.BytesIO()
    packed = gzip.GzipFile(fileobj=file)
    try:
        while piece := packed.read1(1 << 20):
            unpacked.write(piece)
            if unpacked.tell() > limit:
                raise TraceError(f"{path} is no truedag trace: it expands to more than {_GZIP_RATIO} times its size")
    except EOFError:
        return unpacked, "the compressed file is cut off"
    except (gzip.BadGzipFile, zlib.error) as error:
        raise broken(path, file.tell(), f"gzip cannot read on ({error})") from error
    return unpacked, ""


def _read(path: Path, file: BinaryIO, truncated: str) -> TraceContent:
    closed = _check_header(path, file)
    chunks, cut = _list_chunks(path, file)
    if not closed:
        events = [chunk for chunk in chunks if chunk.kind is ChunkKind.EVENTS]
        chunks, cut = _list_chunks(path, file)
        chunks = events + [chunk for chunk in chunks if chunk.kind is not ChunkKind.EVENTS]
    places: dict[tuple[ChunkKind, int], list[Chunk]] = {}
    tables = []
    for chunk in chunks:
        if chunk.kind is ChunkKind.TABLES:
            tables.append((chunk.offset, _load(path, file, [chunk]).tobytes()))
        else:
            thread = 0 if chunk.kind is ChunkKind.STORAGES else chunk.thread
            places.setdefault((chunk.kind, thread), []).append(chunk)
    records = {
        key: Records(rows=_load(path, file, found).view(layout.RECORDS[key[0]]), chunks=tuple(found))
        for key, found in places.items()
    }
    storages = records.pop((ChunkKind.STORAGES, 0), Records(rows=np.zeros(0, layout.STORAGE), chunks=()))
    return TraceContent(closed=closed, truncated=truncated or cut, records=records, storages=storages, tables=tables)


def _check_header(path: Path, file: BinaryIO) -> bool:
    file.seek(0)
    data = file.read(layout.FILE_HEADER_BYTES)
    if not any(data):
        raise EmptyTraceError(f"{path} holds nothing: its rank ended before recording began")
    if data[: len(layout.FILE_MAGIC)] != layout.FILE_MAGIC:
        raise TraceError(f"{path} is no truedag trace: its first 8 bytes are not {layout.FILE_MAGIC!r}")
    if len(data) < layout.FILE_HEADER.itemsize:
        raise EmptyTraceError(f"{path} holds nothing: its header is cut off")
    header = np.frombuffer(data, layout.FILE_HEADER, 1)[0]
    if header["version"] != layout.FORMAT_VERSION:
        raise TraceError(
            f"{path} is a trace of format version {header['version']}, this truedag reads version "
            f"{layout.FORMAT_VERSION}: merge it with the truedag that recorded it"
        )
    if header["header_bytes"] != layout.FILE_HEADER_BYTES or header["closed"] > 1:
        raise broken(path, 12, "no header of a trace")
    return bool(header["closed"])


def _list_chunks(path: Path, file: BinaryIO) -> tuple[list[Chunk], str]:
    """List the chunks in the file's order, and say what is missing at its end."""
    found: list[Chunk] = []
    length = file.seek(0, io.SEEK_END)
    position = layout.FILE_HEADER_BYTES
    while position < length:
        header = _header_at(file, position)
        if header is None or header[0] == 0:
            segment_end = min((position // layout.SEGMENT_BYTES + 1) * layout.SEGMENT_BYTES, length)
            later = _next_chunk(file, position, segment_end)
            if later is not None and header == _header_at(file, position):
                raise broken(path, position, f"nothing, and yet a chunk at byte {later}")
            if later is None:
                position = segment_end
            continue
        magic, kind, thread, record_bytes, size, used = header
        if magic != layout.CHUNK_MAGIC or not _is_chunk(kind, record_bytes, size, used):
            raise broken(path, position, "no chunk begins there")
        begin = position + layout.CHUNK.itemsize
        if position + size > length:
            if _next_chunk(file, position + layout.ALIGNMENT, length) is not None:
                raise broken(path, position, f"a chunk of {size} bytes that goes beyond the end and over other chunks")
            there = max(length - begin, 0)
            there -= there % (record_bytes or 8)
            found.append(Chunk(offset=begin, kind=_KINDS[kind], thread=thread, used=min(used, there)))
            return found, f"the file ends at byte {length}, inside a chunk of {_KINDS[kind].name.lower()}"
        found.append(Chunk(offset=begin, kind=_KINDS[kind], thread=thread, used=used))
        position += size
    return found, f"the file ends at byte {length}, where no chunk ends" if length % layout.ALIGNMENT else ""


def _header_at(file: BinaryIO, position: int) -> tuple[int, int, int, int, int, int] | None:
    """The words of a chunk's header: magic, kind, thread, record bytes, bytes, used; None at the end of the file."""
    file.seek(position)
    data = file.read(_CHUNK.size)
    return _CHUNK.unpack(data) if len(data) == _CHUNK.size else None


def _is_chunk(kind: int, record_bytes: int, size: int, used: int) -> bool:
    return (
        kind in _KINDS
        and record_bytes == _RECORD_BYTES[kind]
        and used % (record_bytes or 8) == 0
        and size % layout.ALIGNMENT == 0
        and layout.CHUNK.itemsize + used <= size
    )


def _next_chunk(file: BinaryIO, begin: int, end: int) -> int | None:
    """Where the first chunk between two bytes begins."""
    for piece in range(begin, end, layout.SEGMENT_BYTES):
        file.seek(piece)
        data = np.frombuffer(file.read(min(layout.SEGMENT_BYTES, end - piece)), np.uint8)
        data = data[: len(data) // layout.ALIGNMENT * layout.ALIGNMENT].reshape(-1, layout.ALIGNMENT)
        headers = data[:, : layout.CHUNK.itemsize].copy().view(layout.CHUNK)[:, 0]
        for place in np.flatnonzero(headers["magic"] == layout.CHUNK_MAGIC).tolist():
            words = (int(headers[name][place]) for name in ("kind", "record_bytes", "bytes", "used"))
            if _is_chunk(*words):
                return piece + int(place) * layout.ALIGNMENT
    return None


def _load(path: Path, file: BinaryIO, chunks: list[Chunk]) -> NDArray[np.uint8]:
    """Read what chunks hold into one array."""
    data = np.empty(sum(chunk.used for chunk in chunks), np.uint8)
    room = memoryview(data.data)
    for chunk in chunks:
        file.seek(chunk.offset)
        piece, room = room[: chunk.used], room[chunk.used :]
        while len(piece):
            count = file.readinto(piece)  # type: ignore[attr-defined]
            if not count:
                raise broken(path, chunk.offset, "the file became shorter while it was read")
            piece = piece[count:]
    return data
