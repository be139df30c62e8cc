"""Lay the ranks' parts side by side: one column store of nodes and edges, with every communication in one piece.

A collective takes the place of its participants' records: each rank's producers lead into it, it leads to each rank's
consumers. A message joins its send to its receive by an edge. Program order chains the operators of a thread; what
runs asynchronously (messages, async collectives) hangs on the chain without being in it, since the thread goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.align import Clock, Span, split_waiting
from truedag.tracer.flops import count_flops
from truedag.tracer.match import Collective, Matched, Message
from truedag.tracer.nodes import CommRecord, Label, describe_tensor
from truedag.tracer.rank_graph import RankGraph
from truedag.tracer.trace import Layout

NO_TIME = np.iinfo(np.int64).min
DATA, P2P, ORDER = 0, 1, 2
EDGE_KINDS = ("data", "p2p", "order")


@dataclass(slots=True)
class Assembly:
    """Nodes and edges of all ranks, as columns; a node's place is its number before the topological one."""

    rank: list[int] = field(default_factory=list)
    kind: list[str] = field(default_factory=list)
    op: list[str] = field(default_factory=list)
    label: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    stage: list[int | None] = field(default_factory=list)
    thread: list[int] = field(default_factory=list)
    start_ns: list[int | None] = field(default_factory=list)
    end_ns: list[int | None] = field(default_factory=list)
    flops: list[int | None] = field(default_factory=list)
    bytes_read: list[int] = field(default_factory=list)
    bytes_written: list[int] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    sort_ns: list[int] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    src: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    dst: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    edge_kind: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    edge_bytes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    edge_layout: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # -1: none
    edge_update: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))  # dst then wrote what it read
    participants: list[dict[str, object]] = field(default_factory=list)
    unlabelled: set[int] = field(default_factory=set)  # nodes that take their microbatch from their data

    @property
    def time_ns(self) -> NDArray[np.int64]:
        """When each node began, for numbering."""
        return np.array(self.sort_ns, np.int64)

    def add(
        self,
        *,
        rank: int,
        kind: str,
        op: str,
        label: str,
        labels: Label,
        sort_ns: int,
        stage: int | None = None,
        thread: int = -1,
        start_ns: int | None = None,
        end_ns: int | None = None,
        flops: int | None = None,
        bytes_read: int = 0,
        bytes_written: int = 0,
        inputs: str = "",
        outputs: str = "",
    ) -> int:
        """Add a node and return its place."""
        self.rank.append(rank)
        self.kind.append(kind)
        self.op.append(op)
        self.label.append(label)
        self.labels.append(labels)
        self.stage.append(stage)
        self.thread.append(thread)
        self.start_ns.append(start_ns)
        self.end_ns.append(end_ns)
        self.flops.append(flops)
        self.bytes_read.append(bytes_read)
        self.bytes_written.append(bytes_written)
        self.inputs.append(inputs)
        self.outputs.append(outputs)
        self.sort_ns.append(sort_ns)
        return len(self.rank) - 1


@dataclass(slots=True)
class _Edges:
    columns: list[tuple[NDArray[np.int64], ...]] = field(default_factory=list)

    def add(
        self,
        src: NDArray[np.int64],
        dst: NDArray[np.int64],
        kind: int,
        count: NDArray[np.int64] | None = None,
        layout: NDArray[np.int64] | None = None,
        update: NDArray[np.bool_] | None = None,
    ) -> None:
        size = len(src)
        self.columns.append(
            (
                src,
                dst,
                np.full(size, kind, np.int64),
                np.zeros(size, np.int64) if count is None else count,
                np.full(size, -1, np.int64) if layout is None else layout,
                np.zeros(size, np.int64) if update is None else update.astype(np.int64),
            )
        )


