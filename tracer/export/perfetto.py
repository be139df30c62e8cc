"""Perfetto's protobuf traces: ranks are processes, threads and streams are threads, communications have flows.

Packets of one layout are written as arrays (`wire.py`). Perfetto sorts packets by time, and those of one moment by
their place in the file: so of each rank all ends come first, then what takes no time, then all beginnings, outer slices
before inner ones, and slices that a message leads to come last of all.

Source: perfetto.dev/docs/reference/trace-packet-proto, field numbers of TracePacket, TrackEvent, TrackDescriptor,
InternedData and DebugAnnotation.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl

from truedag.tracer.export.timeline import NUMBERS, TEXTS, RankTimeline, list_timelines, list_tracks
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


@dataclass(frozen=True, slots=True)
class _Texts:
    """Texts of a rank and their numbers, from 1."""

    known: pl.Enum

    @classmethod
    def collect(cls, frame: pl.DataFrame, *names: str) -> _Texts:
        """Take them from columns."""
        return cls(
            pl.Enum(pl.concat([frame[name].unique().drop_nulls().alias("text") for name in names]).unique().sort())
        )

    def number(self, name: str) -> pl.Expr:
        """Return the number of each text of a column; null stays null."""
        return (pl.col(name).cast(self.known).to_physical().cast(pl.UInt64) + 1).alias(name)

    def write(self, kind: int) -> bytes:
        """Write them as entries of InternedData."""
        return b"".join(
            bytes_field(kind, number_field(1, number) + bytes_field(2, text))
            for number, text in enumerate(self.known.categories, start=1)
        )


def write_perfetto(graph: Graph, path: Path, show: Callable[[str], None]) -> Mapping[str, int]:
    """Write a trace that the Perfetto UI and trace processor read; returns how many slices are in it.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("wb") as file:
        return write_timelines(list_timelines(graph), file, show)


def write_timelines(
    timelines: Iterable[RankTimeline], file: BinaryIO, show: Callable[[str], None]
) -> Mapping[str, int]:
    """Write ranks one after the other; times are from the recording's beginning."""
    num_slices = 0
    late: list[bytes] = []
    pending: deque[Future[tuple[list[bytes], list[bytes]]]] = deque()

    def write_first() -> None:
        parts, last = pending.popleft().result()
        file.writelines(parts)
        late.extend(last)

    # Ranks are encoded while others are read; arrays are worked on without Python's lock.
    with ThreadPoolExecutor(_WORKERS) as pool:
        for timeline in timelines:
            show(f"writing rank {timeline.rank}")
            num_slices += len(timeline.slices)
            pending.append(pool.submit(_encode_rank, timeline))
            if len(pending) > _WORKERS:
                write_first()
        while pending:
            write_first()
    file.writelines(late)
    return {"num_slices": num_slices}


def _encode_rank(timeline: RankTimeline) -> tuple[list[bytes], list[bytes]]:
    """Return a rank's packets, and those that must come after the packets of all ranks."""
    late: list[bytes] = []
    return list(_write_rank(timeline, late)), late


def _write_rank(timeline: RankTimeline, late: list[bytes]) -> Iterator[bytes]:
    slices = timeline.slices
    sequence = timeline.rank + 1
    tracks = {name: (sequence << 20) + place + 1 for place, name in enumerate(list_tracks(slices))}
    yield _describe_process(timeline, sequence)
    for place, (name, uuid) in enumerate(tracks.items()):
        yield _describe_thread(name, uuid, sequence, place)
    names, categories = _Texts.collect(slices, "name"), _Texts.collect(slices, "category")
    texts, places = _Texts.collect(slices, *TEXTS), pl.Enum(list(tracks))
    encoded = slices.select(
        "flow", "is_receive", "is_inner", *NUMBERS,
        names.number("name"), categories.number("category"), *(texts.number(name) for name in TEXTS),
        begin="start_ns", end="end_ns",
        uuid=pl.col("track").cast(places).to_physical().cast(pl.UInt64) + (sequence << 20) + 1,
    )  # fmt: skip
    keys = b"".join(
        bytes_field(_ANNOTATION_NAMES, number_field(1, place) + bytes_field(2, key))
        for place, key in enumerate(_KEYS, start=1)
    )
    interned = categories.write(_CATEGORIES) + names.write(_NAMES) + keys + texts.write(_ANNOTATION_TEXTS)
    yield _packet(number_field(_SEQUENCE, sequence) + number_field(_FLAGS, _CLEARED) + bytes_field(_INTERNED, interned))
    leads_here = pl.col("is_receive") & pl.col("is_inner") & pl.col("flow").is_not_null()
    instant, lasting = pl.col("begin") == pl.col("end"), pl.col("begin") < pl.col("end")
    yield from _write_ends(encoded.filter(lasting), sequence)
    yield from _write_begins(encoded.filter(instant & ~leads_here), sequence, is_instant=True)
    yield from _write_begins(encoded.filter(lasting & ~leads_here & ~pl.col("is_inner")), sequence)
    yield from _write_begins(encoded.filter(lasting & ~leads_here & pl.col("is_inner")), sequence)
    late += _write_begins(encoded.filter(instant & leads_here), sequence, is_instant=True)
    late += _write_begins(encoded.filter(lasting & leads_here), sequence)


