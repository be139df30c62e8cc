"""From one rank's records to its nodes and their accesses to memory.

Theory of operation (DESIGN rules 2 and 3). The recorder has reduced the dispatcher's nested events to operators
already; here pure views are dropped (by schema, or because every result lies in an argument's memory and nothing was
written), what is left is numbered in program order, labelled, and broken down into accesses: reads of arguments,
then writes of arguments and of fresh results. A label is what was said when the operator ran; an operator of the
backward pass takes module and microbatch from the forward operator with its autograd sequence number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.format import SCRATCH_ARG, EventFlags
from truedag.tracer.schema import OpSchema, parse_schema
from truedag.tracer.trace import Layout, ThreadTrace, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What is known of where a node belongs; None is unknown."""

    module: str | None = None
    layer: int | None = None
    expert: int | None = None
    category: str | None = None
    microbatch: int | None = None
    phase: str | None = None
    step: int | None = None
    decode_step: int | None = None
    gradient: str | None = None  # the parameter whose gradient this adds to


@dataclass(frozen=True, slots=True, kw_only=True)
class CommRecord:
    """A communication as one rank recorded it."""

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

    @property
    def is_p2p(self) -> bool:
        """Whether it is a message and not a collective."""
        return self.op in ("c10d::send", "c10d::recv_", "c10d::recv_any_source_")


READ, WRITE, FRESH, HANDLE, UPDATE = 0, 1, 2, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Accesses:
    """Accesses to memory in program order, as columns.

    `kind` is READ, UPDATE (a read of what the node then writes), WRITE, FRESH (a write that begins a new storage) or
    HANDLE (the tensor must exist, its content does not matter: it is overwritten, or only its shape is asked for).
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


def extract_nodes(trace: Trace) -> RankNodes:
    """Turn a rank's trace into its nodes."""
    schemas = {
        number: parse_schema(op["schema"], name=op["name"], inplace_view=bool(op.get("inplace_view")))
        for number, op in trace.ops.items()
    }
    forward = _forward_labels(trace)
    rows: list[tuple[int, int, int]] = []  # start, position of the thread, position of the event
    num_views = 0
    for place, thread in enumerate(trace.threads):
        is_view = _views(thread, schemas)
        ranges = (thread.events["flags"] & int(EventFlags.RANGE)) != 0
        num_views += int((is_view & ~ranges).sum())
        kept = np.flatnonzero(~is_view & ~ranges)
        rows.extend(zip(thread.events["start_ns"][kept].tolist(), [place] * len(kept), kept.tolist(), strict=True))
    rows.sort()
    builder = _Builder(trace, schemas, forward)
    for node, (_, thread_place, index) in enumerate(rows):
        builder.add(node, trace.threads[thread_place], index)
    return builder.finish(num_views)


def _views(thread: ThreadTrace, schemas: Mapping[int, OpSchema]) -> NDArray[np.bool_]:
    """Which events are pure views."""
    by_schema = np.array(
        [False] + [schemas[i].is_view if i in schemas else False for i in range(1, max(schemas, default=0) + 1)]
    )
    events = thread.events
    view: NDArray[np.bool_] = by_schema[events["op"]] if len(events) else np.zeros(0, bool)
    # By observation: an operator that writes nothing and whose results all lie in its arguments' memory.
    storage = thread.refs["storage"]
    for index in np.flatnonzero(
        ~view & (events["num_outputs"] > 0) & (events["num_inputs"] > 0) & (events["comm"] == 0)
    ):
        event = events[index]
        if schemas[int(event["op"])].writes:
            continue
        first = int(event["first_ref"])
        middle = first + int(event["num_inputs"])
        outputs = storage[middle : middle + int(event["num_outputs"])]
        if outputs[0] in storage[first:middle] and set(outputs.tolist()) <= set(storage[first:middle].tolist()):
            view[index] = True
    return view


def _forward_labels(trace: Trace) -> dict[tuple[int, int], tuple[int, int]]:
    """(autograd thread, sequence number) -> (label, context) of the forward operator that made this node."""
    exact = trace.meta.get("recorder") != "python"
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for thread in trace.threads:
        events = thread.events
        forward = (events["sequence"] >= 0) & ((events["flags"] & int(EventFlags.IN_BACKWARD)) == 0)
        newest = -1
        for event in events[np.flatnonzero(forward)]:
            sequence, told = int(event["sequence"]), (int(event["label"]), int(event["context"]))
            found[thread.autograd_thread, sequence] = told
            if not exact and newest >= 0:  # the Python recorder sees only the last of the nodes made since
                for skipped in range(newest + 1, sequence):
                    found.setdefault((thread.autograd_thread, skipped), told)
            newest = sequence
    return found


