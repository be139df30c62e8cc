"""Read what Kineto recorded of a rank's GPUs: kernels, copies, the calls that launched them, and who waited for whom.

The file lies beside the rank's trace (`record/kernels_file.py`) and is what `torch.profiler` exports: one JSON object
whose `traceEvents` can be any number, so it is read event by event and kept as columns. Kineto writes times in
microseconds with three decimals, relative to `baseTimeNanoseconds` of Unix time (older ones: whole microseconds of Unix
time); here they are ns of CLOCK_MONOTONIC, set by the clock samples of the trace. Sources: pytorch/kineto,
libkineto/src/output_json.cpp, CuptiActivity.h, CuptiActivityProfiler.cpp; NVIDIA CUPTI, cupti_activity.h.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.errors import TraceError

KERNEL_KINDS = ("kernel", "memcpy", "memset")
SYNC_KINDS = ("Stream Sync", "Context Sync", "Event Sync", "Stream Wait Event")
NONE = -1  # no stream, no correlation

# `correlation` is the number of the API call that launched it; calls of a process are numbered in the order in which
# they were made. `graph` is that of the CUDA graph it is a node of, 0: none.
KERNEL = np.dtype(
    [
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
        ("bytes", "<i8"),
        ("correlation", "<i8"),
        ("graph", "<i8"),
        ("stream", "<i8"),
        ("device", "<i4"),
        ("kind", "<i4"),
        ("name", "<i4"),
    ]
)
# `thread` is the OS thread's number, or the lower half of its pthread_t where Kineto did not know the thread.
CALL = np.dtype([("start_ns", "<i8"), ("end_ns", "<i8"), ("correlation", "<i8"), ("thread", "<i8"), ("name", "<i4")])
# `stream` waits (a wait for an event) or is waited for by the host; what an event stands for is all that was launched
# on `event_stream` before `event_correlation`.
SYNC = np.dtype(
    [
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
        ("correlation", "<i8"),
        ("stream", "<i8"),
        ("event_stream", "<i8"),
        ("event_correlation", "<i8"),
        ("device", "<i4"),
        ("kind", "<i4"),
    ]
)

_CATEGORIES = {"kernel": 0, "gpu_memcpy": 1, "gpu_memset": 2}
_CALLS = frozenset({"cuda_runtime", "cuda_driver"})
_BLOCK = 1 << 16  # rows kept as tuples before they become a column
_PIECE = 1 << 20  # characters read at once
_MOST = 1 << 26  # characters of one value
_NO_STREAM = 0xFFFFFFFF  # as older versions write -1


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTrace:
    """What one rank's GPUs did, as structured arrays (`KERNEL`, `CALL`, `SYNC`) in the order of the file."""

    path: Path
    kernels: NDArray[np.void]
    calls: NDArray[np.void]
    syncs: NDArray[np.void]
    names: list[str]
    clock_error_ns: int  # how far the host's two clocks may be apart from what was sampled of them


def read_kernels(path: Path, meta: Mapping[str, Any]) -> DeviceTrace | None:
    """Read a rank's kernels; None where nothing was recorded of a GPU.

    Args:
        path: the file, gzipped.
        meta: the trace's, with its clock samples.

    Raises:
        TraceError: the file is no Kineto trace, or is broken (with the event).
    """
    if not path.exists():
        return None
    rows = _Rows(path)
    base_ns = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            for key, value in _Json(path, file).members("traceEvents"):
                if key == "traceEvents":
                    rows.add(value)
                elif key == "baseTimeNanoseconds":
                    base_ns = rows.integer(value, "baseTimeNanoseconds")
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"cannot read the kernels {path}: {error}; take the file away to merge without it") from error
    kernels, calls, syncs = rows.finish()
    error_ns = 0
    for table in (kernels, calls, syncs):
        for column in ("start_ns", "end_ns"):
            table[column], error_ns = _monotonic(table[column] + base_ns, meta)
    return DeviceTrace(
        path=path, kernels=kernels, calls=calls, syncs=syncs, names=list(rows.names), clock_error_ns=error_ns
    )


def _monotonic(unix_ns: NDArray[np.int64], meta: Mapping[str, Any]) -> tuple[NDArray[np.int64], int]:
    """Take Unix times to CLOCK_MONOTONIC by the samples of both; between them the difference goes linearly."""
    samples = [meta[name] for name in ("clock_begin", "clock_end") if name in meta]
    at = np.array([int(sample["realtime_ns"]) for sample in samples], np.int64)
    apart = [
        int(sample["realtime_ns"]) - int(sample["monotonic_ns"]) - int(sample["spread_ns"]) // 2 for sample in samples
    ]
    drift = np.interp((unix_ns - at[0]).astype(np.float64), at - at[0], np.array(apart) - apart[0])
    return unix_ns - apart[0] - np.rint(drift).astype(np.int64), max(int(sample["spread_ns"]) for sample in samples)


