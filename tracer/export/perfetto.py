"""Perfetto's protobuf traces: ranks are processes, threads and streams are threads, communications have flows.

Packets of one layout are written as arrays (`wire.py`). Perfetto sorts packets by time, and those of one moment by
their place in the file: so of ranks that are written together all ends come first, then what takes no time, then all
beginnings, outer slices before inner ones, and slices that a message leads to come last of all. Ranks that are written
together are a sequence of packets: they refer to the same texts by number.

Source: perfetto.dev/docs/reference/trace-packet-proto, field numbers of TracePacket, TrackEvent, TrackDescriptor,
InternedData and DebugAnnotation.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl

from truedag.tracer.export.numbering import Ints, number_values, sort_places
from truedag.tracer.export.timeline import NUMBERS, TEXTS, Timeline, list_timelines
from truedag.tracer.export.wire import (
    Part,
    Unsigned,
    bytes_field,
    fixed_column,
    message_column,
    number_column,
    number_field,
    write_rows,
)
from truedag.tracer.graph import Graph

# Fields of the messages that are written.
_PACKET = 1
_TIMESTAMP, _SEQUENCE, _EVENT, _INTERNED, _FLAGS, _DESCRIPTOR = 8, 10, 11, 12, 13, 60
_CATEGORY_IID, _ANNOTATION, _TYPE, _NAME_IID, _TRACK, _FLOW = 3, 4, 9, 10, 11, 47
_CATEGORIES, _NAMES, _ANNOTATION_NAMES, _ANNOTATION_TEXTS = 1, 2, 3, 29
_KEY_IID, _INTEGER, _TEXT_IID = 1, 4, 17
_BEGIN, _END = 1, 2
_CLEARED, _NEEDS = 1, 2
_WORKERS = max(1, min(4, os.cpu_count() or 1))
_KEYS = (*NUMBERS, *TEXTS)
# A slice's layout: which of these it has, a bit each, and what it is.
_TOLD = (*_KEYS, "flow")
_IS_INNER, _IS_LASTING, _IS_LATE = (1 << len(_TOLD) + place for place in range(3))
Packets = Sequence[bytes | memoryview]


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Packets of some ranks, and those that must come after the packets of all."""

    last_rank: int
    num_slices: int
    packets: Packets
    late: Packets


def write_perfetto(graph: Graph, path: Path, show: Callable[[str], None]) -> Mapping[str, int]:
    """Write a trace that the Perfetto UI and trace processor read; returns how many slices are in it.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("wb") as file:
        return write_timelines(list_timelines(graph), file, show)


def write_timelines(
    timelines: Iterable[Callable[[], Timeline]], file: BinaryIO, show: Callable[[str], None]
) -> Mapping[str, int]:
    """Write what `list_timelines` returns; times are from the recording's beginning."""
    num_slices = 0
    late: list[bytes | memoryview] = []
    pending: deque[Future[_Encoded]] = deque()

    def write_first() -> int:
        done = pending.popleft().result()
        show(f"writing rank {done.last_rank}")
        file.writelines(done.packets)
        late.extend(done.late)
        return done.num_slices

    # Ranks are made into slices and encoded while others are read: most of that holds no lock of Python's.
    with ThreadPoolExecutor(_WORKERS) as pool:
        for sequence, make in enumerate(timelines, start=1):
            pending.append(pool.submit(_encode, make, sequence))
            if len(pending) > _WORKERS:
                num_slices += write_first()
        while pending:
            num_slices += write_first()
    file.writelines(late)
    return {"num_slices": num_slices}


def _encode(make: Callable[[], Timeline], sequence: int) -> _Encoded:
    timeline = make()
    columns = _Columns.take(timeline)
    packets: list[bytes | memoryview] = [*_describe_tracks(timeline, sequence), columns.write_texts(sequence)]
    late: list[bytes | memoryview] = []
    packets += _write_ends(columns, sequence)
    known, layout = number_values(columns.layout)
    order, begins = sort_places(layout, len(known))
    by_moment = sorted(range(len(known)), key=lambda place: (known[place] & _IS_LASTING, known[place] & _IS_INNER))
    for place in by_moment:
        bits = int(known[place])
        rows = columns.choose(order[begins[place] : begins[place + 1]], bits)
        (late if bits & _IS_LATE else packets).extend(_write_begins(rows, bits, sequence))
    return _Encoded(max(timeline.names, default=0), len(timeline.slices), packets, late)


