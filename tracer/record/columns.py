"""A trace as columns for people: polars tables of its events, their tensors, communications, waits and frees.

Names (operators, modules, groups, dtypes) are categorical columns, gathered from the few that the trace's tables hold;
nothing is done per row in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.record.format import COMM, FREE, PLACE, SCRATCH_ARG, WAIT, WORK, EventFlags
from truedag.tracer.record.trace import EVENTS, REFS, Layout, Trace

TableName = Literal["events", "tensors", "comms", "works", "waits", "frees", "storages"]

# c10d::ReduceOp by number. Source: torch/csrc/distributed/c10d/Types.hpp.
_REDUCE_OPS = ("sum", "avg", "product", "min", "max", "band", "bor", "bxor", "premul_sum")
Schema = Mapping[str, type[pl.DataType]]

_OP: Schema = {"name": pl.Categorical, "overload": pl.Categorical}
_LABEL: Schema = {"module": pl.Categorical, "layer": pl.Int64, "expert": pl.Int64, "category": pl.Categorical}
_CONTEXT: Schema = {"step": pl.Int64, "microbatch": pl.Int64, "phase": pl.Categorical, "decode_step": pl.Int64}
_LAYOUT = {
    "bytes": pl.Int64(),
    "dtype": pl.Categorical(),
    "device": pl.Categorical(),
    "shape": pl.List(pl.Int64),
    "strides": pl.List(pl.Int64),
}
_ROLES = ("input", "output", "scratch")
# Numbers below this are looked up in an array as long as the largest of them.
_LARGEST_TABLE = 1 << 20
_GROUP: Schema = {"name": pl.Categorical, "size": pl.Int64, "backend": pl.Categorical}


def table(trace: Trace, name: TableName) -> pl.DataFrame:
    """Return one of a trace's tables; what is unknown or does not apply is null. For analyses, at two million rows/s.

    Times are CLOCK_MONOTONIC in ns. `event` is the row in `events` by which the tables join, `comm` the number of a
    communication in this trace. Threads follow each other, each in the order in which what it did ended.

    - `events`: event, thread, op, overload, start_ns, end_ns; module, layer, expert, category (what ran around it on
      its thread), step, microbatch, phase, decode_step (what the program said); in_backward, failed, is_range (an
      autograd function around operators and none itself); sequence (of the autograd node it may have made),
      backward_sequence and fwd_thread (of the node in whose backward pass it ran, both modulo 2^32); num_inputs,
      num_outputs; comm, group, peer (rank in the group of root, source or destination).
    - `tensors`: event, role (input, output or scratch: what a communication made for its own use), arg and element
      (position among the schema's arguments or returns, and in a list), storage, offset_bytes, bytes, dtype, device,
      shape, strides (in elements). Memory that cannot be named has no storage and no layout.
    - `comms`: comm, event, thread, op, start_ns, end_ns, group, group_size, backend, sequence (the backend's count
      before it), order (the recorder's own), peer, tag, reduce_op, is_async.
    - `works`: comm, thread, op (as the backend announced it), start_ns, end_ns.
    - `waits`: comm (null: not recorded), thread, start_ns, end_ns: where the program waited for a communication.
    - `frees`: thread, time_ns, address (of memory that was given back).
    - `storages`: storage, address, bytes, and where it has come to have this memory: thread, event (the thread's row in
      `events` from which on it has; both null: as it was first seen).
    """
    return _TABLES[name](trace)


def _events(trace: Trace) -> pl.DataFrame:
    events = _all(trace, "events", EVENTS)
    comms = _comms(trace)
    comm = np.zeros(len(events), np.uint32)
    comm[comms["event"].to_numpy()] = np.arange(1, len(comms) + 1)
    return pl.DataFrame(
        [
            pl.Series("event", np.arange(len(events), dtype=np.uint32)),
            _threads(trace, "events"),
            *_ops(trace, events["op"]),
            *_numbers(events, "start_ns", "end_ns"),
            *_gather(_told(trace.labels, _LABEL), _row(trace.labels, events["label"])),
            *_gather(_told(trace.contexts, _CONTEXT), _row(trace.contexts, events["context"])),
            _flag("in_backward", events, EventFlags.IN_BACKWARD),
            _flag("failed", events, EventFlags.FAILED),
            _flag("is_range", events, EventFlags.RANGE),
            _known("sequence", events["sequence"], events["sequence"] >= 0),
            _known("backward_sequence", events["backward_sequence"], events["backward_sequence"] >= 0),
            _known("fwd_thread", events["fwd_thread"], events["backward_sequence"] >= 0),
            *_numbers(events, "num_inputs", "num_outputs"),
            *_gather(_after_nothing(comms.select("comm", "group", "peer")), comm),
        ]
    )


def _tensors(trace: Trace) -> pl.DataFrame:
    events, refs = _all(trace, "events", EVENTS), _all(trace, "refs", REFS)
    num_inputs = events["num_inputs"].astype(np.int64)
    count = num_inputs + events["num_outputs"]
    event = np.repeat(np.arange(len(events), dtype=np.uint32), count)
    place = np.arange(len(refs)) - np.repeat(np.cumsum(count) - count, count)
    is_scratch = refs["arg"] == SCRATCH_ARG
    role = np.where(is_scratch, 2, place >= np.repeat(num_inputs, count)).astype(np.uint32)
    is_named = refs["storage"] > 0
    layout = np.where(is_named, _row(trace.layouts, refs["layout"]), np.uint32(0))
    return pl.DataFrame(
        [
            pl.Series("event", event),
            *_gather(pl.DataFrame({"role": pl.Series(_ROLES, dtype=pl.Categorical)}), role),
            _known("arg", refs["arg"], ~is_scratch),
            *_numbers(refs, "element"),
            _known("storage", refs["storage"], is_named),
            _known("offset_bytes", refs["offset_bytes"], is_named),
            *_gather(_layouts(trace.layouts), layout),
        ]
    )


def _comms(trace: Trace) -> pl.DataFrame:
    events, comms = _all(trace, "events", EVENTS), _all(trace, "comms", COMM)
    event = np.flatnonzero(events["comm"])
    groups = _told(trace.groups, _GROUP).rename({"name": "group", "size": "group_size"})
    reduce_ops = _after_nothing(pl.DataFrame({"reduce_op": pl.Series(_REDUCE_OPS, dtype=pl.Categorical)}))
    reduce_op = np.where(np.abs(comms["reduce_op"].astype(np.int64)) < len(_REDUCE_OPS), comms["reduce_op"], -1)
    return pl.DataFrame(
        [
            pl.Series("comm", np.ascontiguousarray(comms["id"])),
            pl.Series("event", event.astype(np.uint32)),
            _threads(trace, "comms"),
            *_ops(trace, events["op"][event]),
            *_numbers(events[event], "start_ns", "end_ns"),
            *_gather(groups, _row(trace.groups, comms["group"])),
            *(_known(name, comms[name], comms[name] >= 0) for name in ("sequence", "order", "peer", "tag")),
            *_gather(reduce_ops, np.maximum(reduce_op + 1, 0).astype(np.uint32)),
            pl.Series("is_async", comms["async_op"] != 0),
        ]
    )


def _works(trace: Trace) -> pl.DataFrame:
    works = _all(trace, "works", WORK)
    return pl.DataFrame(
        [
            pl.Series("comm", np.ascontiguousarray(works["comm_id"])),
            _threads(trace, "works"),
            _ops(trace, works["op"])[0],
            *_numbers(works, "start_ns", "end_ns"),
        ]
    )


def _waits(trace: Trace) -> pl.DataFrame:
    waits = _all(trace, "waits", WAIT)
    comm = _known("comm", waits["comm_id"], waits["comm_id"] > 0)
    return pl.DataFrame([comm, _threads(trace, "waits"), *_numbers(waits, "start_ns", "end_ns")])


def _frees(trace: Trace) -> pl.DataFrame:
    return pl.DataFrame([_threads(trace, "frees"), *_numbers(_all(trace, "frees", FREE), "time_ns", "address")])


def _storages(trace: Trace) -> pl.DataFrame:
    first, later = trace.storage_records, _all(trace, "places", PLACE)
    num_events = np.array([len(thread.events) for thread in trace.threads], np.int64)
    num_places = [len(thread.places) for thread in trace.threads]
    event = np.repeat(np.cumsum(num_events) - num_events, num_places) + later["event"]
    seen = pl.DataFrame(
        [
            pl.Series("storage", np.arange(1, len(first) + 1, dtype=np.uint32)),
            *_numbers(first, "address", "bytes"),
        ]
    )
    moved = pl.DataFrame(
        [
            *_numbers(later, "storage", "address", "bytes"),
            _threads(trace, "places"),
            pl.Series("event", event.astype(np.uint32)),
        ]
    )
    return pl.concat([seen, moved], how="diagonal")


def _all(trace: Trace, name: str, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    """The records of one kind of all threads."""
    parts = [rows for rows in (getattr(thread, name) for thread in trace.threads) if len(rows)]
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, dtype), *parts])


def _threads(trace: Trace, name: str) -> pl.Series:
    numbers = np.array([thread.thread for thread in trace.threads], np.uint32)
    return pl.Series("thread", np.repeat(numbers, [len(getattr(thread, name)) for thread in trace.threads]))


def _numbers(rows: NDArray[np.void], *names: str) -> list[pl.Series]:
    return [pl.Series(name, np.ascontiguousarray(rows[name])) for name in names]


def _flag(name: str, events: NDArray[np.void], flag: EventFlags) -> pl.Series:
    return pl.Series(name, (events["flags"] & np.uint32(flag)) != 0)


def _known(name: str, values: NDArray[Any], is_known: NDArray[np.bool_]) -> pl.Series:
    """A column of what is known, the rest null."""
    column = pl.Series(name, np.ascontiguousarray(values))
    return column if is_known.all() else column.set(pl.Series(~is_known), None)


def _gather(few: pl.DataFrame, row: NDArray[np.uint32]) -> list[pl.Series]:
    """The columns of a small table, one of its rows for each of ours."""
    return few[pl.Series(row)].get_columns()


def _after_nothing(known: pl.DataFrame) -> pl.DataFrame:
    """A table after a row of nulls: what is unknown has row 0."""
    return pl.concat([known.clear(1), known])


def _ops(trace: Trace, numbers: NDArray[np.uint32]) -> list[pl.Series]:
    return _gather(_told(trace.ops, _OP).rename({"name": "op"}), _row(trace.ops, numbers))


def _row(told: Mapping[int, Any], numbers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Where `_told` puts what has these numbers; 0: nothing has."""
    given = np.array(sorted(told), np.int64)
    if not len(given):
        return np.zeros(len(numbers), np.uint32)
    if given[-1] >= _LARGEST_TABLE:
        place = np.minimum(np.searchsorted(given, numbers), len(given) - 1)
        return np.where(given[place] == numbers, place + 1, 0).astype(np.uint32)
    row = np.zeros(int(given[-1]) + 2, np.uint32)
    row[given] = np.arange(1, len(given) + 1)
    return row[np.minimum(numbers, np.uint32(len(row) - 1))]


def _told(told: Mapping[int, Mapping[str, Any]], schema: Schema) -> pl.DataFrame:
    """Fields of a table of the trace, in the order of its numbers, after a row of nulls; what does not fit is null."""
    columns = {
        name: [None, *(_fitting(told[number].get(name), dtype) for number in sorted(told))]
        for name, dtype in schema.items()
    }
    return pl.DataFrame(columns, schema=schema)


def _fitting(value: Any, dtype: type[pl.DataType]) -> Any:
    if dtype is pl.Categorical:
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def _layouts(layouts: Mapping[int, Layout]) -> pl.DataFrame:
    ordered = [layouts[number] for number in sorted(layouts)]
    return pl.DataFrame(
        {
            "bytes": [None, *(_fitting(one.num_bytes, pl.Int64) for one in ordered)],
            "dtype": [None, *(one.dtype for one in ordered)],
            "device": [None, *(one.device for one in ordered)],
            "shape": [None, *(list(one.sizes) for one in ordered)],
            "strides": [None, *(list(one.strides) for one in ordered)],
        },
        schema=_LAYOUT,
    )


_TABLES: Mapping[TableName, Callable[[Trace], pl.DataFrame]] = {
    "events": _events,
    "tensors": _tensors,
    "comms": _comms,
    "works": _works,
    "waits": _waits,
    "frees": _frees,
    "storages": _storages,
}
