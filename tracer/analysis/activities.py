"""What ran in a step, and what each waited for: the network that the critical path is found in.

Theory of operation. The network's points are activities of one rank: an operator; a rank's arrival at a communication;
the meeting, when all have arrived (of no rank); a rank's end of it. An activity leads to another if the graph says so
(data, messages, program order; `dependencies.py`), and a communication is arrival -> meeting -> end on each rank, so
that its end waits for the last to arrive. A rank that was done before that moment (a broadcast's root) waited for
nobody. On a GPU an operator is two activities: the call on the host, which follows the thread, and its kernels, which
follow the call, the stream and the data.

An activity is ready when the last of those that lead to it has ended; one that had not ended yet when the other began
(clock error, or a backend that told an end late) counts up to then. That last one is its cause. What leads to nothing
before it was ready when the step began.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.analysis.dependencies import (
    ARRIVAL,
    CALL,
    COMPUTE,
    END,
    HOST,
    MEETING,
    OPERATOR,
    TRANSFER,
    WAITING,
    Lanes,
    infer_dependencies,
    told_dependencies,
)
from truedag.tracer.errors import GraphError
from truedag.tracer.graph import Graph
from truedag.tracer.topology import number_nodes

_COMMUNICATIONS = ("collective", "send", "recv")
_SCHEMA = {
    "node": pl.Int64, "rank": pl.Int64, "part": pl.Int64, "start": pl.Int64, "end": pl.Int64, "kind": pl.Int64,
    "thread": pl.Int64, "meet": pl.Int64, "group": pl.Int64, "waited": pl.Int64, "is_joint": pl.Boolean,
    "is_receive": pl.Boolean, "is_told": pl.Boolean,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Activities:
    """The activities of a step in a topological order, and what leads to what; times are ns.

    Attributes:
        node: [activities] the graph's node that it belongs to.
        rank: [activities] where it ran; -1 for a meeting.
        part: [activities] which part of its node it is (`dependencies.CALL` and so on).
        start_ns, end_ns: [activities].
        ready_ns: [activities] when the last that leads to it had ended; never after its start.
        cause: [activities] the place of that last one; -1 if nothing leads to it.
        kind: [activities] what its own time is (`dependencies.COMPUTE` and so on).
        pause: [activities] what the time from ready to start is.
        src, dst: [edges] places of activities, src < dst.
        window_ns: the step's first start and last end, what a GPU was given by the host included.
        num_untimed: operators and communications without a time; they are not among the activities.
        is_estimated: whether any of the times is an estimate.
    """

    node: NDArray[np.int64]
    rank: NDArray[np.int64]
    part: NDArray[np.int64]
    start_ns: NDArray[np.int64]
    end_ns: NDArray[np.int64]
    ready_ns: NDArray[np.int64]
    cause: NDArray[np.int64]
    kind: NDArray[np.int64]
    pause: NDArray[np.int64]
    src: NDArray[np.int64]
    dst: NDArray[np.int64]
    window_ns: tuple[int, int]
    num_untimed: int
    is_estimated: bool


def list_activities(graph: Graph, step: int | None) -> Activities:
    """Return the activities of a step; None is all that was recorded.

    Raises:
        GraphError: nothing of it has a time, or the clocks of ranks that talk to each other cannot be compared.
    """
    columns = ["node", "kind", "rank", "step", "thread", "stream", "start_ns", "end_ns", "timing"]
    known = graph.nodes.collect_schema().names()
    columns += [name for name in ("host_start_ns", "host_end_ns") if name in known]
    nodes = graph.nodes.select(columns).filter(pl.col("kind").is_in(["compute", *_COMMUNICATIONS])).collect()
    participants = graph.participants.join(graph.groups.select("group", size=pl.col("ranks").list.len()), on="group")
    parts = participants.collect()
    nodes, window = _select_step(nodes, parts, step)
    edges = graph.edges.select("src", "dst", "kind").collect()
    operators = _operators(nodes)
    communications = _communications(nodes, parts, edges)
    frame = pl.concat([operators, communications]).sort("start", "part", "node", "rank").with_row_index("at")
    frame = frame.with_columns(pl.col("at").cast(pl.Int64))
    lanes = Lanes.build(frame)
    told = told_dependencies(frame, edges)
    inferred = infer_dependencies(frame, edges, lanes)
    number, src, dst = _number(frame, told, inferred)
    place = np.argsort(number)
    start, end, part = (frame[name].to_numpy()[place] for name in ("start", "end", "part"))
    kind = frame["kind"].to_numpy()[place]
    ready, cause = _find_causes(start, end, src, dst, window[0])
    pause = np.where(part == MEETING, WAITING, HOST)
    # A communication that began while its thread went on had waited for its turn in the backend.
    arrivals = np.flatnonzero((part == ARRIVAL) & (ready < start))
    pause[arrivals[lanes.went_on(place[arrivals], ready[arrivals], start[arrivals])]] = WAITING
    lone = (part == END) & ~frame["is_joint"].to_numpy()[place]
    is_open = (kind == WAITING) & (start == end)  # a communication whose end nobody told
    pause[lone | ((cause >= 0) & is_open[cause])] = WAITING
    return Activities(
        node=frame["node"].to_numpy()[place],
        rank=frame["rank"].to_numpy()[place],
        part=part,
        start_ns=start,
        end_ns=end,
        ready_ns=ready,
        cause=cause,
        kind=kind,
        pause=pause,
        src=src,
        dst=dst,
        window_ns=window,
        num_untimed=len(nodes) - frame.filter(pl.col("is_told"))["node"].n_unique(),
        is_estimated=bool((nodes["timing"] == "estimated").any()),
    )


def _select_step(nodes: pl.DataFrame, parts: pl.DataFrame, step: int | None) -> tuple[pl.DataFrame, tuple[int, int]]:
    """Return the nodes of a step, and those of no step that ran within it; and its first start and last end."""
    in_step = nodes if step is None else nodes.filter(pl.col("step") == step)
    timed = in_step.filter(pl.col("timing") != "none").select("start_ns", "end_ns").drop_nulls()
    met = parts.join(in_step.select("node"), on="node", how="semi").select(start_ns="arrive_ns", end_ns="end_ns")
    calls = in_step.filter(pl.col("stream") >= 0)
    host = [calls.select(start_ns="host_start_ns", end_ns="host_end_ns")] if "host_end_ns" in nodes.columns else []
    spans = pl.concat([timed, met.drop_nulls(), *(frame.drop_nulls() for frame in host)])
    if spans.is_empty():
        what = "this graph" if step is None else f"step {step}"
        raise GraphError(
            f"nothing in {what} has a time: only what was recorded with times, or by truedag dry with a --device, has "
            "a critical path"
        )
    low, high = spans.select(pl.col("start_ns").min(), pl.col("end_ns").max()).row(0)
    if step is not None:
        within = (pl.col("step") < 0) & (pl.col("start_ns") >= low) & (pl.col("end_ns") <= high)
        in_step = nodes.filter((pl.col("step") == step) | within)
    return in_step, (int(low), int(high))


def _operators(nodes: pl.DataFrame) -> pl.DataFrame:
    ran = nodes.filter((pl.col("kind") == "compute") & (pl.col("timing") != "none")).drop_nulls(["start_ns", "end_ns"])
    device = (pl.col("stream") >= 0) & pl.col("host_end_ns").is_not_null()
    if "host_end_ns" not in nodes.columns:
        device = pl.lit(value=False)
    own = ran.select(
        "node", "rank", part=OPERATOR, start="start_ns", end="end_ns", kind=COMPUTE,
        thread=pl.when(device).then(None).otherwise("thread"), is_joint=True, is_receive=False, is_told=True,
    )  # fmt: skip
    calls = ran.filter(device)
    if "host_end_ns" in nodes.columns:
        calls = calls.select(
            "node", "rank", "thread", part=CALL, start="host_start_ns", end="host_end_ns", kind=HOST, is_joint=True,
            is_receive=False, is_told=True,
        )  # fmt: skip
    return _with_schema(own, calls)


def _communications(nodes: pl.DataFrame, parts: pl.DataFrame, edges: pl.DataFrame) -> pl.DataFrame:
    """Return arrivals, meetings and ends.

    Raises:
        GraphError: who arrived last is unknown because clocks cannot be compared.
    """
    messages = edges.filter(pl.col("kind") == "p2p")
    meets = pl.concat([messages.select(node="src", meet="dst"), messages.select(node="dst", meet="dst")])
    waited = pl.col("waited_ns") if "waited_ns" in parts.columns else pl.lit(None, pl.Int64)
    met = (
        parts.join(nodes.select("node", "kind", lone="rank"), on="node")
        .join(meets.unique("node"), on="node", how="left")
        .with_columns(meet=pl.when(pl.col("kind") == "collective").then("node").otherwise("meet"), waited=waited)
        .with_columns(num_met=pl.len().over("meet"))
    )
    expected = pl.when(pl.col("kind") == "collective").then("size").otherwise(2)
    met = met.with_columns(is_joint=pl.col("meet").is_not_null() & (pl.col("num_met") == expected))
    unknown = met.filter(pl.col("start_ns").is_null() & pl.col("end_ns").is_not_null())
    if not unknown.is_empty():
        ranks = sorted(unknown["rank"].unique().to_list())
        raise GraphError(
            f"who arrived last at {unknown['node'].n_unique()} communications of ranks {ranks} is unknown: their "
            "hosts' clocks cannot be compared (clock_error_ns in ranks), and so the critical path is unknown too"
        )
    met = met.with_columns(last=pl.when("is_joint").then(pl.col("arrive_ns").max().over("meet")))
    arrivals = met.select(
        "node", "rank", "meet", "group", "waited", "is_joint", part=ARRIVAL, start="arrive_ns", end="arrive_ns",
        kind=HOST, is_receive=False, is_told=False,
    )  # fmt: skip
    meetings = (
        met.filter("is_joint")
        .group_by("meet")
        .agg(pl.col("last").first())
        .select(node="meet", rank=-1, meet="meet", part=MEETING, start="last", end="last", kind=WAITING, is_joint=True,
                is_receive=False, is_told=False)
    )  # fmt: skip
    is_receive = pl.col("kind") == "recv"
    known = pl.coalesce("last", "start_ns", "arrive_ns")
    end = pl.max_horizontal(pl.coalesce("end_ns", known), "arrive_ns")
    # Where all met, it moves data from the last arrival on; a rank that was done before waited for nobody.
    moves = pl.when(end >= known).then(known).otherwise("arrive_ns")
    # A receive ends when its wait does: before the wait began, the host was at something else.
    began = pl.when(is_receive & (pl.col("waited") >= 0)).then(end - pl.col("waited")).otherwise(moves)
    alone = ~pl.col("is_joint") & (known <= pl.col("arrive_ns")) & (pl.col("lone") >= 0)
    ends = met.select(
        "node", "rank", "meet", "group", "waited", "is_joint",
        is_receive=is_receive, part=END, start=pl.max_horizontal(moves, began).clip(None, end), end=end,
        kind=pl.when(pl.col("end_ns").is_null() | alone).then(WAITING).otherwise(TRANSFER),
        is_told=pl.col("end_ns").is_not_null(),
    )  # fmt: skip
    return _with_schema(arrivals, meetings, ends)


def _with_schema(*frames: pl.DataFrame) -> pl.DataFrame:
    """Lay frames below each other; a column that one lacks is unknown in it."""
    return pl.concat(
        [
            frame.select(
                (pl.col(name) if name in frame.columns else pl.lit(None)).cast(dtype).alias(name)
                for name, dtype in _SCHEMA.items()
            )
            for frame in frames
        ]
    )


def _number(
    frame: pl.DataFrame, told: NDArray[np.int64], inferred: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Number the activities topologically; what was inferred gives way if it makes a cycle."""
    times = frame["start"].to_numpy()
    for edges in (np.concatenate((told, inferred)), told):
        number, cycle = number_nodes(times, edges[:, 0], edges[:, 1])
        if not cycle:
            return number, number[edges[:, 0]], number[edges[:, 1]]
    raise GraphError("the graph's edges make a cycle: the dataset is broken, merge its traces again")


def _find_causes(
    start: NDArray[np.int64], end: NDArray[np.int64], src: NDArray[np.int64], dst: NDArray[np.int64], begin: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return when each activity was ready, and what made it so."""
    ready, cause = np.full(len(start), begin, np.int64), np.full(len(start), -1, np.int64)
    if not len(src):
        return ready, cause
    order = np.argsort(dst, kind="stable")
    tails, heads = src[order], dst[order]
    until = np.minimum(end[tails], start[heads])
    firsts = np.flatnonzero(np.diff(heads, prepend=-1))
    ready[heads[firsts]] = np.maximum.reduceat(until, firsts)
    cause[heads[firsts]] = np.maximum.reduceat(np.where(until == ready[heads], tails, -1), firsts)
    return ready, cause
