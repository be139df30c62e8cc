"""What leads to what between the activities of a step (`activities.py`): told by the graph, and inferred from times.

Three things are inferred, where the recording says that they happened and the graph has no edge for them.
Communications of one rank and group that did not overlap ran in turn. What a thread began after it had waited for a
communication (`waited_ns`) came after its end, if the wait fits into the thread's pause; and a receive that the program
waited for late ended after what it did before. A send that ended after its receiver arrived waited for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

CALL, OPERATOR, ARRIVAL, MEETING, END = range(5)  # parts of a node
COMPUTE, TRANSFER, WAITING, HOST = range(4)  # what time is spent at
KINDS = ("compute", "transfer", "waiting", "host")
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """What each thread ran, in its order.

    Attributes:
        at, start, end: [operators] sorted by lane and start.
        key: [operators] lane and start in one number, for searches.
        lane: [activities] the lane of each; of a communication the one that called it; -1 where it is unknown.
        origin: what times in keys are counted from.
        reach: more than the longest time.
    """

    at: Ints
    start: Ints
    end: Ints
    key: Ints
    lane: Ints
    origin: int
    reach: int

    @classmethod
    def build(cls, frame: pl.DataFrame) -> Lanes:
        """Take them from the activities, in `at` order; a communication's lane is found by `call_from`."""
        lane = frame.select(pl.struct("rank", "thread").rank("dense").cast(pl.Int64)).to_series().to_numpy().copy()
        lane[frame["thread"].is_null().to_numpy()] = -1
        start, end = frame["start"].to_numpy(), frame["end"].to_numpy()
        at = np.flatnonzero(lane >= 0)
        at = at[np.lexsort((start[at], lane[at]))]
        origin = int(start.min(initial=0))
        reach = int(end.max(initial=0)) - origin + 2
        key = lane[at] * reach + (start[at] - origin)
        return cls(at=at, start=start[at], end=end[at], key=key, lane=lane, origin=origin, reach=reach)

    def first_from(self, lane: Ints, time: Ints) -> Ints:
        """Return the places here of the first that each lane began at or after a time."""
        return np.searchsorted(self.key, lane * self.reach + (time - self.origin), "left")

    def is_of(self, place: Ints, lane: Ints) -> NDArray[np.bool_]:
        """Whether places are such, and of these lanes."""
        inside = (place >= 0) & (place < len(self.at)) & (lane >= 0)
        found = np.zeros(len(place), bool)
        found[inside] = self.lane[self.at[place[inside]]] == lane[inside]
        return found

    def went_on(self, at: Ints, since: Ints, until: Ints) -> NDArray[np.bool_]:
        """Whether the lanes of activities began anything else between two times."""
        lane = self.lane[at]
        place = self.first_from(lane, since)
        found = self.is_of(place, lane)
        found[found] = self.start[place[found]] < until[found]
        return found


def told_dependencies(frame: pl.DataFrame, edges: pl.DataFrame) -> Ints:
    """Return [edges, 2] places of activities: the graph's edges, and a communication's own."""
    operator = frame.filter(pl.col("part") == OPERATOR)
    calls = frame.filter(pl.col("part") == CALL)
    arrivals, ends = frame.filter(pl.col("part") == ARRIVAL), frame.filter(pl.col("part") == END)
    on_host = pl.concat([calls, operator.join(calls, on="node", how="anti")])
    flow, order = edges.filter(pl.col("kind") == "data"), edges.filter(pl.col("kind") == "order")
    found = [
        _join(flow, pl.concat([operator, ends]), pl.concat([operator, arrivals])),
        # Program order on a thread; of a communication's thread the graph does not tell.
        _join(order, pl.concat([on_host, ends]), pl.concat([on_host, arrivals]), same_thread=True),
        _device_order(order, operator, calls, on_host),
        calls.join(operator, on="node").select("at", "at_right").to_numpy(),
    ]
    meetings = frame.filter(pl.col("part") == MEETING).select("meet", "at", last="end")
    joint = arrivals.filter("is_joint").join(meetings, on="meet", suffix="_meet")
    found.append(joint.select("at", "at_meet").to_numpy())
    over = ends.join(meetings, on="meet", how="left", suffix="_meet").join(
        arrivals.select("node", "rank", came="at"), on=["node", "rank"]
    )
    found.append(over.select("came", "at").to_numpy())
    is_bound = pl.col("at_meet").is_not_null() & (pl.col("end") >= pl.col("last"))
    held = over.filter(is_bound & (pl.col("is_receive") | (pl.col("node") == pl.col("meet"))))
    found.append(held.select("at_meet", "at").to_numpy())
    return np.concatenate([part.astype(np.int64).reshape(-1, 2) for part in found])


