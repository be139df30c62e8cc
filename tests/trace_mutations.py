"""Break trace files in every way that disks, copies and bad luck know, and a few that only malice does."""

import gzip
import json
import random
import struct
from collections.abc import Callable, Sequence

from truedag.tracer.record import format as layout

_HEADER = struct.Struct("<4I2Q32x")
_EXTREMES_32 = (0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 4096, 65536)
_EXTREMES_64 = (0, 1, 4096, 1 << 31, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 4096)
_PAGE = layout.ALIGNMENT

Chunk = tuple[int, int, int]  # position, bytes, bytes of records


def chunks_of(data: bytes | bytearray) -> list[Chunk]:
    """The chunks of a whole trace."""
    found = []
    position = layout.FILE_HEADER_BYTES
    while position + _HEADER.size <= len(data):
        magic, _, _, _, size, used = _HEADER.unpack_from(data, position)
        if magic != layout.CHUNK_MAGIC or not 0 < size <= len(data) - position:
            break
        found.append((position, size, min(used, size - _HEADER.size)))
        position += size
    return found


def mutate(chance: random.Random, traces: Sequence[bytes]) -> bytes:
    """Return one of the traces with one to four things wrong; one in ten is compressed."""
    data = bytearray(chance.choice(traces))
    if chance.random() < 0.5:
        data[16] = 0  # as it is before the recorder closes it
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        chance.choice(_MUTATIONS)(chance, data, traces)
    if chance.random() < 0.9:
        return bytes(data)
    packed = bytearray(gzip.compress(bytes(data), compresslevel=1))
    if chance.random() < 0.5:
        chance.choice((_flip, _overwrite, _cut))(chance, packed, traces)
    return bytes(packed)


def _somewhere(chance: random.Random, data: bytearray) -> int:
    """A byte that means something: of a header, or of what a chunk holds."""
    chunks = chunks_of(data)
    if not chunks or chance.random() < 0.1:
        return chance.randrange(max(len(data), 1))
    position, _, used = chance.choice(chunks)
    if chance.random() < 0.3:
        return position + chance.randrange(_HEADER.size)
    return position + _HEADER.size + chance.randrange(max(used, 1))


def _flip(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    for _ in range(chance.randint(1, 4)):
        place = _somewhere(chance, data)
        if place < len(data):
            data[place] ^= 1 << chance.randrange(8)


def _overwrite(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    begin = _somewhere(chance, data)
    piece = chance.randbytes(chance.choice((1, 1, 4, 8, 64)))
    data[begin : begin + len(piece)] = piece[: max(len(data) - begin, 0)]


def _extreme(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    word, values = chance.choice((("<I", _EXTREMES_32), ("<Q", _EXTREMES_64)))
    size = struct.calcsize(word)
    place = _somewhere(chance, data) // 4 * 4
    if place + size <= len(data):
        struct.pack_into(word, data, place, chance.choice(values))


def _cut(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[chance.randrange(len(data) + 1) // chance.choice((1, _PAGE)) * chance.choice((1, _PAGE)) :]


def _zero_pages(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    begin = chance.randrange(len(data) // _PAGE + 1) * _PAGE
    end = min(begin + chance.choice((1, 1, 2, 8)) * _PAGE, len(data))
    data[begin:end] = bytes(max(end - begin, 0))


def _splice(chance: random.Random, data: bytearray, traces: Sequence[bytes]) -> None:
    """A chunk of one of the traces, in place of a chunk, or before it, or after everything."""
    other = chance.choice(traces)
    position, size, _ = chance.choice(chunks_of(other))
    piece = other[position : position + size]
    mine = chunks_of(data) or [(len(data), 0, 0)]
    begin, length, _ = chance.choice(mine)
    how = chance.randrange(3)
    if how == 0:
        data[begin : begin + length] = piece
    elif how == 1:
        data[begin:begin] = piece
    else:
        data += piece


def _drop(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    for position, size, _ in chance.sample(chunks_of(data), k=min(1, len(chunks_of(data)))):
        del data[position : position + size]


def _duplicate(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    for position, size, _ in chance.sample(chunks_of(data), k=min(1, len(chunks_of(data)))):
        data[position:position] = data[position : position + size]


def _append_table(chance: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    """An entry of the tables with what no recorder writes."""
    kind = chance.choice([*layout.TableKind, 0, 5, 99])
    payload = chance.choice(_PAYLOADS)
    entry = struct.pack("<4I", kind, chance.choice((0, 1, 2, 5000, 0xFFFFFFFF)), len(payload), 0)
    body = entry + payload + bytes(-len(payload) % 8)
    size = -(-(len(body) + _HEADER.size) // _PAGE) * _PAGE
    header = _HEADER.pack(layout.CHUNK_MAGIC, layout.ChunkKind.TABLES, 0, 0, size, len(body))
    data += (header + body).ljust(size, b"\0")


_PAYLOADS = (
    b"",
    b"{}",
    b"[]",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"1" * 10_000,
    b'{"rank":1e999}',
    b'{"rank":-1}',
    b'{"rank":true,"world_size":2}',
    b'{"rank":"0","world_size":1}',
    b"\xff\xfe{\x00}\x00",
    b'{"name":"\\ud800","overload":"","schema":""}',
    b'{"name":3,"overload":"","schema":""}',
    b'{"module":"\\ud800","layer":1e999,"expert":99999999999999999999,"category":[]}',
    b'{"name":"g","rank":0,"size":1,"ranks":[-1]}',
    b'{"name":"g","rank":0,"size":1,"ranks":[["0"]]}',
    b'{"autograd_thread":-9223372036854775809}',
    json.dumps({"name": "n", "role": "r", "storage": 1 << 62, "layout": 0, "offset_bytes": 0, "time_ns": 0}).encode(),
    struct.pack("<4i", 6, 0, 4, -1),
    struct.pack("<4i", 6, 0, 4, 0x7FFFFFFF),
    struct.pack("<4i2q", 6, 0, 4, 1, -1, 1),
    struct.pack("<4i4q", 6, 0, 0x7FFFFFFF, 2, (1 << 63) - 1, (1 << 63) - 1, -(1 << 63), 1),
    struct.pack("<3I", 1, 0xFFFFFFFF, 1),
    struct.pack("<3I", 0xFFFFFFFF, 0, 0),
    struct.pack("<3I2H", 1, 1, 0, 0xFFFF, 0xFFFF),
)

_MUTATIONS: tuple[Callable[[random.Random, bytearray, Sequence[bytes]], None], ...] = (
    _flip,
    _overwrite,
    _extreme,
    _extreme,
    _cut,
    _zero_pages,
    _splice,
    _drop,
    _duplicate,
    _append_table,
)