def assemble(graphs: Sequence[RankGraph], matched: Matched, clocks: Mapping[int, Clock]) -> Assembly:
    """Lay all ranks' nodes and edges side by side."""
    out = Assembly()
    edges = _Edges()
    by_rank = {graph.rank: graph for graph in graphs}
    axes = _axes(graphs)
    place = {graph.rank: np.full(len(graph.nodes.op) + len(graph.outputs), -1, np.int64) for graph in graphs}
    for collective in matched.collectives:
        node = _add_collective(out, collective, by_rank, clocks, axes)
        for rank, record in collective.records.items():
            place[rank][record.node] = node
    for graph in graphs:
        _add_rank(out, edges, graph, place[graph.rank], clocks[graph.rank].offset_ns, axes)
    for message in matched.messages:
        _join_message(out, edges, message, place, by_rank, clocks)
    _participate_alone(out, matched, place, by_rank, clocks)
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


def _axes(graphs: Sequence[RankGraph]) -> dict[tuple[str, tuple[int, ...]], str]:
    """Which axis each group is, by name and ranks, as any of its members told."""
    axes = {}
    for graph in graphs:
        for told in graph.nodes.trace.group_ranks.values():
            if told.get("axis"):
                axes[told["name"], tuple(told["ranks"])] = str(told["axis"])
    return axes


_SHORT = {
    "_allgather_base_": "all-gather", "allgather_": "all-gather", "allgather_coalesced_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather", "allreduce_": "all-reduce", "allreduce_coalesced_": "all-reduce",
    "_reduce_scatter_base_": "reduce-scatter", "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter", "alltoall_": "all-to-all", "alltoall_base_": "all-to-all",
    "broadcast_": "broadcast", "reduce_": "reduce", "gather_": "gather", "scatter_": "scatter", "send": "send",
    "recv_": "receive", "recv_any_source_": "receive", "barrier": "barrier", "monitored_barrier_": "barrier",
}  # fmt: skip


def short_name(op: str) -> str:
    """Name an operator as people do: `aten::mm` is mm, `c10d::allreduce_` all-reduce."""
    namespace, _, name = op.rpartition("::")
    return _SHORT.get(name, name) if namespace == "c10d" else name


def _add_collective(
    out: Assembly,
    collective: Collective,
    by_rank: Mapping[int, RankGraph],
    clocks: Mapping[int, Clock],
    axes: Mapping[tuple[str, tuple[int, ...]], str],
) -> int:
    spans, last = _spans(collective.records, by_rank, clocks)
    first_rank = collective.group[0]
    first = by_rank[first_rank].nodes
    record = collective.records[first_rank]
    labels = _agree([by_rank[rank].nodes.labels[one.node] for rank, one in collective.records.items()])
    stages = {by_rank[rank].nodes.trace.meta["coordinates"].get("pp") for rank in collective.group}
    axis = axes.get((collective.group_name, collective.group), "")
    arrivals = [span.arrive_ns for span in spans.values()]
    ends = [span.end_ns for span in spans.values() if span.end_ns != NO_TIME]
    sizes = {rank: _moved(by_rank[rank], one) for rank, one in collective.records.items()}
    node = out.add(
        rank=-1,
        kind="collective",
        op=record.op,
        label=f"{short_name(record.op)} {axis}".strip(),
        labels=labels,
        sort_ns=last,
        stage=stages.pop() if len(stages) == 1 else None,
        start_ns=min(arrivals),
        end_ns=max(ends) if len(ends) == len(spans) else None,
        bytes_read=sum(sent for sent, _ in sizes.values()),
        bytes_written=sum(received for _, received in sizes.values()),
        inputs=_describe(first.trace.layouts, first.inputs[record.node]),
        outputs=_describe(first.trace.layouts, first.outputs[record.node]),
    )
    sequences = {one.backend_sequence for one in collective.records.values()}
    for rank, span in spans.items():
        sent, received = sizes[rank]
        _participate(
            out,
            node,
            rank,
            collective.group_name,
            collective.group,
            sequences.copy().pop() if len(sequences) == 1 and -1 not in sequences else collective.order,
            span,
            sent,
            received,
        )
    return node


