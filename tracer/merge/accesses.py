"""What each operator does to memory: reads of arguments, then writes of arguments and of results.

Theory of operation. What happens to a tensor follows from the operator, the argument or result that the tensor is, and
how the operator ran (as root of a communication or not, in training or not, failed or not): that is a table, and a row
of it is looked up for all tensors at once. Which results are new memory also depends on the other tensors of the event,
which are compared column by column. A few operators need more, and are taken one by one by `access_one`: those that put
results into memory of their arguments without saying so, and those that were handed an argument twice or gave it
another size. Both ways say the same, which a test holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.events import Events, Kinds
from truedag.tracer.merge.schema import OpSchema, in_role, without_training
from truedag.tracer.merge.sorting import lay_out, order_by
from truedag.tracer.record.format import SCRATCH_ARG, EventFlags
from truedag.tracer.record.trace import Trace

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

    def insert(self, places: Sequence[int] | NDArray[np.int64], rows: Sequence[tuple[int, ...]]) -> Accesses:
        """Return them with rows (node, kind, storage, layout, offset) put in before the given places."""
        if not len(rows):
            return self
        columns = np.array(rows, np.int64).reshape(-1, 5).T
        old = (self.node, self.kind, self.storage, self.layout, self.offset)
        return _accesses(*(np.insert(one, places, column) for one, column in zip(old, columns, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """What a rank's nodes do to memory, and which tensors (by layout) go into each and come out of it."""

    accesses: Accesses
    input_node: NDArray[np.int64]  # ascending
    input_layout: NDArray[np.int64]
    output_node: NDArray[np.int64]  # ascending
    output_layout: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What one operator does to memory, and the layouts of the tensors that go into it and come out of it."""

    accesses: list[tuple[int, int, int, int]]  # kind, storage, layout, offset
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


# One tensor of an event: offset, storage, layout, arg, element.
Ref = tuple[int, int, int, int, int]


def access_one(schema: OpSchema, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> Effect:
    """Return what one operator does; `schema` says how it ran (`_schema_of`)."""
    accesses: list[tuple[int, int, int, int]] = []
    mine = {storage for _, storage, *_ in inputs}
    # Results that an operator which does not say what it writes has put into its arguments' memory.
    filled = [ref for ref in outputs if ref[1] and ref[1] in mine and ref[3] in schema.fresh]
    filled = [] if schema.is_exact else filled
    touched = {ref[1] for ref in filled}
    changing = UPDATE if schema.is_exact else TOUCH
    for offset, storage, layout, arg, _ in inputs:
        if storage:
            written = arg in schema.writes or storage in touched
            accesses.append(
                (HANDLE if arg in schema.unread else changing if written else READ, storage, layout, offset)
            )
    given: dict[tuple[int, int], int] = {}
    for offset, storage, layout, arg, element in inputs:
        if arg in schema.writes:
            given[arg, element] = layout
            if storage:
                accesses.append((WRITE, storage, layout, offset))
    rewritten = dict(schema.rewritten)
    results: list[int] = []
    fresh: set[int] = set()
    for offset, storage, layout, arg, element in outputs:
        argument = rewritten.get(arg)
        if argument is not None and argument in schema.writes:  # it may have been resized to hold the result
            if storage and given.get((argument, element)) != layout:
                accesses.append((WRITE, storage, layout, offset))
            given[argument, element] = layout
        elif storage and storage not in mine:
            accesses.append(
                (WRITE if storage in fresh else EMPTY if schema.is_empty else FRESH, storage, layout, offset)
            )
            fresh.add(storage)
            if arg != SCRATCH_ARG:
                results.append(layout)
        elif storage and not schema.name.startswith("c10d::") and not schema.writes:
            results.append(layout)
    accesses.extend((WRITE, storage, layout, offset) for offset, storage, layout, *_ in filled)
    return Effect(
        accesses=accesses,
        inputs=tuple(ref[2] for ref in inputs if ref[3] not in schema.unread),
        outputs=(*given.values(), *results),
    )


def find_effects(
    trace: Trace,
    events: Events,
    kinds: Kinds,
    schemas: Mapping[int, OpSchema],
    chosen: NDArray[np.int64],
    *,
    exact: bool = False,
) -> Effects:
    """Return what a rank's operators do to memory.

    Args:
        trace: the rank's.
        events: its events.
        kinds: what they are.
        schemas: of the operators, by number.
        chosen: [nodes] the events that are nodes.
        exact: take every event by itself; the result is the same, which a test holds.
    """
    refs, count = events.refs, len(chosen)
    rows, how = _variants(trace, events, schemas, chosen)
    tables = _Tables(how, int(refs.arg[refs.arg != SCRATCH_ARG].max(initial=0)) + 2)
    failed = (events.flags[chosen] & int(EventFlags.FAILED)) != 0
    _, ref = events.tensors(chosen, results=False)
    into = np.repeat(np.arange(count), events.num_inputs[chosen])
    argument = tables.argument(rows[into], refs.arg[ref])
    made = np.flatnonzero(~failed)
    _, result = events.tensors(chosen[made], results=True)
    out_of = np.repeat(made, events.num_outputs[chosen[made]])
    returned = tables.argument(rows[out_of], refs.arg[result])

    is_written = tables.is_written[argument]
    is_rewritten = tables.rewrites[returned] >= 0
    rare = np.full(count, exact)
    in_arguments = kinds.in_arguments[result]
    rare[out_of[tables.is_filled[returned] & in_arguments]] = True
    slot = (refs.arg[ref] << 17) | refs.element[ref]
    rare[into[1:][(np.diff(into) == 0) & (np.diff(slot) <= 0)]] = True
    is_changed = _is_changed(events, chosen, out_of[is_rewritten], result[is_rewritten], tables, returned[is_rewritten])
    rare[out_of[is_rewritten][is_changed]] = True
    is_new = ~is_rewritten & (refs.storage[result] > 0) & ~in_arguments
    is_result = (is_new & (refs.arg[result] != SCRATCH_ARG)) | (
        ~is_rewritten & in_arguments & tables.gives_arguments[returned]
    )
    common_in, common_out = ~rare[into], ~rare[out_of]

    reads = common_in & (refs.storage[ref] > 0)
    writes = reads & is_written
    new = common_out & is_new
    kind = np.where(tables.is_empty[returned[new]], EMPTY, FRESH)
    kind[_seen_before(out_of[new], refs.storage[result[new]])] = WRITE
    one_by_one = _one_by_one(events, how, rows, chosen, np.flatnonzero(rare), failed)
    accesses = _join(
        refs,
        count,
        [
            (into[reads], ref[reads], tables.kind[argument[reads]]),
            (into[writes], ref[writes], np.full(int(writes.sum()), WRITE)),
            (out_of[new], result[new], kind),
        ],
        one_by_one.accesses,
    )
    goes_in = common_in & ~tables.is_unread[argument]
    given, results = common_in & is_written, common_out & is_result
    input_node, input_layout = _interleave(
        count, (into[goes_in], refs.layout[ref[goes_in]]), (one_by_one.input_node, one_by_one.input_layout)
    )
    output_node, output_layout = _interleave(
        count,
        (into[given], refs.layout[ref[given]]),
        (out_of[results], refs.layout[result[results]]),
        (one_by_one.output_node, one_by_one.output_layout),
    )
    return Effects(
        accesses=accesses,
        input_node=input_node,
        input_layout=input_layout,
        output_node=output_node,
        output_layout=output_layout,
    )


_AS_SAID, _AS_ROOT, _NOT_AS_ROOT, _NOT_TRAINING = range(4)
_WAYS = 8  # each of the four, failed or not


def _variants(
    trace: Trace, events: Events, schemas: Mapping[int, OpSchema], chosen: NDArray[np.int64]
) -> tuple[NDArray[np.int64], list[OpSchema]]:
    """How each node's operator ran: a number for each, and what the numbers mean."""
    way = np.full(len(chosen), _AS_SAID)
    op = events.op[chosen]
    comm = np.flatnonzero(events.comm[chosen])
    rows = events.comms[events.comm[chosen[comm]] - 1]
    own = {number: int(told["rank"]) for number, told in trace.groups.items()}
    mine = np.array([own[group] for group in rows["group"].tolist()], np.int64)
    # Gloo reduces in place on every rank, and leaves what it had got so far on those that are not the root.
    reduces = [number for number, told in trace.ops.items() if told["name"] == "c10d::reduce_"]
    on_gloo = [number for number, told in trace.groups.items() if told.get("backend") == "gloo"]
    is_written = np.isin(op[comm], reduces) & np.isin(rows["group"], on_gloo)
    way[comm] = np.where(is_written | (rows["peer"] == mine), _AS_ROOT, _NOT_AS_ROOT)
    trained = [number for number, schema in schemas.items() if schema.in_training]
    if trained:
        asked = np.flatnonzero(np.isin(op, trained) & (events.comm[chosen] == 0))
        event, ref = events.tensors(chosen[asked], results=True)
        has_bytes = np.zeros(max(trace.layouts, default=0) + 1, bool)
        has_bytes[[number for number, layout in trace.layouts.items() if layout.num_bytes > 0]] = True
        saved = event[(events.refs.arg[ref] == 1) & has_bytes[events.refs.layout[ref]]]
        way[asked[~np.isin(chosen[asked], saved)]] = _NOT_TRAINING
    failed = (events.flags[chosen] & int(EventFlags.FAILED)) != 0
    known, number = np.unique(op * _WAYS + way + 4 * failed, return_inverse=True)
    return number, [_schema_of(schemas[one // _WAYS], one % 4, failed=one % _WAYS >= 4) for one in known.tolist()]


def _schema_of(schema: OpSchema, way: int, *, failed: bool) -> OpSchema:
    if way in (_AS_ROOT, _NOT_AS_ROOT):
        schema = in_role(schema, is_root=way == _AS_ROOT)
    elif way == _NOT_TRAINING:
        schema = without_training(schema)
    return replace(schema, writes=frozenset()) if failed else schema


class _Tables:
    """What is done to a tensor, by how its operator ran and which argument or result it is: [ways x width] each."""

    def __init__(self, how: Sequence[OpSchema], width: int) -> None:
        self._width = width
        shape = (len(how), width)
        self.kind = np.zeros(shape, np.int64)
        self.is_written, self.is_unread, self.is_empty = np.zeros((3, *shape), bool)
        self.is_filled, self.gives_arguments = np.zeros((2, *shape), bool)
        self.rewrites = np.full(shape, -1, np.int64)
        for row, schema in enumerate(how):
            written = [arg for arg in schema.writes if arg < width - 1]
            self.is_written[row, written] = True
            self.kind[row, written] = UPDATE if schema.is_exact else TOUCH
            unread = [arg for arg in schema.unread if arg < width - 1]
            self.is_unread[row, unread] = True
            self.kind[row, unread] = HANDLE
            self.is_empty[row] = schema.is_empty
            self.gives_arguments[row] = not schema.name.startswith("c10d::") and not schema.writes
            if not schema.is_exact:
                self.is_filled[row, [result for result in schema.fresh if result < width - 1]] = True
            for result, argument in schema.rewritten:
                if result < width - 1 and argument in schema.writes:
                    self.rewrites[row, result] = argument
        for name in ("kind", "is_written", "is_unread", "is_empty", "is_filled", "gives_arguments", "rewrites"):
            setattr(self, name, getattr(self, name).ravel())

    def argument(self, row: NDArray[np.int64], arg: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where in the tables it stands; the last column is of what a communication made for its own use."""
        return row * self._width + np.minimum(arg, self._width - 1)


def _is_changed(
    events: Events,
    chosen: NDArray[np.int64],
    node: NDArray[np.int64],
    result: NDArray[np.int64],
    tables: _Tables,
    place: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Which results that are a written argument are not as that argument went in, as far as a quick look tells."""
    refs = events.refs
    wanted = (tables.rewrites[place] << 17) | refs.element[result]
    event = chosen[node]
    first, count = events.first_ref[event], events.num_inputs[event]
    changed = np.ones(len(result), bool)
    going = np.flatnonzero(count > 0)
    for i in range(_FEW_PLACES):
        ref = first[going] + i
        is_it = ((refs.arg[ref] << 17) | refs.element[ref]) == wanted[going]
        changed[going[is_it]] = refs.layout[ref[is_it]] != refs.layout[result[going[is_it]]]
        going = going[~is_it]
        going = going[count[going] > i + 1]
    return changed


_FEW_PLACES = 8


def _seen_before(node: NDArray[np.int64], storage: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which new results lie in memory that an earlier result of their node made."""
    seen = np.zeros(len(node), bool)
    several = np.zeros(len(node), bool)
    several[1:] = node[1:] == node[:-1]
    several[:-1] |= several[1:]
    asked = np.flatnonzero(several)
    order = asked[order_by(node[asked], storage[asked])]
    seen[order[1:]] = (np.diff(node[order]) == 0) & (np.diff(storage[order]) == 0)
    return seen


@dataclass(frozen=True, slots=True, kw_only=True)
class _OneByOne:
    accesses: NDArray[np.int64]  # [accesses, 5]
    input_node: NDArray[np.int64]
    input_layout: NDArray[np.int64]
    output_node: NDArray[np.int64]
    output_layout: NDArray[np.int64]


def _one_by_one(
    events: Events,
    how: Sequence[OpSchema],
    rows: NDArray[np.int64],
    chosen: NDArray[np.int64],
    nodes: NDArray[np.int64],
    failed: NDArray[np.bool_],
) -> _OneByOne:
    refs = events.refs
    columns = (refs.offset, refs.storage, refs.layout, refs.arg, refs.element)
    accesses: list[tuple[int, ...]] = []
    inputs: list[tuple[int, int]] = []
    outputs: list[tuple[int, int]] = []
    for node in nodes.tolist():
        event = int(chosen[node])
        first, num_inputs = int(events.first_ref[event]), int(events.num_inputs[event])
        end = first + num_inputs + (0 if failed[node] else int(events.num_outputs[event]))
        mine: Any = list(zip(*(column[first:end].tolist() for column in columns), strict=True))
        effect = access_one(how[int(rows[node])], mine[:num_inputs], mine[num_inputs:])
        accesses.extend((node, *access) for access in effect.accesses)
        inputs.extend((node, layout) for layout in effect.inputs)
        outputs.extend((node, layout) for layout in effect.outputs)
    into, out_of = (np.array(one, np.int64).reshape(-1, 2) for one in (inputs, outputs))
    return _OneByOne(
        accesses=np.array(accesses, np.int64).reshape(-1, 5),
        input_node=into[:, 0],
        input_layout=into[:, 1],
        output_node=out_of[:, 0],
        output_layout=out_of[:, 1],
    )


def _join(refs: Any, count: int, groups: Sequence[tuple[NDArray[np.int64], ...]], rest: NDArray[np.int64]) -> Accesses:
    """Lay groups of (node, ref, kind) and finished rows out by node, within a node group after group."""
    columns = [
        (node, kind, refs.storage[ref], refs.layout[ref], refs.offset[ref]) for node, ref, kind in groups if len(node)
    ]
    columns.append(tuple(rest.T))
    places = lay_out([column[0] for column in columns], count)
    found = np.empty((5, sum(len(place) for place in places)), np.int64)
    for place, column in zip(places, columns, strict=True):
        for row, values in zip(found, column, strict=True):
            row[place] = values
    return _accesses(*found)


def _interleave(
    count: int, *parts: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lay (node, value) columns out by node."""
    filled = [part for part in parts if len(part[0])]
    if len(filled) == 1:
        return filled[0]
    places = lay_out([node for node, _ in filled], count)
    nodes, values = np.empty((2, sum(len(place) for place in places)), np.int64)
    for place, (node, value) in zip(places, filled, strict=True):
        nodes[place], values[place] = node, value
    return nodes, values


def _accesses(
    node: NDArray[np.int64],
    kind: NDArray[np.int64],
    storage: NDArray[np.int64],
    layout: NDArray[np.int64],
    offset: NDArray[np.int64],
) -> Accesses:
    return Accesses(node=node, kind=kind, storage=storage, layout=layout, offset=offset)
