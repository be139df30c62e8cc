"""The graph as slices of time on tracks: what every program for timelines shows.

A rank is a process. Its operators are on the threads that ran them, on a GPU their kernels on streams; communications
are on tracks of their own, one for each axis, since they run beside everything else: a slice from a rank's arrival to
its end, in it one of waiting (until the last has arrived) and one of transfer, where it is known when the last arrived;
where its end is not known, its name says so. What overlaps on a track goes to a second lane of it. A flow leads through
the participants of a collective as they arrive, and from a send to its receive.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.errors import GraphError
from truedag.tracer.graph import Graph

COMMUNICATIONS = ("collective", "send", "recv")
NUMBERS = ("node", "layer", "microbatch", "expert", "step", "decode_step", "flops", "bytes_read", "bytes_written",
           "seq", "send_bytes", "recv_bytes")  # fmt: skip
TEXTS = ("op", "module", "phase", "inputs", "outputs", "group", "timing")
_TOLD = ("node", "kind", "category", "op", "label", "module", "layer", "microbatch", "expert", "phase", "step",
         "decode_step", "timing", "inputs", "outputs", "flops", "bytes_read", "bytes_written")  # fmt: skip
Ints = NDArray[np.int64]
_BATCH = 2_000_000  # nodes in memory at once
_AXES = ("tp", "ep", "etp", "pp", "dp", "edp", "cp")
_THREAD, _STREAM, _COMMUNICATION = range(3)
_SLICE = {
    "rank": pl.Int64, "order": pl.Int64, "track": pl.String, "start_ns": pl.Int64, "end_ns": pl.Int64,
    "name": pl.String, "category": pl.String, "flow": pl.Int64, "is_inner": pl.Boolean, "is_receive": pl.Boolean,
    **dict.fromkeys(NUMBERS, pl.Int64), **dict.fromkeys(TEXTS, pl.String),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTimeline:
    """What a rank did.

    Attributes:
        rank: the rank.
        name: of its process.
        slices: track (its name, lanes told apart), order (of its tracks), start_ns, end_ns, name, category, flow (a
            number that slices of one collective or message share, from 1; null: none), is_inner (within another),
            is_receive (a flow leads to it, whenever it began), NUMBERS and TEXTS (null: none). Outer slices are before
            inner ones; those of a track do not overlap but for inner ones, which lie within their outer.
    """

    rank: int
    name: str
    slices: pl.DataFrame


def count_slices(graph: Graph) -> int:
    """Return at most how many slices a graph's timeline has.

    Raises:
        GraphError: nothing in it has a time.
    """
    timed = (pl.col("kind") == "compute") & pl.col("end_ns").is_not_null()
    operators = graph.nodes.select(timed.sum()).collect().item()
    calls = graph.nodes.select((timed & (pl.col("stream") >= 0)).sum()).collect().item()
    kernels = graph.kernels.select(pl.len()).collect().item()
    met = graph.participants.select(pl.col("arrive_ns").is_not_null().sum()).collect().item()
    if not operators + met:
        raise GraphError(
            f"nothing in {graph.path}, or in the part of it that was asked for, has a time: a graph without times goes "
            "to formats of graphs and tables (graphml, node-link, model-explorer, chakra, csv)"
        )
    return int(operators + calls + kernels + 3 * met)


def list_timelines(graph: Graph) -> Iterator[RankTimeline]:
    """Return each rank's timeline, ranks in order."""
    names = _name_ranks(graph)
    counts = graph.nodes.group_by("rank").len().collect()
    sizes = dict(counts.iter_rows())
    messages = graph.edges.filter(pl.col("kind") == "p2p").select("src", node="dst").collect()
    batch: list[int] = []
    ranks = sorted(names)
    for place, rank in enumerate(ranks):
        batch.append(rank)
        if place + 1 == len(ranks) or sum(sizes.get(one, 0) for one in [*batch, ranks[place + 1]]) > _BATCH:
            slices = _list_slices(graph, batch, messages).partition_by("rank", as_dict=True)
            for one in batch:
                if (one,) in slices:
                    yield RankTimeline(rank=one, name=names[one], slices=slices.pop((one,)))
            batch = []


def list_tracks(slices: pl.DataFrame) -> list[str]:
    """Return the names of a rank's tracks, threads first."""
    return slices.select("order", "track").unique().sort("order", "track")["track"].to_list()


