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
_STRETCH = 1 << 14  # rows written at once: they stay in a core's cache


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
    size = sum(len(part) if isinstance(part, bytes) else part.width for part in parts)
    return [varint(field << 3 | _BYTES) + varint(size), *parts]


def write_rows(parts: Sequence[Part], num_rows: int) -> Iterator[bytes]:
    """Lay the parts one after the other, row by row, in stretches."""
    width = sum(len(part) if isinstance(part, bytes) else part.width for part in parts)
    constants, columns = _merge(parts)
    for begin in range(0, num_rows, _STRETCH):
        rows = np.empty((min(_STRETCH, num_rows - begin), width), np.uint8)
        for at, raw in constants:
            rows[:, at : at + len(raw)] = np.frombuffer(raw, np.uint8)
        for at, column in columns:
            values = column.values[begin : begin + len(rows)]
            if column.is_fixed:
                rows[:, at : at + 8] = np.ascontiguousarray(values).astype("<u8").view(np.uint8).reshape(-1, 8)
                continue
            for place in range(column.width):
                more = 0x80 if place + 1 < column.width else 0
                rows[:, at + place] = (values >> np.uint64(7 * place)).astype(np.uint8) & 0x7F | more
        yield rows.tobytes()


def _merge(parts: Sequence[Part]) -> tuple[list[tuple[int, bytes]], list[tuple[int, Column]]]:
    """Say where in a row the constants and the columns lie; neighbouring constants become one."""
    constants: list[tuple[int, bytes]] = []
    columns: list[tuple[int, Column]] = []
    at = 0
    for part in parts:
        if isinstance(part, Column):
            columns.append((at, part))
            at += part.width
            continue
        if constants and constants[-1][0] + len(constants[-1][1]) == at:
            begin, raw = constants.pop()
            constants.append((begin, raw + part))
        else:
            constants.append((at, part))
        at += len(part)
    return constants, columns


def _width(values: Unsigned) -> int:
    return max(1, -(-int(values.max(initial=np.uint64(0))).bit_length() // 7))