def _spans(
    records: Mapping[int, CommRecord], by_rank: Mapping[int, RankGraph], clocks: Mapping[int, Clock]
) -> tuple[dict[int, Span], int]:
    """Every participant's time, and when the last one arrived. Ends are NO_TIME where the backend did not tell."""
    arrivals, ends = {}, {}
    for rank, record in records.items():
        nodes, offset = by_rank[rank].nodes, clocks[rank].offset_ns
        begin = int(nodes.start_ns[record.node]) if record.work_start_ns is None else record.work_start_ns
        arrivals[rank] = begin + offset
        if record.work_end_ns is not None:
            ends[rank] = record.work_end_ns + offset
    last = max(arrivals.values())
    if len(ends) == len(records):
        return split_waiting(arrivals, ends), last
    return {
        rank: Span(arrive_ns=arrive, start_ns=last, end_ns=ends.get(rank, NO_TIME)) for rank, arrive in arrivals.items()
    }, last


def _agree(labels: Sequence[Label]) -> Label:
    """What all participants say alike; what they do not is unknown."""
    first = labels[0]

    def same(values: list[object]) -> bool:
        return all(value == values[0] for value in values)

    return Label(
        module=first.module if same([label.module for label in labels]) else None,
        layer=first.layer if same([label.layer for label in labels]) else None,
        expert=first.expert if same([label.expert for label in labels]) else None,
        category=first.category if same([label.category for label in labels]) else None,
        microbatch=first.microbatch if same([label.microbatch for label in labels]) else None,
        phase=first.phase if same([label.phase for label in labels]) else None,
        step=first.step if same([label.step for label in labels]) else None,
        decode_step=first.decode_step if same([label.decode_step for label in labels]) else None,
    )


def _moved(graph: RankGraph, record: CommRecord) -> tuple[int, int]:
    """Bytes a rank gives to a communication, and gets from it."""
    layouts = graph.nodes.trace.layouts
    sent = sum(layouts[i].num_bytes for i in graph.nodes.inputs[record.node])
    received = sum(layouts[i].num_bytes for i in graph.nodes.outputs[record.node])
    if record.op == "c10d::send":
        return sent, 0
    return (0, received) if record.is_p2p else (sent, received)


def _participate(
    out: Assembly,
    node: int,
    rank: int,
    group_name: str,
    group: tuple[int, ...],
    sequence: int,
    span: Span,
    sent: int,
    received: int,
) -> None:
    out.participants.append(
        {
            "node": node,
            "rank": rank,
            "group": (group_name, group),
            "seq": sequence,
            "arrive_ns": span.arrive_ns,
            "start_ns": span.start_ns,
            "end_ns": None if span.end_ns == NO_TIME else span.end_ns,
            "send_bytes": sent,
            "recv_bytes": received,
        }
    )