def _name_ranks(graph: Graph) -> Mapping[int, str]:
    names = {}
    for row in graph.ranks.collect().iter_rows(named=True):
        places = [f"{axis} {row[axis]}" for axis in _AXES if row.get(axis) is not None and row[axis] >= 0]
        names[int(row["rank"])] = " · ".join([f"rank {row['rank']}", *places, str(row["host"])])
    return names


def _list_slices(graph: Graph, ranks: list[int], messages: pl.DataFrame) -> pl.DataFrame:
    nodes = graph.nodes.filter(pl.col("rank").is_in(ranks) & (pl.col("kind") == "compute")).collect()
    kernels = graph.kernels.filter(pl.col("rank").is_in(ranks)).collect()
    met = graph.participants.filter(pl.col("rank").is_in(ranks) & pl.col("arrive_ns").is_not_null())
    told = graph.nodes.filter(pl.col("kind").is_in(COMMUNICATIONS)).select(_TOLD)
    groups = graph.groups.select("group", "axis", members="ranks")
    met_frame = met.join(told, on="node").join(groups, on="group", how="left").collect()
    outer = _split_lanes(
        pl.concat([_operators(nodes, kernels), _kernels(kernels, nodes, told), _meetings(met_frame, messages)])
    )
    started = outer.with_columns(flow=pl.when(~pl.col("is_receive")).then("flow"))
    return pl.concat([started, _parts(outer)]).select(*_SLICE)


def _operators(nodes: pl.DataFrame, kernels: pl.DataFrame) -> pl.DataFrame:
    """Operators on their threads; on a GPU the calls there, and on streams what has no kernel of its own."""
    timed = nodes.filter(pl.col("end_ns").is_not_null())
    on_stream = pl.col("stream") >= 0
    own = timed.with_columns(
        order=pl.when(on_stream).then(_STREAM).otherwise(_THREAD),
        track=pl.when(on_stream).then(pl.format("stream {}", "stream")).otherwise(pl.format("thread {}", "thread")),
    ).join(kernels.select("node", has_kernel=True).unique(), on="node", how="left")
    own = own.filter(~on_stream | pl.col("has_kernel").is_null())
    if "host_end_ns" not in nodes.columns:
        return _as_slices(own)
    calls = timed.filter(on_stream & pl.col("host_end_ns").is_not_null()).with_columns(
        order=_THREAD, track=pl.format("thread {}", "thread"), start_ns="host_start_ns", end_ns="host_end_ns"
    )
    return pl.concat([_as_slices(own), _as_slices(calls)])


def _kernels(kernels: pl.DataFrame, nodes: pl.DataFrame, told: pl.LazyFrame) -> pl.DataFrame:
    labels = pl.concat([nodes.select(_TOLD), told.collect()])
    ran = kernels.drop("kind").join(labels, on="node", how="left", maintain_order="left")
    return _as_slices(
        ran.with_columns(
            order=_STREAM,
            track=pl.format("stream {}", "stream"),
            label="name",
            timing=pl.lit("measured"),
            category=pl.col("category").fill_null("computation"),
        ).drop("flops", "bytes_read", "bytes_written")
    )


def _meetings(met: pl.DataFrame, messages: pl.DataFrame) -> pl.DataFrame:
    """What a rank took part in, from its arrival to its end."""
    open_label = pl.when(pl.col("end_ns").is_null()).then(pl.format("{} (end unknown)", "label")).otherwise("label")
    # A send, its receive and the arrow between them have the send's number.
    sent = messages.select("node", sent="src")
    return _as_slices(
        met.join(sent, on="node", how="left", maintain_order="left").with_columns(
            order=_COMMUNICATION,
            track=pl.format("{} communication", pl.col("axis").fill_null("other")),
            flow=pl.coalesce("sent", "node") + 1,
            is_receive=pl.col("kind") == "recv",
            last_ns="start_ns",
            label=open_label,
            done_ns="end_ns",
            start_ns="arrive_ns",
            end_ns=pl.max_horizontal("arrive_ns", "start_ns", "end_ns"),
            group=pl.col("members").cast(pl.List(pl.String)).list.join(" "),
        )
    )


