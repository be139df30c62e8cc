"""The rows of the dataset's nodes, edges and kernels: of one rank, and of what spans ranks.

Times are ns since the recording began on the lowest rank's clock. null is unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.merge.clock import Clock
from truedag.tracer.merge.joining import CollectiveNode, MessageEdge
from truedag.tracer.merge.labels import NUMBERS, TEXTS, UNKNOWN, Texts
from truedag.tracer.merge.part import COLLECTIVE, EDGE_KINDS, NO_TIME, NODE_KINDS, ORDER, RECV, SEND, Part
from truedag.tracer.merge.sorting import order_edges, stable_order

NODE_SCHEMA: dict[str, Any] = {
    "node": pl.Int64, "kind": pl.String, "category": pl.String, "rank": pl.Int32, "op": pl.String,
    "label": pl.String, "module": pl.String, "layer": pl.Int32, "stage": pl.Int32, "microbatch": pl.Int32,
    "expert": pl.Int32, "phase": pl.String, "step": pl.Int32, "decode_step": pl.Int32, "thread": pl.Int32,
    "stream": pl.Int32, "start_ns": pl.Int64, "end_ns": pl.Int64, "host_start_ns": pl.Int64,
    "host_end_ns": pl.Int64, "timing": pl.String, "flops": pl.Int64,
    "bytes_read": pl.Int64, "bytes_written": pl.Int64, "gradient": pl.String, "inputs": pl.String,
    "outputs": pl.String,
}  # fmt: skip
EDGE_SCHEMA: dict[str, Any] = {
    "src": pl.Int64, "dst": pl.Int64, "kind": pl.String, "bytes": pl.Int64, "dtype": pl.String,
    "shape": pl.List(pl.Int64),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """What joining all ranks has found for one rank's rows."""

    number: NDArray[np.int64]  # [nodes]
    collective: NDArray[np.int64]  # [nodes] which collective took the node's place, -1: none
    clock: Clock
    origin_ns: int
    labels: Mapping[int, str]  # of communications that were joined by nobody
    microbatches: Mapping[int, tuple[int, str | None]]  # of nodes that have it from their data, and the phase
    dropped: NDArray[np.int64]  # edges of order between two collectives that a lower rank tells as well


def rank_nodes(part: Part, plan: RankPlan, *, at_once: int) -> Iterator[pl.DataFrame]:
    """Give the rows of a rank's nodes, by number, but for those whose place collectives took; so many at once."""
    chosen = np.flatnonzero(plan.collective < 0)
    chosen = chosen[stable_order(plan.number[chosen])]
    columns = {name: part.nodes[name] for name in (*NUMBERS, *TEXTS, "kind", "label")}
    texts = Texts(part.told["texts"])
    for node, label in plan.labels.items():
        columns["label"] = _changed(columns["label"], part, "label")
        columns["label"][node] = texts.place(label)
    for node, (microbatch, phase) in plan.microbatches.items():
        for name in ("microbatch", "phase"):
            columns[name] = _changed(columns[name], part, name)
        columns["microbatch"][node], columns["phase"][node] = microbatch, texts.place(phase)
    communication, computation = texts.place("communication"), texts.place("computation")
    names = pl.Series([*texts.told(), None], dtype=pl.String)
    for begin in range(0, max(len(chosen), 1), at_once):
        here = chosen[begin : begin + at_once]
        yield _node_rows(part, plan, here, columns, names, (communication, computation))


