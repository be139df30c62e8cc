"""One rank's part of the graph: its nodes, what was there before them, what came out, and the edges among them.

Local numbers: operators 0..n-1 in program order, outputs from n on, sources -1, -2, ... (`Dataflow.sources`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from truedag.tracer.merge.accesses import CUT, NAMED, READ, WRITE, Accesses
from truedag.tracer.merge.dataflow import trace_dataflow
from truedag.tracer.merge.flow import Dataflow, NamedRegion
from truedag.tracer.merge.kernels import DeviceTrace
from truedag.tracer.merge.labels import UNKNOWN, Label, LabelColumns, Texts
from truedag.tracer.merge.launches import RankKernels, tie_kernels, with_works
from truedag.tracer.merge.nodes import RankNodes, extract_nodes
from truedag.tracer.merge.numbering import number_communications
from truedag.tracer.merge.regions import extent
from truedag.tracer.merge.sorting import number_by_appearance
from truedag.tracer.record.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A value that the program named as a result, or a parameter as the recording left it."""

    name: str
    layout: int
    time_ns: int
    context: Label


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGraph:
    """One rank's part of the graph."""

    nodes: RankNodes
    flow: Dataflow
    outputs: list[Output]
    kernels: RankKernels | None = None  # where a GPU was recorded

    @property
    def rank(self) -> int:
        """The rank."""
        return self.nodes.trace.rank


def build_rank_graph(trace: Trace, device: DeviceTrace | None = None, *, exact: bool = False) -> RankGraph:
    """Turn one rank's trace, and what was recorded of its GPUs, into its part of the graph.

    Args:
        trace: the rank's.
        device: what its GPUs did.
        exact: take every event by itself and follow all bytes; the result is the same, which a test holds.
    """
    nodes = extract_nodes(trace, exact=exact)
    kernels = None if device is None else tie_kernels(device, nodes)
    if kernels is not None:
        nodes = replace(nodes, comms=with_works(nodes, kernels))
    hears_all = trace.meta["recorder"] == "native"
    begins = nodes.start_ns[[record.node for record in nodes.comms]].tolist() if nodes.comms else []
    nodes = replace(nodes, comms=number_communications(nodes.comms, begins, trace.lanes, hears_all=hears_all))
    begin = int(nodes.start_ns[0]) if len(nodes) else 0
    told_names = [told for told in trace.named_tensors if told["role"] != "output" and not told.get("final")]
    named = [_region(told) for told in told_names if told["time_ns"] <= begin]
    late = [told for told in told_names if told["time_ns"] > begin]
    accesses, outputs = _with_outputs(nodes, named)
    accesses = _with_names(accesses, late, nodes)
    flow = trace_dataflow(
        accesses,
        layouts=trace.layouts,
        impls=np.concatenate((np.zeros(1, np.int64), number_by_appearance(trace.storage_records["impl"]))),
        named=named,
        late=[_region(told) for told in late],
        exact=exact,
    )
    nodes = replace(nodes, belonging=_label_gradients(nodes, named))
    return replace(_keep_written_outputs(RankGraph(nodes=nodes, flow=flow, outputs=outputs)), kernels=kernels)


def _region(told: Mapping[str, Any]) -> NamedRegion:
    return NamedRegion(
        name=told["name"],
        role=told["role"],
        storage=told["storage"],
        layout=told["layout"],
        offset=told["offset_bytes"],
    )


def _with_names(accesses: Accesses, late: Sequence[Mapping[str, Any]], nodes: RankNodes) -> Accesses:
    """Add what was named during the recording, before what was accessed after that; its node is -1 - its place."""
    if not late:
        return accesses
    # What came from outside just before a node was there when it was named.
    turns = np.where(accesses.node < len(nodes), 2 * accesses.node + (accesses.kind != CUT), 0)
    begun = np.searchsorted(np.maximum.accumulate(nodes.start_ns), [told["time_ns"] for told in late])
    places = np.searchsorted(np.maximum.accumulate(turns), 2 * begun + 1)
    rows = [(-1 - i, NAMED, told["storage"], told["layout"], told["offset_bytes"]) for i, told in enumerate(late)]
    return accesses.insert(places, rows)


