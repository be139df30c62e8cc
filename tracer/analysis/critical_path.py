"""The critical path: what the time of a step was spent on, one thing after the other, across all ranks.

Theory of operation. From the last end of the step backwards: the time from an activity's start to its end is its own
(compute; transfer, from the last arrival on); the time before, back to when it was ready, is its pause (the host's own
work between two operators; or waiting, where what it waited for is not in the graph); then its cause, what made it
ready, has the floor. Every moment from the step's first start to its last end belongs to exactly one piece, so the
pieces' lengths add up to the step's time exactly. Waiting for another rank is not on the path: the path goes over to
the rank that was waited for, and what that one was at is on it.

The same as a longest path: an activity weighs its pause and its own time, an edge nothing (less where the first had
not ended when the second began), and the longest path to an activity is as long as the time from the step's begin to
its end. An activity's slack is what it could end later, all other weights kept, before the step ended later; on the
path it is 0.

Ranks of one class of a class graph run at the same estimated times: there the path is found over one rank of each
(`graph/one_of_each.py`), and each stands for those of its class.

Times of two ranks are compared only at the path's beginning and at its end: in between, what the path loses by a wrong
clock when it goes over to another rank it wins when it comes back. So the two clocks' errors bound the length's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.analysis.activities import Activities, list_activities
from truedag.tracer.analysis.dependencies import ARRIVAL, END, KINDS, MEETING, OPERATOR
from truedag.tracer.errors import GraphError
from truedag.tracer.graph import Graph
from truedag.tracer.graph.one_of_each import OneOfEach

_NUM_HELD = 1000  # stragglers that are asked what they came late for
_STRETCH = 1 << 18  # edges turned into Python's numbers at once
_TOLD = ("kind", "op", "label", "module", "layer", "stage", "microbatch", "phase")


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalPath:
    """The critical path of a step; all times in ns on the graph's clock.

    Attributes:
        step: which step; None where none was told.
        start_ns, end_ns: the step's first start and last end.
        error_ns: how wrong the clocks may make its length; None is unknown, as it is of what was estimated: that has no
            clocks, and how far off it is nobody knows.
        pieces: start_ns, end_ns, spent (compute, transfer, waiting, host), rank, node, and what the node is: kind, op,
            label, module, layer, stage, microbatch, phase. In the order of time, without gap or overlap. Time of the
            host is with the node that came after it.
        slack: node, rank, slack_ns of every operator and every rank's part in a communication: how much later it could
            end; and arrival_slack_ns, how much later the rank could have arrived at it. Of a class graph, of the lowest
            rank of each class.
        stragglers: one row for each communication that anybody waited in, the most waited for first: node, label,
            group, phase, layer, rank (the last to arrive), late_ns (behind the last but one), waited_ns (summed over
            all who waited); and for the first thousand what led to its arrival while the last but one waited, on
            whatever rank: late_compute_ns, late_transfer_ns, late_waiting_ns, late_host_ns, and the longest piece of
            it: held_spent, held_ns, held_rank, held_node, held_op, held_label.
        num_untimed: operators and communications without a time, which the path does not know of.
        is_estimated: whether times are estimates, and not measurements alone.
        is_of_classes: whether each rank stands for all of its class.
    """

    step: int | None
    start_ns: int
    end_ns: int
    error_ns: int | None
    pieces: pl.DataFrame
    slack: pl.DataFrame
    stragglers: pl.DataFrame
    num_untimed: int
    is_estimated: bool
    is_of_classes: bool = False

    @property
    def length_ns(self) -> int:
        """The sum of the pieces: the time of the step."""
        return int((self.pieces["end_ns"] - self.pieces["start_ns"]).sum())

    def total(self, *by: str) -> pl.DataFrame:
        """Return the columns `by`, compute_ns, transfer_ns, waiting_ns, host_ns and total_ns; the largest first.

        Args:
            by: columns of `pieces`; none is the whole path.
        """
        spent = [
            (pl.col("end_ns") - pl.col("start_ns")).filter(pl.col("spent") == kind).sum().alias(f"{kind}_ns")
            for kind in KINDS
        ]
        total = (pl.col("end_ns") - pl.col("start_ns")).sum().alias("total_ns")
        if not by:
            return self.pieces.select(*spent, total)
        return (
            self.pieces.group_by(*by).agg(*spent, total).sort("total_ns", *by, descending=[True, *(False for _ in by)])
        )

    def _repr_html_(self) -> str:
        from truedag.tracer.analysis.critical_path_text import write_html

        return write_html(self)


def find_critical_path(graph: Graph, step: int | None = None) -> CriticalPath:
    """Find the critical path of a step; without one, of the first that was recorded.

    Raises:
        GraphError: there is no such step, nothing of it has a time, or clocks that matter cannot be compared.
    """
    if (one := graph.one_of_each) is not None:
        return _in_whole(find_critical_path(Graph(one), step), one)
    steps = graph.nodes.filter(pl.col("step") >= 0).select(pl.col("step").unique().sort()).collect()["step"].to_list()
    if step is None:
        step = steps[0] if steps else None
    elif step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise GraphError(f"step {step} is not in {graph.path}; recorded steps: {known}")
    activities = list_activities(graph, step)
    pieces = _walk(activities)
    labels = graph.nodes.select("node", *_TOLD)
    told = labels.join(pieces.lazy().select("node").unique(), on="node", how="semi").collect()
    ends = pieces.select(pl.col("rank").first().alias("first"), pl.col("rank").last().alias("last")).row(0)
    return CriticalPath(
        step=step,
        start_ns=activities.window_ns[0],
        end_ns=activities.window_ns[1],
        error_ns=None if activities.is_estimated else _clock_error(graph, ends),
        pieces=pieces.join(told, on="node", how="left", maintain_order="left"),
        slack=_slack(activities),
        stragglers=_stragglers(graph, activities),
        num_untimed=activities.num_untimed,
        is_estimated=activities.is_estimated,
    )


def _in_whole(path: CriticalPath, one: OneOfEach) -> CriticalPath:
    """Return the path over one rank of each class with the numbers and the counts of the whole graph."""

    def numbers(frame: pl.DataFrame, node: str, rank: str) -> pl.Series:
        known = frame[node].is_not_null()
        told = frame.filter(known)
        places = one.in_whole(told[node].to_numpy(), told[rank].to_numpy())
        return frame[node].scatter(known.arg_true(), places)

    late = path.stragglers
    group = one.group_in_whole(late["group"].to_numpy(), late["rank"].to_numpy())
    return replace(
        path,
        is_of_classes=True,
        pieces=path.pieces.with_columns(numbers(path.pieces, "node", "rank")),
        slack=path.slack.with_columns(numbers(path.slack, "node", "rank")),
        stragglers=late.with_columns(
            pl.Series("group", group), numbers(late, "node", "rank"), numbers(late, "held_node", "held_rank")
        ),
    )


def longest_delays(activities: Activities) -> NDArray[np.int64]:
    """Return how much later each activity could end without the step's last end being later, in ns: [activities]."""
    src, dst = activities.src, activities.dst
    lag = np.minimum(activities.start_ns[dst] - activities.end_ns[src], 0)
    weight = (activities.end_ns - activities.ready_ns)[dst] + lag
    latest = np.full(len(activities.node), activities.window_ns[1], np.int64).tolist()
    order = np.argsort(-dst, kind="stable")
    for begin in range(0, len(order), _STRETCH):
        some = order[begin : begin + _STRETCH]
        for one, other, cost in zip(src[some].tolist(), dst[some].tolist(), weight[some].tolist(), strict=True):
            until = latest[other] - cost
            if until < latest[one]:
                latest[one] = until
    return np.array(latest, np.int64) - activities.end_ns


