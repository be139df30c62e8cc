"""The graph as slices of time on tracks: what every program for timelines shows.

A rank is a process. Its operators are on the threads that ran them, on a GPU their kernels on streams; communications
are on tracks of their own, one for each axis, since they run beside everything else: a slice from a rank's arrival to
its end, in it one of waiting (until the last has arrived) and one of transfer, where it is known when the last arrived;
where its end is not known, its name says so. What overlaps on a track goes to a second lane of it. A flow leads through
the participants of a collective as they arrive, and from a send to its receive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import polars as pl

from truedag.tracer.errors import GraphError
from truedag.tracer.export.tracks import COMMUNICATION, STREAM, THREAD, place_slices
from truedag.tracer.graph import Graph

COMMUNICATIONS = ("collective", "send", "recv")
NUMBERS = ("node", "layer", "microbatch", "expert", "step", "decode_step", "flops", "bytes_read", "bytes_written",
           "seq", "send_bytes", "recv_bytes")  # fmt: skip
TEXTS = ("op", "module", "phase", "inputs", "outputs", "group", "timing")
_TOLD = ("node", "category", "op", "label", "module", "layer", "microbatch", "expert", "phase", "step",
         "decode_step", "timing", "inputs", "outputs", "flops", "bytes_read", "bytes_written")  # fmt: skip
_RAN = ("rank", "thread", "stream", "start_ns", "end_ns", "host_start_ns", "host_end_ns")
_AT_ONCE = 2_000_000  # nodes that are read at once
_TOGETHER = 1 << 17  # nodes of ranks whose slices are made at once
_AXES = ("tp", "ep", "etp", "pp", "dp", "edp", "cp")
_SLICE = {
    "start_ns": pl.Int64, "end_ns": pl.Int64, "name": pl.String, "category": pl.String,
    "flow": pl.Int64, "is_inner": pl.Boolean, "is_receive": pl.Boolean,
    **dict.fromkeys(NUMBERS, pl.Int64), **dict.fromkeys(TEXTS, pl.String),
}  # fmt: skip
# Until tracks are known; of communications, when the last arrived and when they ended.
_UNPLACED = dict.fromkeys(("rank", "order", "number", "last_ns", "done_ns"), pl.Int64) | _SLICE


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What some ranks did.

    Attributes:
        names: of each rank's process, ranks in order.
        tracks: rank, place (of a track among those of its rank, from 0), name; in the order of ranks and places.
        slices: track (a row of `tracks`), start_ns, end_ns, name, category, flow (a number that slices of one
            collective or message share, from 1; null: none), is_inner (within another), is_receive (a flow leads to
            it, whenever it began), NUMBERS (null or less than 0: none) and TEXTS (null: none). Outer slices are before
            inner ones; those of a track do not overlap but for inner ones, which lie within their outer.
    """

    names: Mapping[int, str]
    tracks: pl.DataFrame
    slices: pl.DataFrame


@dataclass(frozen=True, slots=True, kw_only=True)
class _Records:
    """Rows of some ranks: operators, kernels, parts in communications, and what is said of those; names of axes."""

    axes: Sequence[str]
    nodes: pl.DataFrame
    kernels: pl.DataFrame
    met: pl.DataFrame
    told: pl.DataFrame


def count_slices(graph: Graph) -> int:
    """Return at most how many slices a graph's timeline has.

    Raises:
        GraphError: nothing in it has a time.
    """
    timed = (pl.col("kind") == "compute") & pl.col("end_ns").is_not_null()
    operators, kernels, met = pl.collect_all(
        [
            graph.nodes.select(timed.sum(), calls=(timed & (pl.col("stream") >= 0)).sum()),
            graph.kernels.select(pl.len()),
            graph.participants.select(pl.col("arrive_ns").is_not_null().sum()),
        ]
    )
    if not operators[0, 0] + met.item():
        raise GraphError(
            f"nothing in {graph.path}, or in the part of it that was asked for, has a time: a graph without times goes "
            "to formats of graphs and tables (graphml, node-link, model-explorer, chakra, csv)"
        )
    return int(sum(operators.row(0)) + kernels.item() + 3 * met.item())