def _with_outputs(nodes: RankNodes, named: list[NamedRegion]) -> tuple[Accesses, list[Output]]:
    """Add a read for every named result when it was named, and for every parameter at the end."""
    end = int(nodes.end_ns.max()) if len(nodes) else 0
    wanted = []
    final = []  # parameters where they lie at the end, in other memory perhaps than at the beginning
    for told in nodes.trace.named_tensors:
        place = (told["name"], told["storage"], told["layout"], told["offset_bytes"])
        if told.get("final"):
            final.extend([(*place, end + 1)] if told["role"] == "parameter" else [])
        elif told["role"] == "output":
            wanted.append((*place, told["time_ns"]))
    if not any(told.get("final") for told in nodes.trace.named_tensors):
        final = [(one.name, one.storage, one.layout, one.offset, end + 1) for one in named if one.role == "parameter"]
    wanted += final
    context = Label(step=nodes.belonging.label(-1).step if len(nodes) else None)
    outputs = [Output(name=name, layout=layout, time_ns=time, context=context) for name, _, layout, _, time in wanted]
    rows = [(len(nodes) + i, READ, storage, layout, at) for i, (_, storage, layout, at, _) in enumerate(wanted)]
    times = nodes.start_ns[nodes.accesses.node] if len(nodes) else np.zeros(0, np.int64)
    return nodes.accesses.insert(np.searchsorted(times, [output.time_ns for output in outputs]), rows), outputs


def _label_gradients(nodes: RankNodes, named: list[NamedRegion]) -> LabelColumns:
    """Name the gradient that a node adds to; where it belongs to no module otherwise, it belongs to the parameter's."""
    layouts, accesses, known = nodes.trace.layouts, nodes.accesses, nodes.belonging
    owners: dict[tuple[int, int], NamedRegion] = {}
    for one in named:
        if one.role == "gradient" and (where := extent(layouts[one.layout])).num_bytes:
            owners[one.storage, one.offset + where.low] = one
    if not owners:
        return known
    has_owner = np.zeros(int(accesses.storage.max(initial=0)) + 1, bool)
    has_owner[[storage for storage, _ in owners if storage < len(has_owner)]] = True
    rows = np.flatnonzero((accesses.kind == WRITE) & has_owner[accesses.storage])
    rows = rows[nodes.in_backward[accesses.node[rows]]]
    modules = {str(told.get("module")): told for told in nodes.trace.labels.values()}
    texts = Texts(known.texts)
    columns = {name: column.copy() for name, column in known.columns.items()}
    told: dict[str, tuple[int, ...]] = {}
    asked = zip(
        *(one[rows].tolist() for one in (accesses.node, accesses.storage, accesses.offset, accesses.layout)),
        strict=True,
    )
    for node, storage, offset, layout in asked:
        owner = owners.get((storage, offset))
        if owner is None or layouts[layout].num_bytes != layouts[owner.layout].num_bytes:
            continue
        if owner.name not in told:
            told[owner.name] = _of_gradient(owner.name, modules, texts)
        gradient, module, layer, expert, category = told[owner.name]
        columns["gradient"][node] = gradient
        if columns["module"][node] < 0:
            columns["module"][node], columns["layer"][node] = module, layer
            columns["expert"][node], columns["category"][node] = expert, category
    return LabelColumns(columns=columns, texts=texts.told())


def _of_gradient(name: str, modules: Mapping[str, Mapping[str, Any]], texts: Texts) -> tuple[int, ...]:
    """What belongs to a parameter's gradient: its own name's place, its module's place, layer, expert and category."""
    module = name.rpartition(".")[0]
    told = modules.get(module, {})
    layer, expert = (UNKNOWN if told.get(one) is None else int(told[one]) for one in ("layer", "expert"))
    return texts.place(name), texts.place(module), layer, expert, texts.place(told.get("category"))


def _keep_written_outputs(graph: RankGraph) -> RankGraph:
    """Drop outputs that the recording did not write: a parameter that stayed what it was is no result."""
    if not graph.outputs:
        return graph
    first = len(graph.nodes)
    flow = graph.flow
    into = flow.dst >= first
    is_written = np.zeros(first + len(graph.outputs), bool)
    is_written[flow.dst[into & (flow.src >= 0)]] = True
    written = np.flatnonzero(is_written)
    number = np.arange(len(is_written))
    number[written] = first + np.arange(len(written))
    keep = ~into | is_written[flow.dst]
    return RankGraph(
        nodes=graph.nodes,
        flow=replace(
            flow,
            src=flow.src[keep],
            dst=number[flow.dst[keep]],
            num_bytes=flow.num_bytes[keep],
            layout=flow.layout[keep],
            is_update=flow.is_update[keep],
        ),
        outputs=[graph.outputs[old - first] for old in written.tolist()],
    )
