"""From one rank's records to its nodes and their accesses to memory.

Theory of operation (DESIGN rules 2 and 3). The recorder has reduced the dispatcher's nested events to operators
already; here pure views are dropped, and so are operators on tensors of device meta, which only find out shapes
(`events`). What is left is numbered in program order, labelled (`labels`), and broken down into accesses: reads of
arguments, then writes of arguments and of results (`accesses`). An operator that failed wrote nothing. All of it is
columns: nothing is done event by event in Python but what is rare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.accesses import CUT, Accesses, find_effects
from truedag.tracer.merge.comms import CommRecord, read_comms
from truedag.tracer.merge.events import Events, read_events, tell_kinds
from truedag.tracer.merge.labels import Label, LabelColumns, find_labels
from truedag.tracer.merge.outside import find_outside
from truedag.tracer.merge.schema import parse_schema
from truedag.tracer.merge.shapes import Shape, Shapes, find_shapes
from truedag.tracer.record.format import EventFlags
from truedag.tracer.record.trace import Trace

__all__ = ["CommRecord", "RankNodes", "extract_nodes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankNodes:
    """One rank's nodes, numbered from 0 in the order in which they began."""

    trace: Trace
    op_number: NDArray[np.int64]  # in `trace.ops`
    thread: NDArray[np.int64]
    start_ns: NDArray[np.int64]
    end_ns: NDArray[np.int64]
    belonging: LabelColumns
    in_backward: NDArray[np.bool_]  # ran inside autograd's engine
    accesses: Accesses
    shapes: Shapes
    comms: list[CommRecord]
    num_views: int
    num_shape_ops: int  # operators on device meta that only found out shapes

    def __len__(self) -> int:
        return len(self.op_number)

    @property
    def op(self) -> list[str]:
        """Each node's operator. Made anew at each call, as are all lists here."""
        names = {number: op["name"] for number, op in self.trace.ops.items()}
        return [names[number] for number in self.op_number.tolist()]

    @property
    def overload(self) -> list[str]:
        """Each node's overload of its operator."""
        names = {number: op["overload"] for number, op in self.trace.ops.items()}
        return [names[number] for number in self.op_number.tolist()]

    @property
    def labels(self) -> list[Label]:
        """Where each node belongs."""
        return self.belonging.labels()

    @property
    def inputs(self) -> list[tuple[int, ...]]:
        """The layouts of the tensors that go into each node."""
        return [self.shapes.known[number].inputs for number in self.shapes.number.tolist()]

    @property
    def outputs(self) -> list[tuple[int, ...]]:
        """The layouts of the tensors that come out of each node."""
        return [self.shapes.known[number].outputs for number in self.shapes.number.tolist()]


def extract_nodes(trace: Trace, *, exact: bool = False) -> RankNodes:
    """Turn a rank's trace into its nodes.

    Args:
        trace: the rank's.
        exact: take every event by itself (`accesses.find_effects`).
    """
    schemas = {
        number: parse_schema(op["schema"], name=op["name"], inplace_view=bool(op.get("inplace_view")))
        for number, op in trace.ops.items()
    }
    events = read_events(trace)
    kinds = tell_kinds(trace, events, schemas)
    lifts = [number for number, op in trace.ops.items() if op["name"] == "aten::lift_fresh"]
    setters = [number for number, op in trace.ops.items() if _sets_storage(op)]
    is_cut = np.isin(events.op, lifts + setters) & ~kinds.is_range
    chosen = np.flatnonzero(~(kinds.is_view | kinds.is_shape_op | kinds.is_range | is_cut))
    effects = find_effects(trace, events, kinds, schemas, chosen, exact=exact)
    cuts = _find_cuts(trace, events, np.flatnonzero(is_cut), setters, chosen)
    op = events.op[chosen]
    shapes = find_shapes(
        op,
        {number: str(told["name"]) for number, told in trace.ops.items()},
        (effects.input_node, effects.input_layout),
        (effects.output_node, effects.output_layout),
    )
    threads = np.array([thread.thread for thread in trace.threads], np.int64)
    return RankNodes(
        trace=trace,
        op_number=op,
        thread=threads[events.place[chosen]],
        start_ns=events.start_ns[chosen],
        end_ns=events.end_ns[chosen],
        belonging=find_labels(trace, events, chosen),
        in_backward=(events.flags[chosen] & int(EventFlags.IN_BACKWARD)) != 0,
        accesses=effects.accesses.insert(np.searchsorted(effects.accesses.node, [cut[0] for cut in cuts]), cuts),
        shapes=shapes,
        comms=_comms(trace, events, chosen, op, shapes),
        num_views=int(kinds.is_view.sum()),
        num_shape_ops=int(kinds.is_shape_op.sum()),
    )


def _sets_storage(op: Mapping[str, Any]) -> bool:
    """Whether an operator gives a tensor a storage that it was handed."""
    return op["name"] == "aten::set_" and str(op["overload"]).startswith("source_Storage")


def _find_cuts(
    trace: Trace,
    events: Events,
    asked: NDArray[np.int64],
    setters: list[int],
    chosen: NDArray[np.int64],
) -> list[tuple[int, ...]]:
    """Where memory came from outside, filled, as rows of accesses: before which node, and which memory.

    torch.tensor and from_numpy make a tensor and fill it. What a tensor was set to came from outside if `find_outside`
    says so. Either holds whatever an operator had made at that place before.
    """
    asked = asked[(events.num_inputs + events.num_outputs)[asked] > 0]
    if not len(asked):
        return []
    outside = find_outside(trace, setters)
    last = (events.first_ref + events.num_inputs + events.num_outputs)[asked] - 1
    storage = events.refs.storage[last]
    cuts: list[tuple[int, ...]] = []
    before = np.searchsorted(chosen, asked)
    columns = (before, asked, storage, events.refs.layout[last], events.refs.offset[last])
    for node, event, number, layout, offset in zip(*(column.tolist() for column in columns), strict=True):
        if number == 0 or node == len(chosen):
            continue
        if int(events.op[event]) not in setters or (int(events.place[event]), int(events.index[event])) in outside:
            cuts.append((node, CUT, number, layout, offset))
    return cuts


def _comms(
    trace: Trace, events: Events, chosen: NDArray[np.int64], op: NDArray[np.int64], shapes: Shapes
) -> list[CommRecord]:
    nodes = np.flatnonzero(events.comm[chosen])
    if not len(nodes):
        return []
    sent, received = (np.array(sizes, np.int64) for sizes in shapes.num_bytes(trace.layouts))
    number = shapes.number[nodes]
    rows = events.comms[events.comm[chosen[nodes]] - 1]
    of_shape = {one: _dtypes(trace, shapes.known[one]) for one in set(number.tolist())}
    return read_comms(
        trace,
        rows,
        nodes,
        op[nodes],
        sent[number],
        received[number],
        [of_shape[one] for one in number.tolist()],
        (events.flags[chosen[nodes]] & int(EventFlags.FAILED)) != 0,
    )


def _dtypes(trace: Trace, shape: Shape) -> str:
    return " ".join(sorted({trace.layouts[one].dtype for one in shape.inputs + shape.outputs if one}))