@dataclass(frozen=True, slots=True)
class _Columns:
    """What is written of slices, as unsigned numbers.

    Attributes:
        values: [slices] begin, end, uuid, name, category, and those of _TOLD, which mean nothing where a slice has
            none of them.
        layout: [slices] bits of _TOLD, _IS_INNER, _IS_LASTING, _IS_LATE.
        texts: for each field of InternedData what name, category and texts number, from 1.
    """

    values: Mapping[str, Unsigned]
    layout: Ints
    texts: Mapping[int, Sequence[str]]

    @classmethod
    def take(cls, timeline: Timeline) -> _Columns:
        """Number the texts of slices, and find out what each has."""
        slices = timeline.slices
        uuids = timeline.tracks.select((pl.col("rank") + 1) * (1 << 20) + pl.col("place") + 1)
        values = {
            "begin": _unsigned(slices["start_ns"]),
            "end": _unsigned(slices["end_ns"]),
            "uuid": _unsigned(uuids.to_series())[slices["track"].to_numpy()],
        }
        texts: dict[int, list[str]] = {_CATEGORIES: [], _NAMES: [], _ANNOTATION_TEXTS: []}
        layout = slices["is_inner"].to_numpy() * _IS_INNER + (values["begin"] < values["end"]) * _IS_LASTING
        for name, field in (
            ("name", _NAMES),
            ("category", _CATEGORIES),
            *((name, _ANNOTATION_TEXTS) for name in TEXTS),
        ):
            values[name] = _number_texts(slices[name], texts[field])
        for place, name in enumerate(_TOLD):
            if name in TEXTS:
                has = values[name] > 0
            else:
                own = slices[name].fill_null(-1).to_numpy()
                has, values[name] = own >= 0, own.view(np.uint64)
            layout += has.astype(np.int64) << place
        is_led = (
            slices["is_receive"].to_numpy() & slices["is_inner"].to_numpy() & slices["flow"].is_not_null().to_numpy()
        )
        return cls(values, layout + is_led * _IS_LATE, texts)

    def choose(self, rows: Ints, bits: int) -> Mapping[str, Unsigned]:
        """Return what some slices have that are laid out alike."""
        has = [name for place, name in enumerate(_TOLD) if bits >> place & 1]
        return {name: self.values[name][rows] for name in ("begin", "end", "uuid", "name", "category", *has)}

    def write_texts(self, sequence: int) -> bytes:
        """Write the packet that says which texts the numbers stand for."""
        entries = [
            bytes_field(field, number_field(1, number) + bytes_field(2, text))
            for field, texts in (*self.texts.items(), (_ANNOTATION_NAMES, _KEYS))
            for number, text in enumerate(texts, start=1)
        ]
        flags = number_field(_SEQUENCE, sequence) + number_field(_FLAGS, _CLEARED)
        return _packet(flags + bytes_field(_INTERNED, b"".join(entries)))


def _unsigned(numbers: pl.Series) -> Unsigned:
    return numbers.to_numpy().view(np.uint64)


def _number_texts(column: pl.Series, known: list[str]) -> Unsigned:
    """Number a column's texts after those that are known already, and add them there; null is 0."""
    if column.null_count() == len(column):
        return np.zeros(len(column), np.uint64)
    codes = column.cast(pl.Categorical).to_physical().cast(pl.Int64).fill_null(-1).to_numpy()
    place = np.full(codes.max(initial=0) + 2, -1)  # where each text is found; the last is that of null
    place[codes] = np.arange(len(codes))
    place[-1] = -1
    is_used = place >= 0
    numbers: Unsigned = np.where(is_used, np.cumsum(is_used) + len(known), 0).astype(np.uint64)
    known += column.gather(place[is_used]).to_list()
    chosen: Unsigned = numbers[codes]
    return chosen


def _write_begins(rows: Mapping[str, Unsigned], bits: int, sequence: int) -> Iterator[memoryview]:
    """Write beginnings of slices that are laid out alike; of what takes no time each with its end."""
    event: list[Part] = [
        number_field(_TYPE, _BEGIN),
        *number_column(_TRACK, rows["uuid"]),
        *number_column(_NAME_IID, rows["name"]),
        *number_column(_CATEGORY_IID, rows["category"]),
    ]
    for place, key in enumerate(_KEYS, start=1):
        if key in rows:
            value = number_column(_TEXT_IID if key in TEXTS else _INTEGER, rows[key])
            event += message_column(_ANNOTATION, [number_field(_KEY_IID, place), *value])
    if "flow" in rows:
        event += fixed_column(_FLOW, rows["flow"])
    parts = _event_packet(rows["begin"], event, sequence)
    if not bits & _IS_LASTING:
        parts += _end_packet(rows["end"], rows["uuid"], sequence)
    return write_rows(parts, len(rows["begin"]))


def _write_ends(columns: _Columns, sequence: int) -> Iterator[memoryview]:
    lasting = np.flatnonzero(columns.layout & _IS_LASTING)
    parts = _end_packet(columns.values["end"][lasting], columns.values["uuid"][lasting], sequence)
    return write_rows(parts, len(lasting))


def _end_packet(end: Unsigned, uuid: Unsigned, sequence: int) -> list[Part]:
    return _event_packet(end, [number_field(_TYPE, _END), *number_column(_TRACK, uuid)], sequence)


def _event_packet(time: Unsigned, event: list[Part], sequence: int) -> list[Part]:
    head = number_column(_TIMESTAMP, time)
    flags = number_field(_SEQUENCE, sequence) + number_field(_FLAGS, _NEEDS)
    return message_column(_PACKET, [*head, flags, *message_column(_EVENT, event)])


def _describe_tracks(timeline: Timeline, sequence: int) -> Iterator[bytes]:
    for rank, name in timeline.names.items():
        yield _describe_process(rank, name, sequence)
    for rank, place, name in timeline.tracks.select("rank", "place", "name").iter_rows():
        yield _describe_thread(rank, place, name, sequence)


def _describe_process(rank: int, name: str, sequence: int) -> bytes:
    process = number_field(1, rank + 1) + bytes_field(6, name)
    track = number_field(1, rank + 1 << 20) + bytes_field(2, name) + bytes_field(3, process)
    return _packet(number_field(_SEQUENCE, sequence) + bytes_field(_DESCRIPTOR, track))


def _describe_thread(rank: int, place: int, name: str, sequence: int) -> bytes:
    # Thread numbers of all ranks differ: Perfetto takes equal ones for one thread of the machine.
    thread = number_field(1, rank + 1) + number_field(2, (rank + 1 << 10) + place) + bytes_field(5, name)
    order = number_field(12, place)
    parent = number_field(5, rank + 1 << 20)
    track = number_field(1, (rank + 1 << 20) + place + 1) + parent + bytes_field(2, name) + bytes_field(4, thread)
    return _packet(number_field(_SEQUENCE, sequence) + bytes_field(_DESCRIPTOR, track + order))


def _packet(content: bytes) -> bytes:
    return bytes_field(_PACKET, content)
