"""All events of a rank as columns in the order in which they began, and which of them are operators of the graph.

Pure views are none (by schema, or because every result of an operator of aten that writes nothing lies in an
argument's memory), and neither are ranges and operators on tensors of device meta, which only find out shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.schema import OpSchema
from truedag.tracer.merge.sorting import ramp, stable_order
from truedag.tracer.record.format import COMM, EventFlags
from truedag.tracer.record.trace import EVENTS, REFS, Trace

# An event with more arguments than this is compared with its results by sorting.
_FEW_INPUTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Refs:
    """All tensors of all events; those of an event lie together, arguments first."""

    offset: NDArray[np.int64]
    storage: NDArray[np.int64]
    layout: NDArray[np.int64]
    arg: NDArray[np.int64]
    element: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Events:
    """A rank's events in the order in which they began; those that began together, by thread and in a thread's order.

    `comm` is a place in `comms` plus 1, 0: none. `place` is the thread's in the trace.
    """

    place: NDArray[np.int64]
    index: NDArray[np.int64]  # in the thread's events
    start_ns: NDArray[np.int64]
    end_ns: NDArray[np.int64]
    sequence: NDArray[np.int64]
    backward_sequence: NDArray[np.int64]
    fwd_thread: NDArray[np.int64]
    op: NDArray[np.int64]
    label: NDArray[np.int64]
    context: NDArray[np.int64]
    flags: NDArray[np.int64]
    first_ref: NDArray[np.int64]
    num_inputs: NDArray[np.int64]
    num_outputs: NDArray[np.int64]
    comm: NDArray[np.int64]
    refs: Refs
    comms: NDArray[np.void]

    def where(self, place: int, index: int) -> int:
        """Return the position of an event, by its thread's place in the trace and its own among the thread's events."""
        return int(np.flatnonzero((self.place == place) & (self.index == index))[0])

    def tensors(self, chosen: NDArray[np.int64], *, results: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the arguments, or the results, of chosen events: whose each is (an event), and which ref."""
        count = (self.num_outputs if results else self.num_inputs)[chosen]
        first = self.first_ref[chosen]
        if results:
            first += self.num_inputs[chosen]
        first -= np.cumsum(count) - count
        ref = np.repeat(first, count)
        ref += np.arange(len(ref))
        return np.repeat(chosen, count), ref


def read_events(trace: Trace) -> Events:
    """Lay the events of a rank's threads side by side."""
    threads = trace.threads
    num_refs = [len(thread.refs) for thread in threads]
    num_comms = [len(thread.comms) for thread in threads]
    num_events = [len(thread.events) for thread in threads]
    refs_before = np.cumsum([0, *num_refs[:-1]]) if threads else np.zeros(0, np.int64)
    comms_before = np.cumsum([0, *num_comms[:-1]]) if threads else np.zeros(0, np.int64)

    def column(name: str) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(0, EVENTS[name]), *(thread.events[name] for thread in threads)])

    start_ns = column("start_ns")
    order = stable_order(start_ns)
    place = np.repeat(np.arange(len(threads)), num_events)
    comm = column("comm").astype(np.int64)
    comm = np.where(comm > 0, comm + np.repeat(comms_before, num_events), 0)
    refs = {
        name: np.concatenate([np.zeros(0, REFS[name]), *(thread.refs[name] for thread in threads)])
        for name in ("offset_bytes", "storage", "layout", "arg", "element")
    }
    wide = ("fwd_thread", "op", "label", "context", "flags", "num_inputs", "num_outputs")
    return Events(
        place=place[order],
        index=ramp(np.array(num_events, np.int64))[order],
        start_ns=start_ns[order],
        end_ns=column("end_ns")[order],
        sequence=column("sequence")[order],
        backward_sequence=column("backward_sequence")[order],
        first_ref=(column("first_ref") + np.repeat(refs_before, num_events))[order],
        comm=comm[order],
        **{name: column(name).astype(np.int64)[order] for name in wide},
        refs=Refs(
            offset=refs["offset_bytes"],
            storage=refs["storage"].astype(np.int64),
            layout=refs["layout"].astype(np.int64),
            arg=refs["arg"].astype(np.int64),
            element=refs["element"].astype(np.int64),
        ),
        comms=np.concatenate([np.zeros(0, COMM), *(thread.comms for thread in threads)]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kinds:
    """[events] What each event is; ranges are neither."""

    is_view: NDArray[np.bool_]
    is_shape_op: NDArray[np.bool_]
    is_range: NDArray[np.bool_]
    in_arguments: NDArray[np.bool_]  # [refs] whether a result lies in memory of an argument of its event


def tell_kinds(trace: Trace, events: Events, schemas: Mapping[int, OpSchema]) -> Kinds:
    """Tell views and operators on shapes from what computes."""
    everything = np.arange(len(events.op))
    owner, result = events.tensors(everything, results=True)
    in_arguments = np.zeros(len(events.refs.storage), bool)
    in_arguments[result] = _in_arguments(events, owner, result)
    is_range = (events.flags & int(EventFlags.RANGE)) != 0
    by_schema, can_be = np.zeros((2, max(schemas, default=0) + 1), bool)
    for number, schema in schemas.items():
        by_schema[number] = schema.is_view
        can_be[number] = not schema.is_view and not schema.writes and schema.name.startswith("aten::")
    # By observation: an operator that writes nothing and whose results all lie in its arguments' memory.
    is_view = can_be[events.op] & (events.num_outputs > 0) & (events.num_inputs > 0)
    is_view[owner[~in_arguments[result]]] = False
    is_view |= by_schema[events.op]
    is_view &= ~is_range
    return Kinds(
        is_view=is_view,
        is_shape_op=_shape_ops(trace, events) & ~is_range & ~is_view,
        is_range=is_range,
        in_arguments=in_arguments,
    )


def _in_arguments(events: Events, owner: NDArray[np.int64], result: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which results lie in memory of an argument of the same event; memory without a name lies nowhere."""
    storage = events.refs.storage
    found = np.zeros(len(result), bool)
    count = events.num_inputs[owner]
    going = np.flatnonzero((count > 0) & (count <= _FEW_INPUTS) & (storage[result] > 0))
    for place in range(_FEW_INPUTS):
        found[going] |= storage[events.first_ref[owner[going]] + place] == storage[result[going]]
        going = going[(count[going] > place + 1) & ~found[going]]
    many = np.flatnonzero((count > _FEW_INPUTS) & (storage[result] > 0))
    if len(many):
        width = int(storage.max()) + 1
        event, ref = events.tensors(np.unique(owner[many]), results=False)
        found[many] = np.isin(owner[many] * width + storage[result[many]], event * width + storage[ref])
    return found


def _shape_ops(trace: Trace, events: Events) -> NDArray[np.bool_]:
    """Which events only find out shapes: all their tensors are on device meta, in a program that runs on another."""
    meta = [number for number, layout in trace.layouts.items() if layout.device == "meta"]
    if trace.meta.get("device") == "meta" or not meta:
        return np.zeros(len(events.op), bool)
    on_meta: NDArray[np.bool_] = (events.num_inputs + events.num_outputs > 0) & (events.comm == 0)
    asked = np.flatnonzero(on_meta)
    for results in (False, True):
        event, ref = events.tensors(asked, results=results)
        on_meta[event[~np.isin(events.refs.layout[ref], meta)]] = False
    return on_meta


def numbers_of(trace: Trace, names: Sequence[str]) -> list[int]:
    """Return the numbers of the operators with these names."""
    return [number for number, op in trace.ops.items() if op["name"] in names]