def _walk(activities: Activities) -> pl.DataFrame:
    """Walk back from the last end; see the module's theory."""
    start, ready = activities.start_ns, activities.ready_ns
    rows: list[tuple[int, int, int, int, int]] = []
    begin, time = activities.window_ns
    place = int(np.argmax(activities.end_ns))

    def take(at: int, since: int, kind: int) -> None:
        nonlocal time
        since = max(min(since, time), begin)
        if since < time:
            rows.append((since, time, kind, int(activities.rank[at]), int(activities.node[at])))
            time = since

    # The program may have waited for a message to leave after it had reached its receiver: that ends the step.
    take(place, int(activities.end_ns[place]), KINDS.index("waiting"))
    while place >= 0:
        take(place, int(start[place]), int(activities.kind[place]))
        take(place, int(ready[place]), int(activities.pause[place]))
        place = int(activities.cause[place])
    pieces = pl.DataFrame(
        rows[::-1],
        schema={"start_ns": pl.Int64, "end_ns": pl.Int64, "spent": pl.Int64, "rank": pl.Int64, "node": pl.Int64},
        orient="row",
    )
    return pieces.with_columns(spent=pl.col("spent").replace_strict(dict(enumerate(KINDS)), return_dtype=pl.String))


def _clock_error(graph: Graph, ranks: tuple[int, int]) -> int | None:
    if ranks[0] == ranks[1]:
        return 0
    errors = dict(graph.ranks.select("rank", "clock_error_ns").collect().iter_rows())
    told = [errors.get(rank) for rank in ranks]
    return None if None in told else sum(error for error in told if error is not None)


