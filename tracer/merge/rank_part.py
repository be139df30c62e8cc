"""Turn one rank's graph into its part: every node and edge as a row of numbers, everything that is said once beside."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.merge.align import ClockSource
from truedag.tracer.merge.device_nodes import DeviceNodes, find_device_nodes, node_spans
from truedag.tracer.merge.flow import Source
from truedag.tracer.merge.kernels import KERNEL_KINDS
from truedag.tracer.merge.labels import TEXTS, UNKNOWN, Label, LabelColumns, Texts, label_columns
from truedag.tracer.merge.launches import RankKernels
from truedag.tracer.merge.lifetimes import measure_memory
from truedag.tracer.merge.nodes import RankNodes
from truedag.tracer.merge.opaque import is_opaque
from truedag.tracer.merge.part import (
    COLLECTIVE,
    COMPUTE,
    DATA,
    INPUT,
    NO_TIME,
    ORDER,
    OUTPUT,
    PARAMETER,
    RECV,
    SEND,
    Part,
)
from truedag.tracer.merge.rank_graph import RankGraph
from truedag.tracer.merge.shapes import describe_tensors, shape_flops
from truedag.tracer.merge.sorting import first_places, pair_numbers, stable_order

_KIND_OF_COMM = {"c10d::send": SEND, "c10d::recv_": RECV, "c10d::recv_any_source_": RECV}
Columns = dict[str, NDArray[Any]]


def make_part(graph: RankGraph) -> Part:
    """Return a rank's part of the graph; the rank's trace is not needed any more then."""
    nodes = graph.nodes
    count = len(nodes)
    first_source = count + len(graph.outputs)
    first_launch = first_source + len(graph.flow.sources)
    device = None if graph.kernels is None else find_device_nodes(graph.kernels, nodes, first_launch)
    shapes = _Shapes(graph)
    texts = Texts(nodes.belonging.texts)
    tables = [
        _operators(graph, texts),
        _outputs(graph, texts, shapes),
        _sources(graph, texts, shapes),
        *([] if device is None else [_launches(device, texts)]),
    ]
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    edges, unlabelled = _edges(graph, device, columns["kind"])
    others = _but_comms(graph, len(columns["step"]))
    steps = np.unique(columns["step"][others]).tolist()
    starts = columns["start_ns"][others]
    starts = starts[starts != NO_TIME]
    told = {
        "meta": nodes.trace.meta,
        "clock_samples": nodes.trace.clock_samples,
        "end_ns": ClockSource.of(nodes.trace).end_ns,
        "closed": nodes.trace.closed,
        "groups": list(nodes.trace.groups.values()),
        "group_ranks": list(nodes.trace.group_ranks.values()),
        "num_operators": count,
        "num_views": nodes.num_views,
        "texts": texts.told(),
        "layouts": [[number, one.dtype, list(one.sizes)] for number, one in sorted(nodes.trace.layouts.items())],
        "shapes": shapes.columns(),
        "steps": [step for step in steps if step != UNKNOWN],
        "has_microbatch": bool((columns["microbatch"] != UNKNOWN).any()),
        "first_start_ns": int(starts.min()) if len(starts) else None,
        "opaque": _opaque(columns, texts.told()),
        "program": _hash_program(nodes),
        "gpu_clock": None if graph.kernels is None else _clock(graph.kernels),
        "memory": measure_memory(nodes),
    }
    return Part(
        told=told,
        comms=nodes.comms,
        nodes=columns,
        edges=edges,
        kernels=_kernels(graph.kernels, device),
        unlabelled=unlabelled,
    )


def short_name(op: str) -> str:
    """Name an operator as people do: `aten::mm` is mm, `c10d::allreduce_` all-reduce."""
    namespace, _, name = op.rpartition("::")
    return _SHORT.get(name, name) if namespace == "c10d" else name


_SHORT = {
    "_allgather_base_": "all-gather", "allgather_": "all-gather", "allgather_coalesced_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather", "allreduce_": "all-reduce", "allreduce_coalesced_": "all-reduce",
    "_reduce_scatter_base_": "reduce-scatter", "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter", "alltoall_": "all-to-all", "alltoall_base_": "all-to-all",
    "broadcast_": "broadcast", "reduce_": "reduce", "gather_": "gather", "scatter_": "scatter", "send": "send",
    "recv_": "receive", "recv_any_source_": "receive", "barrier": "barrier", "monitored_barrier_": "barrier",
}  # fmt: skip


class _Shapes:
    """The rank's shapes; those of outputs and sources are added."""

    def __init__(self, graph: RankGraph) -> None:
        self._layouts = graph.nodes.trace.layouts
        known = graph.nodes.shapes
        self._bytes_read, self._bytes_written = known.num_bytes(self._layouts)
        self._flops = [shape_flops(self._layouts, shape) for shape in known.known]
        self._texts: dict[tuple[int, ...], str] = {}
        self._inputs = [self._describe(shape.inputs) for shape in known.known]
        self._outputs = [self._describe(shape.outputs) for shape in known.known]
        self._first = [next(iter(shape.outputs), 0) for shape in known.known]
        self._added: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}

    def add(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> int:
        """Return the number of what is no operator: it moves no bytes."""
        if (inputs, outputs) not in self._added:
            self._added[inputs, outputs] = len(self._flops)
            self._flops.append(None)
            self._bytes_read.append(0)
            self._bytes_written.append(0)
            self._inputs.append(self._describe(inputs))
            self._outputs.append(self._describe(outputs))
            self._first.append(0)
        return self._added[inputs, outputs]

    def columns(self) -> dict[str, list[Any]]:
        """What is told of each shape; `first_output` is a layout's number, 0: none."""
        return {
            "flops": self._flops,
            "bytes_read": self._bytes_read,
            "bytes_written": self._bytes_written,
            "inputs": self._inputs,
            "outputs": self._outputs,
            "first_output": self._first,
        }

    def _describe(self, numbers: tuple[int, ...]) -> str:
        if numbers not in self._texts:
            self._texts[numbers] = describe_tensors(self._layouts, numbers)
        return self._texts[numbers]


def _operators(graph: RankGraph, texts: Texts) -> Columns:
    nodes = graph.nodes
    count = len(nodes)
    names = {number: str(op["name"]) for number, op in nodes.trace.ops.items()}
    used = np.unique(nodes.op_number).tolist()
    op, label = np.zeros((2, max(used, default=0) + 1), np.int32)
    for number in used:
        op[number], label[number] = texts.place(names[number]), texts.place(short_name(names[number]))
    kind = np.full(count, COMPUTE, np.int8)
    start, end = nodes.start_ns.copy(), nodes.end_ns.copy()
    stream = np.full(count, -1, np.int32)
    if graph.kernels is not None:
        spans = node_spans(graph.kernels)
        stream[spans.node] = spans.stream
        start[spans.node], end[spans.node] = spans.start_ns, spans.end_ns
    for record in nodes.comms:
        kind[record.node] = _KIND_OF_COMM.get(record.op, COLLECTIVE)
        # The host's call ends long before: when a communication is over, its backend tells or nobody.
        start[record.node] = nodes.start_ns[record.node]
        end[record.node] = NO_TIME if record.work_end_ns is None else record.work_end_ns
    return {
        "kind": kind,
        "op": op[nodes.op_number],
        "label": label[nodes.op_number],
        "sort_ns": nodes.start_ns,
        "start_ns": start,
        "end_ns": end,
        "host_end_ns": nodes.end_ns,
        "thread": nodes.thread.astype(np.int32),
        "stream": stream,
        "shape": nodes.shapes.number.astype(np.int32),
        **nodes.belonging.columns,
    }


def _outputs(graph: RankGraph, texts: Texts, shapes: _Shapes) -> Columns:
    outputs = graph.outputs
    return _timeless(
        kind=[OUTPUT] * len(outputs),
        op=[texts.place("output")] * len(outputs),
        label=[texts.place(output.name) for output in outputs],
        sort_ns=[output.time_ns for output in outputs],
        shape=[shapes.add((output.layout,), ()) for output in outputs],
        belonging=_labels([output.context for output in outputs], texts),
    )


def _sources(graph: RankGraph, texts: Texts, shapes: _Shapes) -> Columns:
    sources = graph.flow.sources
    start_ns = graph.nodes.start_ns
    modules: dict[str, dict[str, Any]] = {}
    for told in graph.nodes.trace.labels.values():
        modules.setdefault(told["module"], told)
    begin = (int(start_ns[0]) if len(start_ns) else 0) - 1
    return _timeless(
        kind=[PARAMETER if source.role == "parameter" else INPUT for source in sources],
        op=[texts.place(source.role) for source in sources],
        label=[texts.place(source.name or "") for source in sources],
        sort_ns=[begin] * len(sources),
        shape=[shapes.add((), (source.layout,)) for source in sources],
        belonging=_labels([_label_of_source(source, modules) for source in sources], texts),
    )


def _label_of_source(source: Source, modules: dict[str, dict[str, Any]]) -> Label:
    if source.role != "parameter" or source.name is None:
        return Label()
    module = source.name.rpartition(".")[0]
    told = modules.get(module, {})
    return Label(module=module, layer=told.get("layer"), expert=told.get("expert"), category=told.get("category"))


def _labels(labels: list[Label], texts: Texts) -> LabelColumns:
    columns = label_columns(labels)
    places = np.array([*(texts.place(text) for text in columns.texts), -1], np.int32)
    renamed = {name: places[column] if name in TEXTS else column for name, column in columns.columns.items()}
    return LabelColumns(columns=renamed, texts=[])


def _timeless(
    *, kind: list[int], op: list[int], label: list[int], sort_ns: list[int], shape: list[int], belonging: LabelColumns
) -> Columns:
    count = len(kind)
    never = np.full(count, NO_TIME)
    return {
        "kind": np.array(kind, np.int8),
        "op": np.array(op, np.int32),
        "label": np.array(label, np.int32),
        "sort_ns": np.array(sort_ns, np.int64),
        "start_ns": never,
        "end_ns": never,
        "host_end_ns": never,
        "thread": np.full(count, -1, np.int32),
        "stream": np.full(count, -1, np.int32),
        "shape": np.array(shape, np.int32),
        **belonging.columns,
    }


def _launches(device: DeviceNodes, texts: Texts) -> Columns:
    launches = device.launches
    columns = _timeless(
        kind=[COMPUTE] * len(launches),
        op=[texts.place(one.op) for one in launches],
        label=[texts.place(one.label) for one in launches],
        sort_ns=[one.begun_ns for one in launches],
        shape=[-1] * len(launches),
        belonging=_labels([Label()] * len(launches), texts),
    )
    columns["start_ns"] = np.array([one.start_ns for one in launches], np.int64)
    columns["end_ns"] = np.array([one.end_ns for one in launches], np.int64)
    host_ends = [NO_TIME if one.host_end_ns is None else one.host_end_ns for one in launches]
    columns["host_end_ns"] = np.array(host_ends, np.int64)
    columns["thread"] = np.array([one.thread for one in launches], np.int32)
    columns["stream"] = np.array([one.stream for one in launches], np.int32)
    return columns


def _but_comms(graph: RankGraph, count: int) -> NDArray[np.bool_]:
    """Which nodes are no communications: these are joined, or told by those who join."""
    kept = np.ones(count, bool)
    kept[[record.node for record in graph.nodes.comms]] = False
    return kept


def _edges(graph: RankGraph, device: DeviceNodes | None, kind: NDArray[np.int8]) -> tuple[Columns, Columns]:
    flow, nodes = graph.flow, graph.nodes
    first_source = len(nodes) + len(graph.outputs)
    src = np.where(flow.src < 0, first_source - 1 - flow.src, flow.src)
    before, after = _chain_threads(nodes)
    if device is not None:
        before, after = np.concatenate((before, device.before)), np.concatenate((after, device.after))
        before, after = _once(before, after)
    rest = len(before)
    columns: Columns = {
        "src": np.concatenate((src, before)).astype(np.int32),
        "dst": np.concatenate((flow.dst, after)).astype(np.int32),
        "kind": np.repeat(np.array([DATA, ORDER], np.int8), (len(src), rest)),
        "bytes": np.concatenate((flow.num_bytes, np.zeros(rest, np.int64))),
        "layout": np.concatenate((flow.layout, np.full(rest, -1))).astype(np.int32),
    }
    return columns, _unlabelled(nodes, src, flow.dst, flow.is_update, kind)


def _once(before: NDArray[np.int64], after: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keep one of each pair, and none of a node with itself."""
    different = before != after
    before, after = before[different], after[different]
    if not len(before):
        return before, after
    kept = first_places(pair_numbers(before, after))
    return before[kept], after[kept]


def _chain_threads(nodes: RankNodes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Chain each thread's operators; what is asynchronous follows the one before it, and nothing follows it."""
    order = stable_order(nodes.thread)
    thread = nodes.thread[order]
    goes_on = np.ones(len(order), bool)
    goes_on[[record.node for record in nodes.comms if record.is_async]] = False
    place = np.arange(len(order))
    last = np.maximum.accumulate(np.where(goes_on[order], place, -1))
    first = np.maximum.accumulate(np.where(np.diff(thread, prepend=-1) != 0, place, 0))
    before = np.append(-1, last[:-1])
    has_one = before >= first
    return order[before[has_one]], order[has_one]


def _unlabelled(
    nodes: RankNodes,
    src: NDArray[np.int64],
    dst: NDArray[np.int64],
    is_update: NDArray[np.bool_],
    kind: NDArray[np.int8],
) -> Columns:
    """What may take its microbatch from its data, of what has none.

    Messages, copies from which one is sent or into which one goes (a GPU's memory, through the host's), and operators
    of the backward pass. Each with what it reads, but for what it updates and what was there before the recording.
    """
    beside = np.zeros(len(kind), bool)
    beside[src[kind[dst] == SEND]] = True
    beside[dst[kind[src] == RECV]] = True
    copying = [number for number, op in nodes.trace.ops.items() if op["name"] == "aten::copy_"]
    unknown = nodes.belonging.columns["microbatch"] == UNKNOWN
    wanted = np.zeros(len(kind), bool)
    wanted[: len(nodes)] = unknown & (nodes.in_backward | (beside[: len(nodes)] & np.isin(nodes.op_number, copying)))
    wanted[(kind == SEND) | (kind == RECV)] = True
    alone = np.flatnonzero(wanted)
    # Of a collective another rank may want to know.
    used = (wanted | (kind == COLLECTIVE))[dst] & ~is_update & (kind[src] != PARAMETER) & (kind[src] != INPUT)
    return {
        "src": np.concatenate((np.full(len(alone), -1), src[used])).astype(np.int32),
        "dst": np.concatenate((alone, dst[used])).astype(np.int32),
    }


def _opaque(columns: Columns, texts: list[str]) -> list[list[Any]]:
    """How many nodes there are that nobody saw inside, by operator and label."""
    hidden = [place for place, text in enumerate(texts) if is_opaque(text)]
    chosen = np.isin(columns["op"], hidden)
    rows = zip(columns["op"][chosen].tolist(), columns["label"][chosen].tolist(), strict=True)
    counts = Counter((texts[op], texts[label]) for op, label in rows)
    return [[op, label, count] for (op, label), count in sorted(counts.items())]


def _hash_program(nodes: RankNodes) -> str:
    """Ranks of one class ran the same operators in the same modules; sizes and times may differ."""
    labels, names = nodes.belonging, nodes.trace.ops
    number = nodes.op_number
    for name in ("module", "microbatch", "phase"):
        column = labels.columns[name].astype(np.int64)
        number = pair_numbers(number, np.where(column == UNKNOWN, 0, column - min(int(column.min(initial=0)), 0) + 2))
    some = first_places(number)
    lines = []
    for node in some.tolist():
        label = labels.label(node)
        lines.append(f"{names[int(nodes.op_number[node])]['name']} {label.module} {label.microbatch} {label.phase}\n")
    digests = np.array([np.frombuffer(sha256(line.encode()).digest()[:16], np.uint8) for line in lines], np.uint8)
    return sha256(digests.reshape(-1, 16)[number].tobytes()).hexdigest()


def _clock(kernels: RankKernels) -> list[int | None]:
    return [kernels.clock.correction_ns, kernels.clock.drift_ns, kernels.clock.error_ns]


KERNEL_SCHEMA = {
    "node": pl.Int64, "rank": pl.Int32, "device": pl.Int32, "stream": pl.Int32, "name": pl.String,
    "kind": pl.String, "start_ns": pl.Int64, "end_ns": pl.Int64, "bytes": pl.Int64, "correlation": pl.Int64,
    "graph": pl.Int64,
}  # fmt: skip


def _kernels(tied: RankKernels | None, device: DeviceNodes | None) -> pl.DataFrame:
    if tied is None or device is None:
        return pl.DataFrame(schema=KERNEL_SCHEMA)
    records = tied.trace.kernels
    names = ("device", "stream", "start_ns", "end_ns", "bytes", "correlation", "graph")
    columns: dict[str, Any] = {name: np.ascontiguousarray(records[name]) for name in names}
    columns |= {
        "node": device.owner,
        "rank": np.full(len(records), 0),
        "name": pl.Series(tied.trace.names, dtype=pl.String)[records["name"].astype(np.uint32)],
        "kind": pl.Series(KERNEL_KINDS, dtype=pl.String)[records["kind"].astype(np.uint32)],
    }
    return pl.DataFrame({name: columns[name] for name in KERNEL_SCHEMA}, schema=KERNEL_SCHEMA)