class _Builder:
    def __init__(
        self, trace: Trace, schemas: Mapping[int, OpSchema], forward: Mapping[tuple[int, int], tuple[int, int]]
    ) -> None:
        self._trace = trace
        self._schemas = schemas
        self._forward = forward
        self._known: dict[tuple[int, int, int, int, bool], Label] = {}
        self._works = {
            int(work["comm_id"]): (int(work["start_ns"]), int(work["end_ns"]))
            for thread in trace.threads
            for work in thread.works
        }
        self._op: list[str] = []
        self._overload: list[str] = []
        self._thread: list[int] = []
        self._times: list[tuple[int, int]] = []
        self._labels: list[Label] = []
        self._in_backward: list[bool] = []
        self._accesses: list[tuple[int, int, int, int, int]] = []
        self._inputs: list[tuple[int, ...]] = []
        self._outputs: list[tuple[int, ...]] = []
        self._comms: list[CommRecord] = []

    def add(self, node: int, thread: ThreadTrace, index: int) -> None:
        event = thread.events[index]
        op = self._trace.ops[int(event["op"])]
        schema = self._schemas[int(event["op"])]
        first, num_inputs = int(event["first_ref"]), int(event["num_inputs"])
        refs = thread.refs[first : first + num_inputs + int(event["num_outputs"])].tolist()
        self._op.append(op["name"])
        self._overload.append(op["overload"])
        self._thread.append(thread.thread)
        self._times.append((int(event["start_ns"]), int(event["end_ns"])))
        self._labels.append(self._label(event))
        self._in_backward.append(bool(int(event["flags"]) & int(EventFlags.IN_BACKWARD)))
        self._access(node, schema, refs[:num_inputs], refs[num_inputs:])
        if event["comm"]:
            self._comms.append(self._comm(node, op["name"], thread.comms[int(event["comm"]) - 1]))

    def finish(self, num_views: int) -> RankNodes:
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
        )

    def _access(self, node: int, schema: OpSchema, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Refs are (offset, storage, layout, arg, element, reserved)."""
        accesses = self._accesses
        mine = {ref[1] for ref in inputs}
        fresh: set[int] = set()
        for offset, storage, layout, arg, *_ in inputs:
            if storage:
                kind = HANDLE if arg in schema.unread else UPDATE if arg in schema.writes else READ
                accesses.append((node, kind, storage, layout, offset))
        for offset, storage, layout, arg, *_ in inputs:
            if storage and arg in schema.writes:
                accesses.append((node, WRITE, storage, layout, offset))
        given: list[int] = [ref[2] for ref in inputs if ref[3] in schema.writes]
        for offset, storage, layout, arg, *_ in outputs:
            if storage and storage not in mine:
                accesses.append((node, WRITE if storage in fresh else FRESH, storage, layout, offset))
                fresh.add(storage)
                if arg != SCRATCH_ARG:
                    given.append(layout)
            elif storage and not schema.writes:
                given.append(layout)
        self._inputs.append(tuple(ref[2] for ref in inputs if ref[3] not in schema.unread))
        self._outputs.append(tuple(given))

    def _label(self, event: np.void) -> Label:
        label, context = int(event["label"]), int(event["context"])
        backward = bool(int(event["flags"]) & int(EventFlags.IN_BACKWARD))
        forward = (0, 0)
        if backward and int(event["sequence"]) >= 0:
            forward = self._forward.get((int(event["fwd_thread"]), int(event["sequence"])), (0, 0))
        key = (label, context, *forward, backward)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._make_label(label, context, forward, backward)
        return known

    def _make_label(self, label: int, context: int, forward: tuple[int, int], backward: bool) -> Label:
        module = self._trace.labels.get(label or forward[0], {})
        said = self._trace.contexts.get(context, {})
        of_forward = self._trace.contexts.get(forward[1], {})
        microbatch = said.get("microbatch")
        if microbatch is None and backward:
            microbatch = of_forward.get("microbatch")
        return Label(
            module=module.get("module"),
            layer=module.get("layer"),
            expert=module.get("expert"),
            category=module.get("category"),
            microbatch=microbatch,
            phase="backward" if backward else said.get("phase"),
            step=said.get("step"),
            decode_step=said.get("decode_step"),
        )

    def _comm(self, node: int, op: str, comm: np.void) -> CommRecord:
        told = self._trace.groups[int(comm["group"])]
        name = str(told["name"])
        ranks = tuple(told.get("ranks") or self._trace.group_ranks.get(name, {}).get("ranks") or ())
        if not ranks and int(told["size"]) == int(self._trace.meta["world_size"]):
            ranks = tuple(range(int(told["size"])))
        peer = int(comm["peer"])
        work = self._works.get(int(comm["id"]))
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
        )


def describe_tensors(layouts: Mapping[int, Layout], numbers: Sequence[int]) -> str:
    """Write tensors' types as `float32[2,64,512] int64[64]`."""
    known = (layouts[number] for number in numbers if number)
    return " ".join(f"{layout.dtype}[{','.join(map(str, layout.sizes))}]" for layout in known)