def _slack(activities: Activities) -> pl.DataFrame:
    columns = {
        "node": activities.node,
        "rank": activities.rank,
        "part": activities.part,
        "slack_ns": longest_delays(activities),
    }
    slack = pl.col("slack_ns")
    return (
        pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.Int64))
        .filter(pl.col("part") != MEETING)
        .group_by("node", "rank")
        .agg(
            slack.filter(pl.col("part").is_in([OPERATOR, END])).first(),
            arrival_slack_ns=slack.filter(pl.col("part") == ARRIVAL).first(),
        )
        .sort("node", "rank")
    )


def _stragglers(graph: Graph, activities: Activities) -> pl.DataFrame:
    """Say who came last to each communication, and what held it up."""
    whole = pl.LazyFrame({"meet": activities.node[activities.part == MEETING]}, schema={"meet": pl.Int64})
    messages = graph.edges.filter(pl.col("kind") == "p2p").select(node="src", meet="dst")
    participants = graph.participants
    # One rank may stand for several of its group, which came when it did.
    num = pl.col("num_alike") if "num_alike" in participants.collect_schema() else pl.lit(1, pl.Int64)
    met = (
        participants.join(messages, on="node", how="left")
        .with_columns(
            meet=pl.coalesce("meet", "node"), waited=(pl.col("start_ns") - pl.col("arrive_ns")) * num, num=num
        )
        .join(whole, on="meet", how="semi")
    )
    arrivals = pl.col("arrive_ns").repeat_by("num").list.explode()
    before = arrivals.sort(descending=True).get(1, null_on_oob=True)
    last = (
        met.group_by("meet")
        .agg(
            pl.col("group").first(),
            pl.col("rank").sort_by("arrive_ns", "rank", descending=[False, True]).last(),
            pl.col("node").sort_by("arrive_ns", "rank", descending=[False, True]).last().alias("came"),
            late_ns=pl.col("arrive_ns").max() - before,
            waited_ns=pl.col("waited").sum(),
        )
        .filter((pl.col("waited_ns") > 0) & pl.col("late_ns").is_not_null())
        .join(graph.nodes.select("node", "label", "phase", "layer"), left_on="meet", right_on="node")
        .sort("waited_ns", "meet", descending=[True, False])
        .rename({"meet": "node"})
        .collect()
    )
    arrived = np.flatnonzero(activities.part == ARRIVAL)
    keys = zip(activities.node[arrived].tolist(), activities.rank[arrived].tolist(), strict=True)
    places = dict(zip(keys, arrived.tolist(), strict=True))
    held = [
        (node, *_held_by(activities, places[came, rank], late))
        for node, came, rank, late in last.head(_NUM_HELD).select("node", "came", "rank", "late_ns").iter_rows()
    ]
    spent = [f"late_{kind}_ns" for kind in KINDS]
    schema = dict.fromkeys(("node", *spent, "held_ns", "held_rank", "held_node"), pl.Int64)
    causes = pl.DataFrame(held, schema={**schema, "held_spent": pl.String}, orient="row")
    ops = graph.nodes.select(held_node="node", held_op="op", held_label="label")
    ops = ops.filter(pl.col("held_node").is_in(causes["held_node"].implode()))
    return (
        last.drop("came")
        .join(causes, on="node", how="left", maintain_order="left")
        .join(ops.collect(), on="held_node", how="left", maintain_order="left")
    )


def _held_by(activities: Activities, arrival: int, late_ns: int) -> tuple[int | str, ...]:
    """Say what led to an arrival while the last but one waited for it: ns of each kind, and the longest piece."""
    place, time = arrival, int(activities.end_ns[arrival])
    begin = time - late_ns
    spent = [0] * len(KINDS)
    longest = (0, int(activities.rank[arrival]), int(activities.node[arrival]), KINDS[int(activities.pause[arrival])])
    while place >= 0 and time > begin:
        for since, kind in (
            (int(activities.start_ns[place]), int(activities.kind[place])),
            (int(activities.ready_ns[place]), int(activities.pause[place])),
        ):
            until, time = time, max(min(since, time), begin)
            spent[kind] += until - time
            if until - time > longest[0]:
                longest = (until - time, int(activities.rank[place]), int(activities.node[place]), KINDS[kind])
        place = int(activities.cause[place])
    return (*spent, *longest)