def infer_dependencies(frame: pl.DataFrame, edges: pl.DataFrame, lanes: Lanes) -> Ints:
    """Return [edges, 2] places of activities; puts communications into the lanes that called them."""
    arrivals, ends = frame.filter(pl.col("part") == ARRIVAL), frame.filter(pl.col("part") == END)
    _find_callers(frame, edges, lanes)
    both = ends.join(arrivals.select("node", "rank", came="at", arrive="start"), on=["node", "rank"])
    turns = both.sort("rank", "group", "arrive", "node").with_columns(
        before=pl.col("at").shift().over("rank", "group"), done=pl.col("end").shift().over("rank", "group")
    )
    found = [turns.filter(pl.col("done") <= pl.col("arrive")).select("before", "came").to_numpy()]
    waited = both.filter(pl.col("waited").is_not_null())
    at, end, wait = (waited[name].to_numpy() for name in ("at", "end", "waited"))
    lane = lanes.lane[at]
    after = lanes.first_from(lane, end)
    held = lanes.is_of(after, lane) & (wait > 0)
    before = after - 1
    has_before = lanes.is_of(before, lane)
    idle_since = np.where(has_before, lanes.end[before], lanes.origin) if len(lanes.at) else after
    held[held] = (idle_since[held] <= end[held]) & (lanes.start[after[held]] - idle_since[held] >= wait[held])
    found.append(np.stack((at[held], lanes.at[after[held]]), axis=1))
    late = waited["is_receive"].to_numpy() & has_before
    late[late] = lanes.end[before[late]] <= end[late] - wait[late]
    found.append(np.stack((lanes.at[before[late]], at[late]), axis=1))
    meetings = frame.filter(pl.col("part") == MEETING).select("meet", met="at", last="end")
    sends = ends.join(meetings, on="meet").filter(
        ~pl.col("is_receive") & (pl.col("node") != pl.col("meet")) & (pl.col("end") >= pl.col("last"))
    )
    found.append(sends.select("met", "at").to_numpy())
    return np.concatenate([part.astype(np.int64).reshape(-1, 2) for part in found])


def _join(edges: pl.DataFrame, tails: pl.DataFrame, heads: pl.DataFrame, *, same_thread: bool = False) -> Ints:
    """Turn edges between nodes into those between activities of one rank."""
    joined = edges.select("src", "dst").join(
        tails.select(src="node", rank="rank", tail="at", thread="thread"), on="src"
    )
    joined = joined.join(heads.select(dst="node", rank="rank", head="at", other="thread"), on=["dst", "rank"])
    if same_thread:
        joined = joined.filter((pl.col("thread") == pl.col("other")).fill_null(value=True))
    return joined.select("tail", "head").to_numpy()


def _device_order(order: pl.DataFrame, operators: pl.DataFrame, calls: pl.DataFrame, on_host: pl.DataFrame) -> Ints:
    """Order on a stream, and what the host waited for: what led to what did not overlap with it."""
    kernels = operators.join(calls.select("node", caller="thread"), on="node")
    tails = kernels.select(src="node", rank="rank", tail="at", done="end", caller="caller")
    streams = order.join(tails, on="src").join(kernels.select(dst="node", rank="rank", head="at", begun="start"),
                                               on=["dst", "rank"])  # fmt: skip
    # Neighbours of one thread are chained as such: that the first's kernels were done need not have mattered.
    followed = on_host.sort("rank", "thread", "start").with_columns(
        previous=pl.col("node").shift().over("rank", "thread")
    )
    held = order.join(tails, on="src").join(
        followed.select(dst="node", rank="rank", head="at", begun="start", previous="previous"), on=["dst", "rank"]
    )
    held = held.filter(pl.col("previous").ne_missing(pl.col("src")))
    both = pl.concat([frame.select("tail", "head", "done", "begun") for frame in (streams, held)])
    return both.filter(pl.col("done") <= pl.col("begun")).select("tail", "head").to_numpy()


def _find_callers(frame: pl.DataFrame, edges: pl.DataFrame, lanes: Lanes) -> None:
    """Put communications into the lane of the operator before or after them in program order, or of the last one."""
    order = edges.filter(pl.col("kind") == "order")
    threads = frame.filter(pl.col("thread").is_not_null()).select(
        "node", "rank", caller=pl.Series(lanes.lane).gather(pl.Series(lanes.at).sort())
    )
    near = pl.concat(
        [
            order.select(node="dst", near="src").join(threads.rename({"node": "near"}), on="near"),
            order.select(node="src", near="dst").join(threads.rename({"node": "near"}), on="near"),
        ]
    )
    callers = near.group_by("node", "rank").agg(pl.col("caller").first())
    parts = (
        frame.filter(pl.col("part").is_in([ARRIVAL, END]))
        .select("node", "rank", "start", "at")
        .join(callers, on=["node", "rank"], how="left")
        .sort("rank", "start", "at")
        .with_columns(pl.col("caller").forward_fill().over("rank"))
        .drop_nulls("caller")
    )
    lanes.lane[parts["at"].to_numpy()] = parts["caller"].to_numpy()