def _write_begins(slices: pl.DataFrame, sequence: int, *, is_instant: bool = False) -> Iterator[bytes]:
    """Write beginnings, those with equal annotations together; of what takes no time each with its end."""
    told = (*_KEYS, "flow")
    layout = pl.sum_horizontal(
        pl.col(name).is_not_null().cast(pl.Int64) * (1 << place) for place, name in enumerate(told)
    )
    for (bits,), rows in slices.with_columns(layout=layout).partition_by("layout", as_dict=True).items():
        has = {name for place, name in enumerate(told) if bits >> place & 1}
        event: list[Part] = [
            number_field(_TYPE, _BEGIN),
            *number_column(_TRACK, _numbers(rows, "uuid")),
            *number_column(_NAME_IID, _numbers(rows, "name")),
            *number_column(_CATEGORY_IID, _numbers(rows, "category")),
        ]
        for place, key in enumerate(_KEYS, start=1):
            if key in has:
                value = number_column(_TEXT_IID if key in TEXTS else _INTEGER, _numbers(rows, key))
                event += message_column(_ANNOTATION, [number_field(_KEY_IID, place), *value])
        if "flow" in has:
            event += fixed_column(_FLOW, _numbers(rows, "flow"))
        parts = _event_packet(rows, "begin", event, sequence)
        if is_instant:
            parts += _end_packet(rows, sequence)
        yield from write_rows(parts, len(rows))


def _write_ends(slices: pl.DataFrame, sequence: int) -> Iterator[bytes]:
    yield from write_rows(_end_packet(slices, sequence), len(slices))


def _end_packet(rows: pl.DataFrame, sequence: int) -> list[Part]:
    event: list[Part] = [number_field(_TYPE, _END), *number_column(_TRACK, _numbers(rows, "uuid"))]
    return _event_packet(rows, "end", event, sequence)


def _event_packet(rows: pl.DataFrame, time: str, event: list[Part], sequence: int) -> list[Part]:
    head = number_column(_TIMESTAMP, _numbers(rows, time))
    flags = number_field(_SEQUENCE, sequence) + number_field(_FLAGS, _NEEDS)
    return message_column(_PACKET, [*head, flags, *message_column(_EVENT, event)])


def _numbers(rows: pl.DataFrame, name: str) -> Unsigned:
    return np.ascontiguousarray(rows[name].cast(pl.UInt64).to_numpy())


def _describe_process(timeline: RankTimeline, sequence: int) -> bytes:
    process = number_field(1, sequence) + bytes_field(6, timeline.name)
    track = number_field(1, sequence << 20) + bytes_field(2, timeline.name) + bytes_field(3, process)
    return _packet(number_field(_SEQUENCE, sequence) + bytes_field(_DESCRIPTOR, track))


def _describe_thread(name: str, uuid: int, sequence: int, place: int) -> bytes:
    # Thread numbers of all ranks differ: Perfetto takes equal ones for one thread of the machine.
    thread = number_field(1, sequence) + number_field(2, (sequence << 10) + place) + bytes_field(5, name)
    order = number_field(12, place)
    track = number_field(1, uuid) + number_field(5, sequence << 20) + bytes_field(2, name) + bytes_field(4, thread)
    return _packet(number_field(_SEQUENCE, sequence) + bytes_field(_DESCRIPTOR, track + order))


def _packet(content: bytes) -> bytes:
    return bytes_field(_PACKET, content)