def _node_rows(
    part: Part,
    plan: RankPlan,
    here: NDArray[np.int64],
    columns: Mapping[str, NDArray[Any]],
    names: pl.Series,
    categories: tuple[int, int],
) -> pl.DataFrame:
    communication, computation = categories
    kind = columns["kind"][here]
    category = columns["category"][here]
    category = np.where(category < 0, computation, category)
    category[(kind == COLLECTIVE) | (kind == SEND) | (kind == RECV)] = communication
    start, end, host_end = (part.nodes[name][here] for name in ("start_ns", "end_ns", "host_end_ns"))
    rank, stage = part.rank, -1 if part.stage is None else part.stage
    shapes = part.told["shapes"]
    shape = part.nodes["shape"][here]
    timed = (start != NO_TIME) & (end != NO_TIME)
    values: dict[str, pl.Series] = {
        "node": pl.Series(plan.number[here]),
        "kind": _pick(pl.Series(NODE_KINDS), kind),
        "category": _pick(names, category),
        "rank": pl.Series(np.full(len(here), rank, np.int32)),
        "op": _pick(names, part.nodes["op"][here]),
        "label": _pick(names, columns["label"][here]),
        "stage": pl.Series(np.full(len(here), stage, np.int32)),
        "thread": pl.Series(part.nodes["thread"][here]),
        "stream": pl.Series(part.nodes["stream"][here]),
        "start_ns": _times(plan, start),
        "end_ns": _times(plan, end),
        "host_start_ns": _times(plan, np.where(host_end == NO_TIME, NO_TIME, part.nodes["sort_ns"][here])),
        "host_end_ns": _times(plan, host_end),
        "timing": _pick(pl.Series(["none", "measured"]), timed),
        "flops": _pick(pl.Series([*shapes["flops"], None], dtype=pl.Int64), shape),
        "bytes_read": _pick(pl.Series([*shapes["bytes_read"], 0], dtype=pl.Int64), shape),
        "bytes_written": _pick(pl.Series([*shapes["bytes_written"], 0], dtype=pl.Int64), shape),
        "inputs": _pick(pl.Series([*shapes["inputs"], ""], dtype=pl.String), shape),
        "outputs": _pick(pl.Series([*shapes["outputs"], ""], dtype=pl.String), shape),
    }
    for name in NUMBERS:
        column = columns[name][here]
        values[name] = pl.Series(np.where(column == UNKNOWN, np.int32(-1), column))
    for name in ("module", "phase", "gradient"):
        values[name] = _pick(names, columns[name][here])
    return pl.DataFrame({name: values[name] for name in NODE_SCHEMA}, schema=NODE_SCHEMA)


def _changed(column: NDArray[Any], part: Part, name: str) -> NDArray[Any]:
    """Return a column that can be changed: a copy of the part's own, at the first time."""
    return column if column.flags.writeable and not np.shares_memory(column, part.nodes[name]) else column.copy()


def _pick(few: pl.Series, places: NDArray[Any]) -> pl.Series:
    """Return one of a few values for each place; -1 is the last one."""
    number = places.astype(np.int32)
    number[number < 0] += len(few)
    return few.gather(pl.Series(number.view(np.uint32)))


def _times(plan: RankPlan, values: NDArray[np.int64]) -> pl.Series:
    unknown = values == NO_TIME
    column = pl.Series(plan.clock.correct(np.where(unknown, plan.origin_ns, values)) - plan.origin_ns)
    return column.set(pl.Series(unknown), None) if unknown.any() else column


def collective_nodes(collectives: Sequence[CollectiveNode], number: NDArray[np.int64], origin_ns: int) -> pl.DataFrame:
    """Return the rows of collectives, by number."""
    rows = []
    for place in np.argsort(number).tolist():
        one = collectives[place]
        label = one.belonging
        known = {name: -1 if getattr(label, name) is None else getattr(label, name) for name in NUMBERS}
        rows.append(
            {
                "node": int(number[place]),
                "kind": "collective",
                "category": "communication",
                "rank": -1,
                "op": one.op,
                "label": one.label,
                "module": label.module,
                "stage": -1 if one.stage is None else one.stage,
                "phase": label.phase,
                "thread": -1,
                "stream": -1,
                "start_ns": one.start_ns - origin_ns,
                "end_ns": None if one.end_ns is None else one.end_ns - origin_ns,
                "timing": "none" if one.end_ns is None else "measured",
                "bytes_read": one.bytes_read,
                "bytes_written": one.bytes_written,
                "inputs": one.inputs,
                "outputs": one.outputs,
                **known,
            }
        )
    return pl.DataFrame(rows, schema=NODE_SCHEMA)


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeRows:
    """Edges before they are in order, in columns; `layout` is a place in `dtypes` and `shapes`, whose last is none."""

    src: NDArray[np.int64]
    dst: NDArray[np.int64]
    kind: NDArray[np.int8]
    num_bytes: NDArray[np.int64]
    layout: NDArray[np.int32]
    dtypes: list[str | None]
    shapes: list[list[int] | None]


