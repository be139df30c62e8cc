"""Lay the ranks' parts side by side: one column store of nodes and edges, with every communication in one piece.

A collective takes the place of its participants' records: each rank's producers lead into it, it leads to each rank's
consumers. A message joins its send to its receive by an edge. Program order chains the operators of a thread; what
runs asynchronously (messages, async collectives) hangs on the chain without being in it, since the thread goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.align import Clock
from truedag.tracer.merge.columns import DATA, ORDER, Assembly, EdgeList
from truedag.tracer.merge.device_nodes import add_kernels, node_spans
from truedag.tracer.merge.flops import count_flops
from truedag.tracer.merge.joining import add_collective, join_message, participate_alone, short_name, told_axes
from truedag.tracer.merge.labels import Label
from truedag.tracer.merge.match import Matched
from truedag.tracer.merge.nodes import CommRecord, describe_tensors
from truedag.tracer.merge.rank_graph import RankGraph
from truedag.tracer.record.trace import Layout


def assemble(graphs: Sequence[RankGraph], matched: Matched, clocks: Mapping[int, Clock]) -> Assembly:
    """Lay all ranks' nodes and edges side by side."""
    out = Assembly()
    edges = EdgeList()
    by_rank = {graph.rank: graph for graph in graphs}
    axes = told_axes(graphs)
    place = {graph.rank: np.full(len(graph.nodes.op) + len(graph.outputs), -1, np.int64) for graph in graphs}
    for collective in matched.collectives:
        node = add_collective(out, collective, by_rank, clocks, axes)
        for rank, record in collective.records.items():
            place[rank][record.node] = node
    for graph in graphs:
        _add_rank(out, edges, graph, place[graph.rank], clocks[graph.rank], axes)
    for message in matched.messages:
        join_message(out, edges, message, place, by_rank, clocks)
    participate_alone(out, matched, place, by_rank, clocks)
    columns = [np.concatenate([part[i] for part in edges.columns]) for i in range(6)]
    out.src, out.dst, out.edge_kind, out.edge_bytes, out.edge_layout = columns[:5]
    out.edge_update = columns[5] != 0
    _drop_repeated_order(out)
    out.unlabelled = {i for i, kind in enumerate(out.kind) if kind in ("send", "recv")}
    for graph in graphs:
        for node in np.flatnonzero(graph.nodes.in_backward).tolist():
            if graph.nodes.labels[node].microbatch is None:
                out.unlabelled.add(int(place[graph.rank][node]))
    return out


def _add_rank(
    out: Assembly,
    edges: EdgeList,
    graph: RankGraph,
    place: NDArray[np.int64],
    clock: Clock,
    axes: Mapping[tuple[str, tuple[int, ...]], str],
) -> None:
    nodes, rank = graph.nodes, graph.rank
    layouts = nodes.trace.layouts
    stage = nodes.trace.meta["coordinates"].get("pp")
    sizes = {0: 0} | {number: layout.num_bytes for number, layout in layouts.items()}  # 0: sparse, say
    describe = _Describer(layouts)
    comms = {record.node: record for record in nodes.comms}
    begin = clock.at(int(nodes.start_ns[0]) if len(nodes.start_ns) else 0)
    on_gpu = {} if graph.kernels is None else node_spans(graph.kernels)
    starts, ends = (clock.correct(times).tolist() for times in (nodes.start_ns, nodes.end_ns))
    for node in range(len(nodes.op)):
        if place[node] >= 0:
            continue
        op, start = nodes.op[node], starts[node]
        host = (start, ends[node])
        end: int | None = host[1]
        stream = -1
        if node in on_gpu:
            gpu_start, gpu_end, stream = on_gpu[node]
        kind, label = "compute", short_name(op)
        if node in comms:
            record = comms[node]
            kind = {"c10d::send": "send", "c10d::recv_": "recv", "c10d::recv_any_source_": "recv"}.get(op, "collective")
            label = f"{label} {axes.get((record.group_name, record.group), '')}".strip()
            # The host's call ends long before: when a communication is over, its backend tells or nobody.
            end = None if record.work_end_ns is None else clock.at(record.work_end_ns)
        elif node in on_gpu:
            start, end = clock.at(gpu_start), clock.at(gpu_end)
        place[node] = out.add(
            rank=rank,
            kind=kind,
            op=op,
            label=label,
            labels=nodes.labels[node],
            sort_ns=host[0],
            stage=stage,
            thread=int(nodes.thread[node]),
            start_ns=start,
            end_ns=end,
            stream=stream,
            host_ns=host,
            flops=_count_flops(op, layouts, nodes.inputs[node], nodes.outputs[node]),
            bytes_read=sum(sizes[i] for i in nodes.inputs[node]),
            bytes_written=sum(sizes[i] for i in nodes.outputs[node]),
            inputs=describe(nodes.inputs[node]),
            outputs=describe(nodes.outputs[node]),
        )
    for i, output in enumerate(graph.outputs):
        place[len(nodes.op) + i] = out.add(
            rank=rank,
            kind="output",
            op="output",
            label=output.name,
            labels=output.context,
            sort_ns=clock.at(output.time_ns),
            stage=stage,
            inputs=describe((output.layout,)),
        )
    sources = np.array(
        [_add_source(out, graph, i, stage, describe, begin) for i in range(len(graph.flow.sources))], np.int64
    )
    flow = graph.flow
    first_layout = len(out.layouts)
    numbers = sorted(layouts)
    out.layouts.extend(layouts[number] for number in numbers)
    layout_place = np.zeros(max(numbers, default=0) + 1, np.int64)
    layout_place[numbers] = first_layout + np.arange(len(numbers))
    lookup = np.concatenate((place, sources[::-1]))  # a source's place is counted from the end
    edges.add(lookup[flow.src], lookup[flow.dst], DATA, flow.num_bytes, layout_place[flow.layout], flow.is_update)
    _chain_threads(edges, nodes.thread, place, comms)
    if graph.kernels is not None:
        add_kernels(out, edges, graph.kernels, nodes, place, rank=rank, clock=clock, stage=stage)