class _Rows:
    """Turns events into columns, in blocks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = 0
        self._rows: dict[np.dtype[np.void], list[tuple[int, ...]]] = {KERNEL: [], CALL: [], SYNC: []}
        self._blocks: dict[np.dtype[np.void], list[NDArray[np.void]]] = {KERNEL: [], CALL: [], SYNC: []}
        self.names: dict[str, int] = {}

    def add(self, event: Any) -> None:
        self._count += 1
        if not isinstance(event, dict):
            raise TraceError(f"{self._path} is broken: event {self._count} is no JSON object")
        category = event.get("cat")
        if event.get("ph") != "X" or not isinstance(category, str):
            return
        args = event.get("args", {})
        if not isinstance(args, dict):
            raise TraceError(f"{self._path} is broken: event {self._count} has args that are no JSON object")
        if category in _CATEGORIES:
            row = (
                self._integer(args, "bytes", 0),
                self._integer(args, "correlation", 0),
                self._integer(args, "graph id", 0),
                self._integer(args, "stream", NONE),
                self._integer(args, "device", 0),
                _CATEGORIES[category],
                self._name(event),
            )
            self._append(KERNEL, event, row)
        elif category in _CALLS:
            thread = self._integer(event, "tid", NONE)
            self._append(CALL, event, (self._integer(args, "correlation", 0), thread, self._name(event)))
        elif category == "cuda_sync" and args.get("cuda_sync_kind") in SYNC_KINDS:
            numbers = (
                self._integer(args, name, NONE)
                for name in ("correlation", "stream", "wait_on_stream", "wait_on_cuda_event_record_corr_id", "device")
            )
            self._append(SYNC, event, (*numbers, SYNC_KINDS.index(args["cuda_sync_kind"])))

    def finish(self) -> tuple[NDArray[np.void], NDArray[np.void], NDArray[np.void]]:
        for kind in self._rows:
            self._flush(kind)
        kernels, calls, syncs = (
            np.concatenate([np.zeros(0, kind), *self._blocks[kind]]) for kind in (KERNEL, CALL, SYNC)
        )
        return kernels, calls, syncs

    def integer(self, value: Any, name: str) -> int:
        """Return a whole number of 64 bits."""
        if not isinstance(value, int) or isinstance(value, bool) or not -(1 << 62) < value < 1 << 62:
            raise TraceError(f"{self._path} is broken: event {self._count} has {name} = {value!r}")
        return value

    def _append(self, kind: np.dtype[np.void], event: Mapping[str, Any], row: tuple[int, ...]) -> None:
        start, duration = self._ns(event, "ts"), self._ns(event, "dur")
        if duration < 0:
            raise TraceError(f"{self._path} is broken: event {self._count} lasts {duration} ns")
        rows = self._rows[kind]
        rows.append((start, start + duration, *row))
        if len(rows) == _BLOCK:
            self._flush(kind)

    def _flush(self, kind: np.dtype[np.void]) -> None:
        try:
            self._blocks[kind].append(np.array(self._rows[kind], kind))
        except OverflowError as error:
            raise TraceError(f"{self._path} is broken: before event {self._count}: {error}") from error
        self._rows[kind].clear()

    def _integer(self, args: Mapping[str, Any], name: str, default: int) -> int:
        value = args.get(name, default)
        return NONE if value == _NO_STREAM and "stream" in name else self.integer(value, name)

    def _name(self, event: Mapping[str, Any]) -> int:
        name = event.get("name")
        if not isinstance(name, str):
            raise TraceError(f"{self._path} is broken: event {self._count} has no name")
        return self.names.setdefault(name, len(self.names))

    def _ns(self, event: Mapping[str, Any], name: str) -> int:
        """Microseconds, exactly: a number with a fraction has come as text (a double would lose its last digit)."""
        value = event.get(name)
        if isinstance(value, str):
            try:
                return self.integer(int((Decimal(value) * 1000).to_integral_value()), name)
            except (InvalidOperation, OverflowError, ValueError) as error:
                raise TraceError(f"{self._path} is broken: event {self._count} has {name} = {value!r}") from error
        return self.integer(value, name) * 1000


class _Json:
    """Reads one JSON object member by member, and one of its members, an array, item by item."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path = path
        self._file = file
        self._text = ""
        self._at = 0
        self._decoder = json.JSONDecoder(parse_float=str)

    def members(self, array: str) -> Iterator[tuple[str, Any]]:
        """Give all members; those of `array` as many times as it has items."""
        self._expect("{")
        if self._peek() == "}":
            return
        while True:
            key = self._value()
            self._expect(":")
            if key == array and self._peek() == "[":
                self._expect("[")
                while self._peek() != "]":
                    yield key, self._value()
                    if self._peek() != "]":
                        self._expect(",")
                self._expect("]")
            else:
                yield key, self._value()
            if self._peek() == "}":
                return
            self._expect(",")

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._more():
                    raise TraceError(f"{self._path} is no JSON, or its end is missing: {error}") from error
                continue
            if end < len(self._text) or not self._more():  # a number could go on
                self._at = end
                return value

    def _peek(self) -> str:
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                raise TraceError(f"{self._path} is no Kineto trace, or its end is missing")

    def _expect(self, wanted: str) -> None:
        found = self._peek()
        if found != wanted:
            raise TraceError(f"{self._path} is no Kineto trace: {found!r} where {wanted!r} is due")
        self._at += 1

    def _more(self) -> bool:
        if len(self._text) - self._at > _MOST:
            raise TraceError(f"{self._path} is broken: a value of more than {_MOST} characters")
        piece = self._file.read(_PIECE)
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)