def _parts(outer: pl.DataFrame) -> pl.DataFrame:
    """Waiting and transfer of each communication; an arrow to a receive ends where its transfer begins."""
    met = outer.filter(pl.col("order") == _COMMUNICATION, pl.col("last_ns").is_not_null())
    bare = [pl.lit(None, _SLICE[name]).alias(name) for name in (*NUMBERS, *TEXTS) if name not in ("node", "timing")]
    waiting = met.filter(pl.col("last_ns") > pl.col("start_ns")).with_columns(
        *bare,
        end_ns="last_ns",
        name=_mark(pl.lit("waiting")),
        category=pl.lit("waiting"),
        flow=pl.lit(None, pl.Int64),
        is_inner=True,
    )
    moves = (pl.col("done_ns") > pl.col("last_ns")) | pl.col("is_receive")
    transfer = met.filter(moves).with_columns(
        *bare, start_ns="last_ns", name=_mark(pl.lit("transfer")), category=pl.lit("transfer"), is_inner=True,
        flow=pl.when("is_receive").then("flow"), end_ns=pl.max_horizontal("last_ns", "done_ns"),
    )  # fmt: skip
    return pl.concat([waiting.select(outer.columns), transfer.select(outer.columns)])


def _as_slices(frame: pl.DataFrame) -> pl.DataFrame:
    """Bring a frame to the columns of slices; estimates say so in their names."""
    known = frame.with_columns(
        name=_mark(pl.col("label")), timing=pl.when(pl.col("timing") != "measured").then("timing")
    )
    schema = {**_SLICE, **dict.fromkeys(("last_ns", "done_ns"), pl.Int64)}
    # Numbers that stand for none are none.
    return known.select(
        (pl.col(column) if column in known.columns else pl.lit(False if column.startswith("is_") else None))
        .cast(dtype)
        .alias(column)
        for column, dtype in schema.items()
    ).with_columns(pl.when(pl.col(name) >= 0).then(pl.col(name)).alias(name) for name in NUMBERS)


def _mark(name: pl.Expr) -> pl.Expr:
    """Have a slice whose times are estimates say so in its name."""
    return pl.when(pl.col("timing") == "estimated").then(pl.format("{} (estimated)", name)).otherwise(name)


def _split_lanes(slices: pl.DataFrame) -> pl.DataFrame:
    """Put what overlaps on a track into further lanes of it, each a track of its own."""
    # Only what is needed is sorted, and as numbers: slices are many columns wide.
    key = pl.col("rank") * (1 << 24) + pl.col("track").cast(pl.Categorical).to_physical().cast(pl.Int64)
    narrow = slices.select("start_ns", "end_ns", key=key).with_row_index("at").sort("key", "start_ns", "end_ns", "at")
    clash = _overlap(*(narrow[name].to_numpy() for name in ("key", "start_ns", "end_ns")))
    if not clash.any():
        return slices
    tracks = narrow.filter(pl.Series(clash)).select("key").unique()
    clashing = narrow.join(tracks, on="key", how="semi", maintain_order="left")
    lanes: list[int] = []
    for part in clashing.partition_by("key", maintain_order=True):
        free: list[int] = []
        busy: list[tuple[int, int]] = []
        for start, end in part.select("start_ns", "end_ns").iter_rows():
            while busy and busy[0][0] <= start:
                heapq.heappush(free, heapq.heappop(busy)[1])
            lane = heapq.heappop(free) if free else len(busy)
            heapq.heappush(busy, (end, lane))
            lanes.append(lane)
    moved = clashing.select("at", lane=pl.Series(lanes, dtype=pl.Int64)).filter(pl.col("lane") > 0)
    numbered = slices.with_row_index("at").join(moved, on="at", how="left", maintain_order="left")
    name = pl.when(pl.col("lane") > 0).then(pl.format("{} ({})", "track", pl.col("lane") + 1)).otherwise("track")
    return numbered.with_columns(track=name).select(slices.columns)


def _overlap(key: Ints, start_ns: Ints, end_ns: Ints) -> NDArray[np.bool_]:
    """Return which slices begin before one earlier on their track has ended; they are sorted by key and start."""
    if not len(key):
        return np.zeros(0, bool)
    place = np.cumsum(np.diff(key, prepend=key[0]) != 0)
    base, stretch = start_ns.min(), end_ns.max() - start_ns.min() + 1
    reach = np.maximum.accumulate(end_ns - base + place * stretch)  # of one track after the other
    found = np.zeros(len(key), bool)
    found[1:] = start_ns[1:] - base + place[1:] * stretch < reach[:-1]
    return found
