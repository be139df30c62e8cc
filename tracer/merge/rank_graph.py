"""One rank's part of the graph: its nodes, what was there before them, what came out, and the edges among them.

Local numbers: operators 0..n-1 in program order, outputs from n on, sources -1, -2, ... (`Dataflow.sources`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from truedag.tracer.merge.dataflow import Dataflow, NamedRegion, trace_dataflow
from truedag.tracer.merge.kernels import DeviceTrace
from truedag.tracer.merge.labels import Label
from truedag.tracer.merge.launches import RankKernels, tie_kernels, with_works
from truedag.tracer.merge.nodes import CUT, NAMED, READ, WRITE, Accesses, RankNodes, extract_nodes
from truedag.tracer.merge.numbering import number_communications
from truedag.tracer.merge.regions import extent
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


def build_rank_graph(trace: Trace, device: DeviceTrace | None = None) -> RankGraph:
    """Turn one rank's trace, and what was recorded of its GPUs, into its part of the graph."""
    nodes = extract_nodes(trace)
    kernels = None if device is None else tie_kernels(device, nodes)
    if kernels is not None:
        nodes = replace(nodes, comms=with_works(nodes, kernels))
    begins = [int(nodes.start_ns[record.node]) for record in nodes.comms]
    hears_all = trace.meta["recorder"] == "native"
    nodes = replace(nodes, comms=number_communications(nodes.comms, begins, trace.lanes, hears_all=hears_all))
    begin = int(nodes.start_ns[0]) if len(nodes.start_ns) else 0
    told_names = [told for told in trace.named_tensors if told["role"] != "output" and not told.get("final")]
    named = [_region(told) for told in told_names if told["time_ns"] <= begin]
    late = [told for told in told_names if told["time_ns"] > begin]
    accesses, outputs = _with_outputs(nodes, named)
    accesses = _with_names(accesses, late, nodes)
    flow = trace_dataflow(
        accesses, layouts=trace.layouts, storages=trace.storages, named=named, late=[_region(told) for told in late]
    )
    nodes = replace(nodes, labels=_label_gradients(nodes, named))
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
    # What came from outside just before a node was there when it was named.
    turns = np.where(accesses.node < len(nodes.op), 2 * accesses.node + (accesses.kind != CUT), 0)
    begun = np.searchsorted(np.maximum.accumulate(nodes.start_ns), [told["time_ns"] for told in late])
    places = np.searchsorted(np.maximum.accumulate(turns), 2 * begun + 1)
    rows = np.array(
        [(-1 - i, NAMED, told["storage"], told["layout"], told["offset_bytes"]) for i, told in enumerate(late)],
        np.int64,
    ).reshape(-1, 5)
    parts = (accesses.node, accesses.kind, accesses.storage, accesses.layout, accesses.offset)
    node, kind, storage, layout, offset = (np.insert(part, places, rows[:, i]) for i, part in enumerate(parts))
    return Accesses(node=node, kind=kind, storage=storage, layout=layout, offset=offset)


def _with_outputs(nodes: RankNodes, named: list[NamedRegion]) -> tuple[Accesses, list[Output]]:
    """Add a read for every named result when it was named, and for every parameter at the end."""
    outputs: list[Output] = []
    places: list[int] = []
    rows: list[tuple[int, int, int, int, int]] = []
    access_times = nodes.start_ns[nodes.accesses.node] if len(nodes.start_ns) else np.zeros(0, np.int64)
    end = int(nodes.end_ns.max()) if len(nodes.end_ns) else 0
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
    last_step = nodes.labels[-1].step if nodes.labels else None
    for name, in_storage, in_layout, at, time in wanted:
        rows.append((len(nodes.op) + len(outputs), READ, in_storage, in_layout, at))
        outputs.append(Output(name=name, layout=in_layout, time_ns=time, context=Label(step=last_step)))
        places.append(int(np.searchsorted(access_times, time)))
    columns = np.array(rows, np.int64).reshape(-1, 5)
    old = nodes.accesses
    parts = (old.node, old.kind, old.storage, old.layout, old.offset)
    node, kind, storage, layout, offset = (np.insert(part, places, columns[:, i]) for i, part in enumerate(parts))
    return Accesses(node=node, kind=kind, storage=storage, layout=layout, offset=offset), outputs


def _label_gradients(nodes: RankNodes, named: list[NamedRegion]) -> list[Label]:
    """Name the gradient that a node adds to; where it belongs to no module otherwise, it belongs to the parameter's."""
    layouts = nodes.trace.layouts
    owners: dict[tuple[int, int], NamedRegion] = {}
    for one in named:
        if one.role == "gradient" and (where := extent(layouts[one.layout])).num_bytes:
            owners[one.storage, one.offset + where.low] = one
    modules = {str(told["module"]): told for told in nodes.trace.labels.values()}
    labels = list(nodes.labels)
    accesses = nodes.accesses
    for i in np.flatnonzero(accesses.kind == WRITE).tolist():
        node = int(accesses.node[i])
        owner = owners.get((int(accesses.storage[i]), int(accesses.offset[i])))
        if owner is None or not nodes.in_backward[node]:
            continue
        if layouts[int(accesses.layout[i])].num_bytes != layouts[owner.layout].num_bytes:
            continue
        labels[node] = replace(labels[node], gradient=owner.name)
        if labels[node].module is not None:
            continue
        module = owner.name.rpartition(".")[0]
        told = modules.get(module, {})
        labels[node] = replace(
            labels[node],
            module=module,
            layer=told.get("layer"),
            expert=told.get("expert"),
            category=told.get("category"),
        )
    return labels


def _keep_written_outputs(graph: RankGraph) -> RankGraph:
    """Drop outputs that the recording did not write: a parameter that stayed what it was is no result."""
    first = len(graph.nodes.op)
    flow = graph.flow
    into = flow.dst >= first
    written = sorted(set(flow.dst[into & (flow.src >= 0)].tolist()))
    number = {old: first + new for new, old in enumerate(written)}
    keep = ~into | np.isin(flow.dst, written)
    dst = np.array([number.get(node, node) for node in flow.dst[keep].tolist()], np.int64)
    return RankGraph(
        nodes=graph.nodes,
        flow=replace(
            flow,
            src=flow.src[keep],
            dst=dst,
            num_bytes=flow.num_bytes[keep],
            layout=flow.layout[keep],
            is_update=flow.is_update[keep],
        ),
        outputs=[graph.outputs[old - first] for old in written],
    )