def list_timelines(graph: Graph) -> Iterator[Callable[[], Timeline]]:
    """Return what makes the timeline of some ranks, until there are all, in order; any thread may call it.

    What is read here is read by the thread that asks for the next.
    """
    names = _name_ranks(graph)
    counts, messages = pl.collect_all(
        [
            graph.nodes.group_by("rank").len(),
            graph.edges.filter(pl.col("kind") == "p2p").select(sent="src", node="dst"),
        ]
    )
    sizes = dict(counts.iter_rows())
    batches = list(divide_ranks(list(names), sizes, _AT_ONCE))
    for batch in batches:
        records = _read(graph if len(batches) == 1 else graph.subgraph(ranks=batch), batch, messages.lazy())
        for ranks in divide_ranks(batch, sizes, _TOGETHER):
            yield partial(_arrange, records, {rank: names[rank] for rank in ranks})


def _name_ranks(graph: Graph) -> Mapping[int, str]:
    names = {}
    for row in graph.ranks.sort("rank").collect().iter_rows(named=True):
        places = [f"{axis} {row[axis]}" for axis in _AXES if row.get(axis) is not None and row[axis] >= 0]
        names[int(row["rank"])] = " · ".join([f"rank {row['rank']}", *places, str(row["host"])])
    return names


def divide_ranks(ranks: Sequence[int], sizes: Mapping[int, int], most: int) -> Iterator[list[int]]:
    """Put ranks together until they have so many nodes; one that has more is alone."""
    batch: list[int] = []
    num = 0
    for rank in ranks:
        size = sizes.get(rank, 0)
        if batch and num + size > most:
            yield batch
            batch, num = [], 0
        batch.append(rank)
        num += size
    if batch:
        yield batch


def _read(graph: Graph, ranks: Sequence[int], messages: pl.LazyFrame) -> _Records:
    is_here = pl.col("rank").is_in(ranks)
    present = graph.nodes.collect_schema().names()
    own = graph.nodes.filter(is_here, pl.col("kind") == "compute").select(
        name for name in (*_TOLD, *_RAN) if name in present
    )
    told = graph.nodes.filter(pl.col("kind").is_in(COMMUNICATIONS)).select(*_TOLD, "kind")
    members = pl.col("ranks").cast(pl.List(pl.String)).list.join(" ")
    groups = graph.groups.select("group", axis=pl.col("axis").fill_null("other"), members=members)
    # A send, its receive and the arrow between them have the send's number.
    met = (
        graph.participants.filter(is_here, pl.col("arrive_ns").is_not_null())
        .join(told, on="node")
        .join(groups.rename({"members": "text"}), on="group", how="left")
        .join(messages, on="node", how="left")
    )
    nodes, kernels, said, names = pl.collect_all([own, graph.kernels.filter(is_here), met, groups.select("axis")])
    axes = sorted(set(names["axis"]) | {"other"})
    labels = (told if len(kernels) else told.clear()).collect()
    return _Records(axes=axes, nodes=nodes, kernels=kernels, met=said, told=labels)


def _arrange(records: _Records, names: Mapping[int, str]) -> Timeline:
    is_here = pl.col("rank").is_between(min(names), max(names))
    nodes, kernels, met = (frame.filter(is_here) for frame in (records.nodes, records.kernels, records.met))
    ran = [*_operators(nodes, kernels), *_kernels(kernels, nodes, records.told)]
    meetings = _meetings(met, records.axes)
    outer = pl.concat([*ran, meetings])
    placed = place_slices(outer, records.axes)
    outer = outer.with_columns(track=pl.Series(placed.track))
    num_ran = len(outer) - len(meetings)
    parts = _parts(outer[num_ran:])
    shown = set(placed.tracks["rank"])
    return Timeline(
        names={rank: name for rank, name in names.items() if rank in shown},
        tracks=placed.tracks,
        slices=pl.concat([one.select("track", *_SLICE) for one in (outer[:num_ran], *parts)]),
    )