def _count_flops(
    op: str, layouts: Mapping[int, Layout], inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> int | None:
    if 0 in inputs or 0 in outputs:
        return None  # of a tensor that has no strides
    return count_flops(op, [layouts[i] for i in inputs], [layouts[i] for i in outputs])


def _add_source(
    out: Assembly, graph: RankGraph, index: int, stage: int | None, describe: _Describer, begin: int
) -> int:
    source = graph.flow.sources[index]
    labels = Label()
    if source.role == "parameter" and source.name is not None:
        module = source.name.rpartition(".")[0]
        told = next((one for one in graph.nodes.trace.labels.values() if one["module"] == module), {})
        labels = Label(module=module, layer=told.get("layer"), expert=told.get("expert"), category=told.get("category"))
    return out.add(
        rank=graph.rank,
        kind="parameter" if source.role == "parameter" else "input",
        op=source.role,
        label=source.name or "",
        labels=labels,
        sort_ns=begin - 1,
        stage=stage,
        outputs=describe((source.layout,)),
    )


def _chain_threads(
    edges: EdgeList, threads: NDArray[np.int64], place: NDArray[np.int64], comms: Mapping[int, CommRecord]
) -> None:
    """Chain each thread's operators; what is asynchronous follows the one before it, and nothing follows it."""
    src: list[int] = []
    dst: list[int] = []
    last: dict[int, int] = {}
    for node, thread in enumerate(threads.tolist()):
        if thread in last:
            src.append(int(place[last[thread]]))
            dst.append(int(place[node]))
        if node not in comms or not comms[node].is_async:
            last[thread] = node
    edges.add(np.array(src, np.int64), np.array(dst, np.int64), ORDER)


def _drop_repeated_order(out: Assembly) -> None:
    """Two participants' program order between the same two collectives is one edge."""
    is_order = out.edge_kind == ORDER
    pairs = out.src * len(out.rank) + out.dst
    first = np.zeros(len(pairs), bool)
    first[np.unique(np.where(is_order, pairs, -1 - np.arange(len(pairs))), return_index=True)[1]] = True
    keep = first & ~(is_order & (out.src == out.dst))
    for name in ("src", "dst", "edge_kind", "edge_bytes", "edge_layout", "edge_update"):
        setattr(out, name, getattr(out, name)[keep])


def label_by_dataflow(assembly: Assembly, number: NDArray[np.int64]) -> None:
    """Give messages and gradient accumulation the microbatch of the data they carry.

    A message carries what its producer made, so it belongs to that microbatch and phase; the receive to the send's. An
    operator of autograd's engine without a forward operator (it adds a finished gradient to a parameter's) belongs to
    the microbatch of what it adds, not of what it adds to.
    """
    wanted = assembly.unlabelled
    producers: dict[int, list[int]] = {}
    into = np.isin(assembly.dst, np.array(sorted(wanted), np.int64))
    for edge in np.flatnonzero(into & (assembly.edge_kind != ORDER) & ~assembly.edge_update).tolist():
        src = int(assembly.src[edge])
        if assembly.kind[src] not in ("parameter", "input"):
            producers.setdefault(int(assembly.dst[edge]), []).append(src)
    labels = assembly.labels
    for node in sorted(wanted, key=lambda node: int(number[node])):
        known = {
            (labels[src].microbatch, labels[src].phase)
            for src in producers.get(node, [])
            if labels[src].microbatch is not None
        }
        if labels[node].microbatch is None and len(known) == 1:
            microbatch, phase = known.pop()
            labels[node] = replace(labels[node], microbatch=microbatch, phase=labels[node].phase or phase)


class _Describer:
    """Writes a list of tensors as text, each list once."""

    def __init__(self, layouts: Mapping[int, Layout]) -> None:
        self._layouts = layouts
        self._known: dict[tuple[int, ...], str] = {}

    def __call__(self, numbers: tuple[int, ...]) -> str:
        known = self._known.get(numbers)
        if known is None:
            known = self._known[numbers] = describe_tensors(self._layouts, numbers)
        return known