def rank_edges(part: Part, plan: RankPlan) -> EdgeRows:
    """Return the edges of a rank."""
    src, dst, kind, num_bytes, layout = (part.edges[name] for name in ("src", "dst", "kind", "bytes", "layout"))
    if len(plan.dropped):
        kept = np.ones(len(src), bool)
        kept[plan.dropped] = False
        src, dst, kind, num_bytes, layout = (column[kept] for column in (src, dst, kind, num_bytes, layout))
    told = part.told["layouts"]
    size = max((number for number, _, _ in told), default=0) + 2
    dtypes: list[str | None] = [None] * size
    shapes: list[list[int] | None] = [None] * size
    for number, dtype, sizes in told:
        dtypes[number], shapes[number] = dtype, sizes
    return EdgeRows(
        src=plan.number[src],
        dst=plan.number[dst],
        kind=kind,
        num_bytes=num_bytes,
        layout=np.where(layout < 0, np.int32(size - 1), layout),
        dtypes=dtypes,
        shapes=shapes,
    )


def message_edges(messages: Sequence[MessageEdge], numbers: Mapping[int, NDArray[np.int64]], kind: int) -> EdgeRows:
    """Return the edges of messages."""
    return EdgeRows(
        src=np.array([numbers[one.source][one.send] for one in messages], np.int64),
        dst=np.array([numbers[one.destination][one.receive] for one in messages], np.int64),
        kind=np.full(len(messages), kind, np.int8),
        num_bytes=np.array([one.num_bytes for one in messages], np.int64),
        layout=np.arange(len(messages), dtype=np.int32),
        dtypes=[*(one.dtype for one in messages), None],
        shapes=[*(one.shape for one in messages), None],
    )


def edge_table(parts: Sequence[EdgeRows], *, at_once: int) -> Iterator[pl.DataFrame]:
    """Bring edges into the dataset's order, by `src`, `dst`, kind and bytes; give so many at once."""
    dtypes: list[str | None] = []
    shapes: list[list[int] | None] = []
    layouts = []
    for part in parts:
        layouts.append(part.layout + np.int32(len(dtypes)))
        dtypes.extend(part.dtypes)
        shapes.extend(part.shapes)
    src, dst, kind, num_bytes = (
        np.concatenate([np.zeros(0, dtype), *(getattr(part, name) for part in parts)])
        for name, dtype in (("src", np.int64), ("dst", np.int64), ("kind", np.int8), ("num_bytes", np.int64))
    )
    order = order_edges(src, dst, kind.astype(np.int64), num_bytes)
    layout = np.concatenate([np.zeros(0, np.int32), *layouts])
    types = pl.Series(dtypes, dtype=pl.String), pl.Series(shapes, dtype=pl.List(pl.Int64))
    for begin in range(0, max(len(order), 1), at_once):
        here = order[begin : begin + at_once]
        columns = {
            "src": pl.Series(src[here]),
            "dst": pl.Series(dst[here]),
            "kind": _pick(pl.Series(EDGE_KINDS), kind[here]),
            "bytes": pl.Series(num_bytes[here]),
            "dtype": _pick(types[0], layout[here]),
            "shape": _pick(types[1], layout[here]),
        }
        yield pl.DataFrame(columns, schema=EDGE_SCHEMA)


def rank_kernels(part: Part, plan: RankPlan) -> pl.DataFrame:
    """Return the rows of a rank's kernels."""
    table = part.kernels
    times = {name: plan.clock.correct(table[name].to_numpy()) - plan.origin_ns for name in ("start_ns", "end_ns")}
    node = plan.number[table["node"].to_numpy()] if len(table) else np.zeros(0, np.int64)
    return table.with_columns(
        pl.Series("node", node),
        pl.lit(part.rank, pl.Int32).alias("rank"),
        *(pl.Series(name, column) for name, column in times.items()),
    ).sort("start_ns", "correlation", maintain_order=True)


def repeated_order(part: Part, collective: NDArray[np.int64], seen: set[tuple[int, int]]) -> NDArray[np.int64]:
    """Return a rank's edges of order between collectives that were seen already (they are added), or lead to itself."""
    src, dst = (collective[part.edges[name]] for name in ("src", "dst"))
    asked = np.flatnonzero((part.edges["kind"] == ORDER) & (src >= 0) & (dst >= 0))
    found = []
    for edge, pair in zip(asked.tolist(), zip(src[asked].tolist(), dst[asked].tolist(), strict=True), strict=True):
        if pair in seen or pair[0] == pair[1]:
            found.append(edge)
        seen.add(pair)
    return np.array(found, np.int64)
