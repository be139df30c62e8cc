"""Protobuf messages read without their schema: (field, value), values as numbers or bytes. Written for tests alone."""

from collections.abc import Iterator


def read_message(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(raw):
        key, at = read_varint(raw, at)
        field, kind = key >> 3, key & 7
        if kind == 0:
            value, at = read_varint(raw, at)
            yield field, value
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            yield field, int.from_bytes(raw[at : at + size], "little")
            at += size
        elif kind == 2:
            size, at = read_varint(raw, at)
            assert at + size <= len(raw)
            yield field, raw[at : at + size]
            at += size
        else:
            raise AssertionError(f"wire type {kind}")


def read_varint(raw: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        number |= (raw[at] & 0x7F) << shift
        shift += 7
        at += 1
        if raw[at - 1] < 0x80:
            return number, at


def first(raw: bytes, field: int) -> int | bytes | None:
    return next((value for number, value in read_message(raw) if number == field), None)


def every(raw: bytes, field: int) -> list[int | bytes]:
    return [value for number, value in read_message(raw) if number == field]


def read_packed(raw: bytes) -> list[int]:
    numbers, at = [], 0
    while at < len(raw):
        number, at = read_varint(raw, at)
        numbers.append(number)
    return numbers