def _add_rank(
    out: Assembly,
    edges: _Edges,
    graph: RankGraph,
    place: NDArray[np.int64],
    offset: int,
    axes: Mapping[tuple[str, tuple[int, ...]], str],
) -> None:
    nodes, rank = graph.nodes, graph.rank
    layouts = nodes.trace.layouts
    stage = nodes.trace.meta["coordinates"].get("pp")
    sizes = {number: layout.num_bytes for number, layout in layouts.items()}
    describe = _Describer(layouts)
    comms = {record.node: record for record in nodes.comms}
    begin = (int(nodes.start_ns[0]) if len(nodes.start_ns) else 0) + offset
    for node in range(len(nodes.op)):
        if place[node] >= 0:
            continue
        op, start = nodes.op[node], int(nodes.start_ns[node]) + offset
        end = int(nodes.end_ns[node]) + offset
        kind, label = "compute", short_name(op)
        if node in comms:
            record = comms[node]
            kind = {"c10d::send": "send", "c10d::recv_": "recv", "c10d::recv_any_source_": "recv"}.get(op, "collective")
            label = f"{label} {axes.get((record.group_name, record.group), '')}".strip()
            end = (record.work_end_ns or int(nodes.end_ns[node])) + offset
        place[node] = out.add(
            rank=rank,
            kind=kind,
            op=op,
            label=label,
            labels=nodes.labels[node],
            sort_ns=start,
            stage=stage,
            thread=int(nodes.thread[node]),
            start_ns=start,
            end_ns=end,
            flops=count_flops(op, [layouts[i] for i in nodes.inputs[node]], [layouts[i] for i in nodes.outputs[node]]),
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
            sort_ns=output.time_ns + offset,
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


def _add_source(
    out: Assembly, graph: RankGraph, index: int, stage: int | None, describe: _Describer, begin: int
) -> int:
    source = graph.flow.sources[index]
    labels = Label()
    if source.role == "parameter" and source.name is not None:
        module = source.name.rpartition(".")[0]
        told = next((one for one in graph.nodes.trace.labels.values() if one["module"] == module), {})
        labels = Label(module=module, layer=told.get("layer"), expert=told.get("expert"))
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
    edges: _Edges, threads: NDArray[np.int64], place: NDArray[np.int64], comms: Mapping[int, CommRecord]
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


def _join_message(
    out: Assembly,
    edges: _Edges,
    message: Message,
    place: Mapping[int, NDArray[np.int64]],
    by_rank: Mapping[int, RankGraph],
    clocks: Mapping[int, Clock],
) -> None:
    send = int(place[message.source][message.send.node])
    receive = int(place[message.destination][message.receive.node])
    graph = by_rank[message.destination]
    sent = _moved(by_rank[message.source], message.send)[0]
    received = _moved(graph, message.receive)[1]
    layout = graph.nodes.outputs[message.receive.node][0]
    number = len(out.layouts)
    out.layouts.append(graph.nodes.trace.layouts[layout])
    edges.add(np.array([send]), np.array([receive]), P2P, np.array([received], np.int64), np.array([number], np.int64))
    # Two records of one rank sending to itself are one participant each.
    send_spans, _ = _spans({message.source: message.send}, by_rank, clocks)
    receive_spans, _ = _spans({message.destination: message.receive}, by_rank, clocks)
    send_span, receive_span = send_spans[message.source], receive_spans[message.destination]
    last = max(send_span.arrive_ns, receive_span.arrive_ns)
    for node, rank, span, bytes_out, bytes_in in (
        (send, message.source, send_span, sent, 0),
        (receive, message.destination, receive_span, 0, received),
    ):
        start = last if span.end_ns == NO_TIME else min(last, span.end_ns)
        _participate(
            out,
            node,
            rank,
            message.group_name,
            message.group,
            message.order,
            replace(span, start_ns=start),
            bytes_out,
            bytes_in,
        )


def _participate_alone(
    out: Assembly,
    matched: Matched,
    place: Mapping[int, NDArray[np.int64]],
    by_rank: Mapping[int, RankGraph],
    clocks: Mapping[int, Clock],
) -> None:
    """Keep what could not be joined: each record is a node of its own, with what is known of it."""
    for unmatched in matched.unmatched:
        for rank, record in unmatched.records.items():
            spans, _ = _spans({rank: record}, by_rank, clocks)
            sent, received = _moved(by_rank[rank], record)
            node = int(place[rank][record.node])
            _participate(out, node, rank, record.group_name, record.group, record.order, spans[rank], sent, received)


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
            known = self._known[numbers] = _describe(self._layouts, numbers)
        return known


def _describe(layouts: Mapping[int, Layout], numbers: Sequence[int]) -> str:
    return " ".join(describe_tensor(layouts[number]) for number in numbers if number)
