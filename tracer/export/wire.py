"""Protobuf's wire format: single messages from bytes, and many messages of one layout from columns.

A column's numbers take the bytes that its largest needs: a varint may be written longer than it must be, and so every
message of a layout is as long as the other, all lengths in it are constants, and a million of them are a few array
operations.

Source: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Unsigned = NDArray[np.uint64]
_VARINT, _FIXED64, _BYTES = 0, 1, 2
_STRETCH = 1 << 12  # rows written at once: they stay in a core's cache
_GROUP = 8  # bytes of a varint that are made at once, seven bits each
# Halves of a number move apart, then halves of those, until seven bits are in each byte.
_MOVES = (
    (4, 0x000000000FFFFFFF, 0x00FFFFFFF0000000, 4),
    (2, 0x00003FFF00003FFF, 0x0FFFC0000FFFC000, 2),
    (1, 0x007F007F007F007F, 0x3F803F803F803F80, 1),
)
_MORE = 0x8080808080808080


def varint(number: int) -> bytes:
    """Write one number that is not negative."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def number_field(field: int, number: int) -> bytes:
    """Write a field of an unsigned number, an enumeration or a truth value; a negative one as its two's complement."""
    return varint(field << 3 | _VARINT) + varint(number & 0xFFFFFFFFFFFFFFFF)


def bytes_field(field: int, content: bytes | str) -> bytes:
    """Write a field of text, bytes or a message."""
    raw = content.encode() if isinstance(content, str) else content
    return varint(field << 3 | _BYTES) + varint(len(raw)) + raw


def packed_field(field: int, numbers: Sequence[int]) -> bytes:
    """Write a field of many unsigned numbers; nothing for none."""
    return bytes_field(field, b"".join(map(varint, numbers))) if numbers else b""


@dataclass(frozen=True, slots=True)
class Column:
    """Numbers of many messages: `width` bytes each, as varints or as they lie in memory."""

    values: Unsigned
    width: int
    is_fixed: bool


Part = bytes | Column


def number_column(field: int, values: Unsigned) -> list[Part]:
    """Write a field of unsigned numbers, one a message."""
    return [varint(field << 3 | _VARINT), Column(values, _width(values), is_fixed=False)]


def fixed_column(field: int, values: Unsigned) -> list[Part]:
    """Write a field of 64 bits, one a message."""
    return [varint(field << 3 | _FIXED64), Column(values, 8, is_fixed=True)]


def message_column(field: int, parts: Sequence[Part]) -> list[Part]:
    """Write a field of messages that are `parts` one after the other."""
    return [varint(field << 3 | _BYTES) + varint(_size(parts)), *parts]


def write_rows(parts: Sequence[Part], num_rows: int) -> Iterator[memoryview]:
    """Lay the parts one after the other, row by row, in stretches."""
    row = np.frombuffer(b"".join(part if isinstance(part, bytes) else bytes(part.width) for part in parts), np.uint8)
    for begin in range(0, num_rows, _STRETCH):
        rows = np.empty((min(_STRETCH, num_rows - begin), len(row)), np.uint8)
        rows[:] = row
        at = 0
        for part in parts:
            if isinstance(part, Column):
                _lay(rows, at, part, part.values[begin : begin + len(rows)])
            at += _size([part])
        yield rows.reshape(-1).data


def _lay(rows: NDArray[np.uint8], at: int, column: Column, values: Unsigned) -> None:
    """Lay a column into rows, `at` bytes from their beginning."""
    if column.is_fixed:
        _lay_words(rows, at, 8, values)
        return
    for done in range(0, column.width, _GROUP):
        width = min(column.width - done, _GROUP)
        words = values if done == 0 else values >> np.uint64(7 * done)
        for apart, low, high, bits in _MOVES:
            if width > apart:
                words = (words & np.uint64(low)) | (words & np.uint64(high)) << np.uint64(bits)
        more = _MORE >> 8 * (_GROUP - width) if done + width < column.width else (1 << 8 * (width - 1)) - 1 & _MORE
        _lay_words(rows, at + done, width, words | np.uint64(more) if more else words)


def _lay_words(rows: NDArray[np.uint8], at: int, width: int, words: Unsigned) -> None:
    """Lay the lowest `width` bytes of words; numbers of one, two, four and eight bytes are laid at once."""
    for size in (8, 4, 2, 1):
        if width & size:
            place = np.ndarray((len(rows),), f"<u{size}", rows.data, at, (rows.shape[1],))
            place[:] = words
            words = words >> np.uint64(8 * size) if width & (size - 1) else words
            at += size


def _size(parts: Sequence[Part]) -> int:
    return sum(len(part) if isinstance(part, bytes) else part.width for part in parts)


def _width(values: Unsigned) -> int:
    return max(1, -(-int(values.max(initial=np.uint64(0))).bit_length() // 7))
