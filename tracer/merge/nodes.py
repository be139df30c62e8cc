"""From one rank's records to its nodes and their accesses to memory.

Theory of operation (DESIGN rules 2 and 3). The recorder has reduced the dispatcher's nested events to operators
already; here pure views are dropped (by schema, or because every result of an operator of aten that writes nothing lies
in an argument's memory), and so are operators on tensors of device meta, which only find out shapes. What is left is
numbered in program order, labelled, and broken down into accesses: reads of arguments, then writes of arguments and of
results. An operator that failed wrote nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.labels import Label, Labels
from truedag.tracer.merge.outside import find_outside
from truedag.tracer.merge.schema import OpSchema, in_role, parse_schema, without_training
from truedag.tracer.record.format import SCRATCH_ARG, EventFlags
from truedag.tracer.record.trace import Layout, ThreadTrace, Trace


@dataclass(slots=True, kw_only=True)
class CommRecord:
    """A communication as one rank recorded it. Nobody changes one; frozen ones would take thrice the time to make."""

    node: int  # local
    op: str
    group: tuple[int, ...]  # global ranks, in group order
    group_name: str
    order: int
    backend_sequence: int
    peer: int  # global rank of root, source or destination; -1: none
    tag: int
    reduce_op: int
    is_async: bool
    work_start_ns: int | None  # on the backend's thread
    work_end_ns: int | None
    waited_ns: int | None = None  # how long the program waited for it; None: nobody was seen to
    sent_bytes: int = 0  # what this rank gives, and gets
    received_bytes: int = 0
    dtypes: str = ""  # of its tensors; '': it has none
    backend: str = ""  # of its group; '': unknown
    is_failed: bool = False  # it raised: the backend has not taken it
    incarnation: int = 0  # how many groups of this name there were before this one; below 0: that was not seen
    number: int | None = None  # among the group's collectives or in its lane, since the group was made; None: unknown
    doubt: str = ""  # why its number, or its place in the recording, may be wrong; '': it is right
    from_barrier: bool | None = None  # whether the recording began at a barrier of all ranks; None: not told

    @property
    def is_p2p(self) -> bool:
        """Whether it is a message and not a collective."""
        return self.op in ("c10d::send", "c10d::recv_", "c10d::recv_any_source_")


READ, WRITE, FRESH, HANDLE, UPDATE, TOUCH, EMPTY, CUT, NAMED = 0, 1, 2, 3, 4, 5, 6, 7, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Accesses:
    """Accesses to memory in program order, as columns.

    `kind` is READ, UPDATE (a read of what the node then writes), TOUCH (the same, where it may have written without
    reading), WRITE, FRESH (a write that begins a new storage), EMPTY (a new storage without content), HANDLE (the
    tensor must exist, its content does not matter: it is overwritten, or only its shape is asked for), CUT (no access
    of the node: before it the storage came, filled, from outside the dispatcher) or NAMED (no access: the program said
    what lies there; `node` is -1 - the name's place in their list).
    """

    node: NDArray[np.int64]
    kind: NDArray[np.int64]
    storage: NDArray[np.int64]
    layout: NDArray[np.int64]
    offset: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankNodes:
    """One rank's nodes, numbered from 0 in the order in which they began."""

    trace: Trace
    op: list[str]
    overload: list[str]
    thread: NDArray[np.int64]
    start_ns: NDArray[np.int64]
    end_ns: NDArray[np.int64]
    labels: list[Label]
    in_backward: NDArray[np.bool_]  # ran inside autograd's engine
    accesses: Accesses
    inputs: list[tuple[int, ...]]  # layouts of the tensors that go in, and come out
    outputs: list[tuple[int, ...]]
    comms: list[CommRecord]
    num_views: int
    num_shape_ops: int  # operators on device meta that only found out shapes


def extract_nodes(trace: Trace) -> RankNodes:
    """Turn a rank's trace into its nodes."""
    schemas = {
        number: parse_schema(op["schema"], name=op["name"], inplace_view=bool(op.get("inplace_view")))
        for number, op in trace.ops.items()
    }
    rows: list[tuple[int, int, int]] = []  # start, position of the thread, position of the event
    lifts = [number for number, op in trace.ops.items() if op["name"] == "aten::lift_fresh"]
    setters = [number for number, op in trace.ops.items() if _sets_storage(op)]
    outside = find_outside(trace, setters)
    num_views = num_shape_ops = 0
    for place, thread in enumerate(trace.threads):
        ranges = (thread.events["flags"] & int(EventFlags.RANGE)) != 0
        is_view = _views(thread, schemas) & ~ranges
        is_shape_op = _shape_ops(trace, thread) & ~ranges & ~is_view
        num_views += int(is_view.sum())
        num_shape_ops += int(is_shape_op.sum())
        is_lift = np.isin(thread.events["op"], lifts + setters) & ~ranges
        kept = np.flatnonzero(~(is_view | is_shape_op | ranges) | is_lift)
        rows.extend(zip(thread.events["start_ns"][kept].tolist(), [place] * len(kept), kept.tolist(), strict=True))
    rows.sort()
    builder = _Builder(trace, schemas)
    for _, thread_place, index in rows:
        thread = trace.threads[thread_place]
        number = int(thread.events[index]["op"])
        if number in setters:
            if (thread_place, index) in outside:
                builder.lift(thread, index)
        elif number in lifts:
            builder.lift(thread, index)
        else:
            builder.add(thread, index)
    return builder.finish(num_views, num_shape_ops)


def _sets_storage(op: Mapping[str, Any]) -> bool:
    """Whether an operator gives a tensor a storage that it was handed."""
    return op["name"] == "aten::set_" and str(op["overload"]).startswith("source_Storage")


def _views(thread: ThreadTrace, schemas: Mapping[int, OpSchema]) -> NDArray[np.bool_]:
    """Which events are pure views."""
    by_schema, can_be = np.zeros((2, max(schemas, default=0) + 1), bool)
    for number, schema in schemas.items():
        by_schema[number] = schema.is_view
        can_be[number] = not schema.is_view and not schema.writes and schema.name.startswith("aten::")
    events = thread.events
    # By observation: an operator that writes nothing and whose results all lie in its arguments' memory.
    asked = can_be[events["op"]] & (events["num_outputs"] > 0) & (events["num_inputs"] > 0)
    event, ref, is_output = _refs_of(thread, np.flatnonzero(asked))
    storage = thread.refs["storage"][ref].astype(np.int64)
    key = event * (int(storage.max(initial=0)) + 1) + storage
    is_new = is_output & ((storage == 0) | ~np.isin(key, key[~is_output]))
    view: NDArray[np.bool_] = by_schema[events["op"]] | asked
    view[event[is_new]] = False
    return view


def _shape_ops(trace: Trace, thread: ThreadTrace) -> NDArray[np.bool_]:
    """Which events only find out shapes: all their tensors are on device meta, in a program that runs on another."""
    events = thread.events
    meta = [number for number, layout in trace.layouts.items() if layout.device == "meta"]
    if trace.meta.get("device") == "meta" or not meta:
        return np.zeros(len(events), bool)
    on_meta: NDArray[np.bool_] = (events["num_inputs"] + events["num_outputs"] > 0) & (events["comm"] == 0)
    event, ref, _ = _refs_of(thread, np.flatnonzero(on_meta))
    on_meta[event[~np.isin(thread.refs["layout"][ref], meta)]] = False
    return on_meta


def _refs_of(
    thread: ThreadTrace, chosen: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """All tensors of the chosen events: the event's position, the ref's, and whether it is a result."""
    events = thread.events[chosen]
    num_inputs = events["num_inputs"].astype(np.int64)
    count = num_inputs + events["num_outputs"]
    place = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    ref = np.repeat(events["first_ref"].astype(np.int64), count) + place
    return np.repeat(chosen, count), ref, place >= np.repeat(num_inputs, count)


class _Builder:
    def __init__(self, trace: Trace, schemas: Mapping[int, OpSchema]) -> None:
        self._trace = trace
        self._schemas = schemas
        self._label = Labels(trace)
        self._works = {
            int(work["comm_id"]): (int(work["start_ns"]), int(work["end_ns"]))
            for thread in trace.threads
            for work in thread.works
        }
        self._waited: dict[int, int] = {}
        for thread in trace.threads:
            lasted = thread.waits["end_ns"] - thread.waits["start_ns"]
            for comm_id, duration in zip(thread.waits["comm_id"].tolist(), lasted.tolist(), strict=True):
                self._waited[comm_id] = self._waited.get(comm_id, 0) + duration
        self._op: list[str] = []
        self._overload: list[str] = []
        self._thread: list[int] = []
        self._times: list[tuple[int, int]] = []
        self._labels: list[Label] = []
        self._in_backward: list[bool] = []
        self._accesses: list[tuple[int, int, int, int, int]] = []
        names: dict[str, int] = {}
        self._incarnations: dict[int, int] = {}
        for number, told in sorted(trace.groups.items()):
            self._incarnations[number] = names[told["name"]] = names.get(told["name"], -1) + 1
        self._inputs: list[tuple[int, ...]] = []
        self._outputs: list[tuple[int, ...]] = []
        self._comms: list[CommRecord] = []

    def lift(self, thread: ThreadTrace, index: int) -> None:
        """Note that a tensor came from outside, whatever an operator had made at that place before.

        torch.tensor or from_numpy made it and filled it, or it was set to memory that no operator had filled.
        """
        storage, layout, offset = self._result(thread, index)
        if storage:
            self._accesses.append((len(self._op), CUT, storage, layout, offset))

    def _result(self, thread: ThreadTrace, index: int) -> tuple[int, int, int]:
        """Storage, layout and offset of an event's last tensor."""
        event = thread.events[index]
        last = int(event["first_ref"]) + int(event["num_inputs"]) + int(event["num_outputs"]) - 1
        offset, storage, layout, *_ = thread.refs[last].tolist()
        return storage, layout, offset

    def add(self, thread: ThreadTrace, index: int) -> None:
        """Add an operator as the next node."""
        node = len(self._op)
        event = thread.events[index]
        op = self._trace.ops[int(event["op"])]
        schema = self._schemas[int(event["op"])]
        first, num_inputs = int(event["first_ref"]), int(event["num_inputs"])
        refs = thread.refs[first : first + num_inputs + int(event["num_outputs"])].tolist()
        self._op.append(op["name"])
        self._overload.append(op["overload"])
        self._thread.append(thread.thread)
        self._times.append((int(event["start_ns"]), int(event["end_ns"])))
        self._labels.append(self._label.of(thread.thread, index, event))
        self._in_backward.append(bool(int(event["flags"]) & int(EventFlags.IN_BACKWARD)))
        comm = thread.comms[int(event["comm"]) - 1] if event["comm"] else None
        if comm is not None:
            is_root = int(comm["peer"]) == int(self._trace.groups[int(comm["group"])]["rank"])
            schema = in_role(schema, is_root=is_root)
        elif schema.in_training and not self._has_elements(refs[num_inputs:], 1):
            schema = without_training(schema)
        if int(event["flags"]) & int(EventFlags.FAILED):
            schema, refs = replace(schema, writes=frozenset()), refs[:num_inputs]
        self._access(node, schema, refs[:num_inputs], refs[num_inputs:])
        if comm is not None:
            failed = bool(int(event["flags"]) & int(EventFlags.FAILED))
            self._comms.append(self._comm(node, op["name"], comm, is_failed=failed))

    def _has_elements(self, outputs: Sequence[Any], result: int) -> bool:
        return any(ref[3] == result and self._trace.layouts[ref[2]].num_bytes > 0 for ref in outputs if ref[2])

    def _dtypes(self, node: int) -> str:
        layouts = {number for number in (*self._inputs[node], *self._outputs[node]) if number}
        return " ".join(sorted({self._trace.layouts[number].dtype for number in layouts}))

    def finish(self, num_views: int, num_shape_ops: int) -> RankNodes:
        """Return what was added."""
        while self._accesses and self._accesses[-1][0] == len(self._op):  # what came from outside after the last node
            self._accesses.pop()
        columns = np.array(self._accesses, np.int64).reshape(-1, 5)
        times = np.array(self._times, np.int64).reshape(-1, 2)
        return RankNodes(
            trace=self._trace,
            op=self._op,
            overload=self._overload,
            thread=np.array(self._thread, np.int64),
            start_ns=times[:, 0],
            end_ns=times[:, 1],
            labels=self._labels,
            in_backward=np.array(self._in_backward, bool),
            accesses=Accesses(
                node=columns[:, 0],
                kind=columns[:, 1],
                storage=columns[:, 2],
                layout=columns[:, 3],
                offset=columns[:, 4],
            ),
            inputs=self._inputs,
            outputs=self._outputs,
            comms=self._comms,
            num_views=num_views,
            num_shape_ops=num_shape_ops,
        )

    def _access(self, node: int, schema: OpSchema, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Refs are (offset, storage, layout, arg, element)."""
        accesses = self._accesses
        mine = {ref[1] for ref in inputs}
        # Results that an operator which does not say what it writes has put into its arguments' memory.
        filled = [ref for ref in outputs if ref[1] and ref[1] in mine and ref[3] in schema.fresh]
        filled = [] if schema.is_exact else filled
        touched = {ref[1] for ref in filled}
        changing = UPDATE if schema.is_exact else TOUCH
        for offset, storage, layout, arg, *_ in inputs:
            if storage:
                written = arg in schema.writes or storage in touched
                kind = HANDLE if arg in schema.unread else changing if written else READ
                accesses.append((node, kind, storage, layout, offset))
        given: dict[tuple[int, int], int] = {}
        for offset, storage, layout, arg, element in inputs:
            if arg in schema.writes:
                given[arg, element] = layout
                if storage:
                    accesses.append((node, WRITE, storage, layout, offset))
        rewritten = dict(schema.rewritten)
        results: list[int] = []
        fresh: set[int] = set()
        for offset, storage, layout, arg, element in outputs:
            argument = rewritten.get(arg)
            if argument is not None and argument in schema.writes:  # it may have been resized to hold the result
                if storage and given.get((argument, element)) != layout:
                    accesses.append((node, WRITE, storage, layout, offset))
                given[argument, element] = layout
            elif storage and storage not in mine:
                kind = WRITE if storage in fresh else EMPTY if schema.is_empty else FRESH
                accesses.append((node, kind, storage, layout, offset))
                fresh.add(storage)
                if arg != SCRATCH_ARG:
                    results.append(layout)
            elif storage and not schema.name.startswith("c10d::") and not schema.writes:
                results.append(layout)
        for offset, storage, layout, *_ in filled:
            accesses.append((node, WRITE, storage, layout, offset))
        self._inputs.append(tuple(ref[2] for ref in inputs if ref[3] not in schema.unread))
        self._outputs.append((*given.values(), *results))

    def _comm(self, node: int, op: str, comm: np.void, *, is_failed: bool) -> CommRecord:
        told = self._trace.groups[int(comm["group"])]
        name = str(told["name"])
        ranks = tuple(told.get("ranks") or self._trace.group_ranks.get(name, {}).get("ranks") or ())
        if not ranks and int(told["size"]) == int(self._trace.meta["world_size"]):
            ranks = tuple(range(int(told["size"])))
        peer = int(comm["peer"])
        work = self._works.get(int(comm["id"]))
        sent, received = (
            sum(self._trace.layouts[number].num_bytes for number in numbers if number)
            for numbers in (self._inputs[node], self._outputs[node])
        )
        return CommRecord(
            node=node,
            op=op,
            group=ranks,
            group_name=name,
            order=int(comm["order"]),
            backend_sequence=int(comm["sequence"]),
            peer=ranks[peer] if 0 <= peer < len(ranks) else -1,
            tag=int(comm["tag"]),
            reduce_op=int(comm["reduce_op"]),
            is_async=bool(comm["async_op"]),
            work_start_ns=work[0] if work else None,
            work_end_ns=work[1] if work else None,
            waited_ns=self._waited.get(int(comm["id"])),
            sent_bytes=sent,
            received_bytes=received,
            dtypes=" ".join(
                sorted({self._trace.layouts[i].dtype for i in self._inputs[node] + self._outputs[node] if i})
            ),
            backend=str(told["backend"]),
            is_failed=is_failed,
            incarnation=self._incarnations[int(comm["group"])],
        )


def describe_tensors(layouts: Mapping[int, Layout], numbers: Sequence[int]) -> str:
    """Write tensors' types as `float32[2,64,512] int64[64]`."""
    known = (layouts[number] for number in numbers if number)
    return " ".join(f"{layout.dtype}[{','.join(map(str, layout.sizes))}]" for layout in known)