def _operators(nodes: pl.DataFrame, kernels: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Operators on their threads; on a GPU the calls there, and on streams what has no kernel of its own."""
    timed = nodes.filter(pl.col("end_ns").is_not_null())
    on_stream = pl.col("stream") >= 0
    yield _as_slices(timed.filter(~on_stream), order=pl.lit(THREAD), number=pl.col("thread"))
    queued = timed.filter(on_stream)
    bare = queued.join(kernels.select("node"), on="node", how="anti")
    yield _as_slices(bare, order=pl.lit(STREAM), number=pl.col("stream"))
    if "host_end_ns" in nodes.columns:
        calls = queued.filter(pl.col("host_end_ns").is_not_null()).with_columns(
            start_ns="host_start_ns", end_ns="host_end_ns"
        )
        yield _as_slices(calls, order=pl.lit(THREAD), number=pl.col("thread"))


def _kernels(kernels: pl.DataFrame, nodes: pl.DataFrame, told: pl.DataFrame) -> Iterator[pl.DataFrame]:
    if not len(kernels):
        return
    labels = pl.concat([nodes.select(_TOLD), told.select(_TOLD)])
    ran = kernels.drop("kind").join(labels, on="node", how="left", maintain_order="left")
    named = ran.with_columns(
        label="name", timing=pl.lit("measured"), category=pl.col("category").fill_null("computation")
    )
    yield _as_slices(named.drop("flops", "bytes_read", "bytes_written"), order=pl.lit(STREAM), number=pl.col("stream"))


def _meetings(met: pl.DataFrame, axes: Sequence[str]) -> pl.DataFrame:
    """What ranks took part in, from their arrival to their end."""
    open_label = pl.when(pl.col("end_ns").is_null()).then(pl.format("{} (end unknown)", "label")).otherwise("label")
    return _as_slices(
        met.with_columns(
            flow=pl.coalesce("sent", "node") + 1,
            is_receive=pl.col("kind") == "recv",
            last_ns="start_ns",
            label=open_label,
            done_ns="end_ns",
            start_ns="arrive_ns",
            end_ns=pl.max_horizontal("arrive_ns", "start_ns", "end_ns"),
            group="text",
        ),
        order=pl.lit(COMMUNICATION),
        number=pl.col("axis").fill_null("other").replace_strict({axis: place for place, axis in enumerate(axes)}),
    )


def _parts(meetings: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Communications, their waiting and their transfer; an arrow to a receive ends where its transfer begins."""
    yield meetings.with_columns(flow=pl.when(~pl.col("is_receive")).then("flow"))
    met = meetings.filter(pl.col("last_ns").is_not_null())
    bare = [pl.lit(None, _SLICE[name]).alias(name) for name in (*NUMBERS, *TEXTS) if name not in ("node", "timing")]
    yield met.filter(pl.col("last_ns") > pl.col("start_ns")).with_columns(
        *bare, end_ns="last_ns", name=_mark(pl.lit("waiting")), category=pl.lit("waiting"), is_inner=True,
        flow=pl.lit(None, pl.Int64),
    )  # fmt: skip
    moves = (pl.col("done_ns") > pl.col("last_ns")) | pl.col("is_receive")
    yield met.filter(moves).with_columns(
        *bare, start_ns="last_ns", name=_mark(pl.lit("transfer")), category=pl.lit("transfer"), is_inner=True,
        flow=pl.when("is_receive").then("flow"), end_ns=pl.max_horizontal("last_ns", "done_ns"),
    )  # fmt: skip


def _as_slices(frame: pl.DataFrame, *, order: pl.Expr, number: pl.Expr) -> pl.DataFrame:
    """Bring a frame to the columns of slices; estimates say so in their names."""
    is_estimated = (frame["timing"] == "estimated").any()
    known = frame.with_columns(
        order=order,
        number=number,
        name=_mark(pl.col("label")) if is_estimated else pl.col("label"),
        timing=pl.when(pl.col("timing") != "measured").then("timing"),
    )
    return known.select(
        (pl.col(column) if column in known.columns else pl.lit(False if column.startswith("is_") else None))
        .cast(dtype)
        .alias(column)
        for column, dtype in _UNPLACED.items()
    )


def _mark(name: pl.Expr) -> pl.Expr:
    """Have a slice whose times are estimates say so in its name."""
    return pl.when(pl.col("timing") == "estimated").then(pl.format("{} (estimated)", name)).otherwise(name)
