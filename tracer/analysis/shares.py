"""How each rank spent a step: computing, moving data, waiting for others, and none of these.

All from unions of intervals on a rank, over all its threads, within the step: from the first start to the last end of
any rank. Communication runs beside computation (on a backend's threads, on a stream), so a moment counts once, as the
first of these that it is: compute, if an operator runs; transfer, if data can move in a communication; waiting, if it
is in a communication that another rank has not entered; idle otherwise (the host's own work is here). The four add up
to the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

Spans = NDArray[np.int64]  # [n, 2]: begin and end


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShares:
    """One rank's time in all recorded steps, in ns; None is unknown.

    Attributes:
        rank: the rank.
        stage: its pipeline stage, None if none was told.
        compute_ns: an operator ran.
        transfer_ns: no operator ran, and data could move.
        waiting_ns: neither, and it waited in a communication for another rank.
        idle_ns: none of these.
        overlap_ns: data could move while an operator ran; a part of compute_ns.
    """

    rank: int
    stage: int | None
    compute_ns: int | None
    transfer_ns: int | None
    waiting_ns: int | None
    idle_ns: int | None
    overlap_ns: int | None


def measure_steps(nodes: pl.DataFrame, participants: pl.DataFrame) -> dict[int, tuple[int, int]]:
    """Return each step's first start and last end over all ranks, in ns; a step without a measurement is left out."""
    spans = _measured(nodes).select("step", "start_ns", "end_ns")
    ends = participants.join(nodes.select("node", "step"), on="node").select("step", "arrive_ns", "end_ns")
    both = pl.concat([spans, ends.rename({"arrive_ns": "start_ns"})]).drop_nulls()
    rows = both.group_by("step").agg(pl.col("start_ns").min(), pl.col("end_ns").max()).sort("step")
    return {step: (start, end) for step, start, end in rows.iter_rows()}


def share_time(nodes: pl.DataFrame, participants: pl.DataFrame, ranks: pl.DataFrame) -> list[RankShares]:
    """Split each rank's steps into compute, transfer, waiting and idle.

    A rank with an operator or a communication of unknown time has unknown shares.
    """
    steps = measure_steps(nodes, participants)
    window = np.array(sorted(steps.values()), np.int64).reshape(-1, 2)
    total = length(union(window))
    shares = []
    for rank, stage in ranks.sort("rank").select("rank", "pp").iter_rows():
        own = nodes.filter((pl.col("rank") == rank) & (pl.col("kind") == "compute"))
        met = participants.filter(pl.col("rank") == rank)
        whole = met.drop_nulls(["start_ns", "end_ns"])
        is_known = len(window) > 0 and len(_measured(own)) == len(own) and len(whole) == len(met)
        if not is_known:
            shares.append(_unknown(rank, stage))
            continue
        compute = _clip(_spans(own, "start_ns", "end_ns"), window)
        transfer = _clip(_spans(met, "start_ns", "end_ns"), window)
        waiting = _clip(_spans(met, "arrive_ns", "start_ns"), window)
        busy = np.concatenate((compute, transfer))
        computed, moved = length(union(compute)), length(union(transfer))
        active = length(union(busy))
        reached = length(union(np.concatenate((busy, waiting))))
        shares.append(
            RankShares(
                rank=rank,
                stage=stage if stage >= 0 else None,
                compute_ns=computed,
                transfer_ns=active - computed,
                waiting_ns=reached - active,
                idle_ns=total - reached,
                overlap_ns=computed + moved - active,
            )
        )
    return shares


def union(spans: Spans) -> Spans:
    """Join spans that touch or overlap; the result is sorted and disjoint."""
    spans = spans[spans[:, 1] > spans[:, 0]]
    if len(spans) == 0:
        return spans
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    reach = np.maximum.accumulate(spans[:, 1])
    first = np.concatenate(([True], spans[1:, 0] > reach[:-1]))
    begins = np.flatnonzero(first)
    last = np.concatenate((begins[1:] - 1, [len(spans) - 1]))
    return np.stack((spans[begins, 0], reach[last]), axis=1)


def length(spans: Spans) -> int:
    """Add up disjoint spans."""
    return int((spans[:, 1] - spans[:, 0]).sum())


def _clip(spans: Spans, window: Spans) -> Spans:
    """Cut spans to the steps; what lies between steps is dropped."""
    parts = [np.clip(spans, low, high) for low, high in union(window)]
    return np.concatenate(parts) if parts else spans[:0]


def _spans(frame: pl.DataFrame, begin: str, end: str) -> Spans:
    return frame.select(pl.col(begin).cast(pl.Int64), pl.col(end).cast(pl.Int64)).drop_nulls().to_numpy().reshape(-1, 2)


def _measured(nodes: pl.DataFrame) -> pl.DataFrame:
    return nodes.filter(pl.col("timing") == "measured").drop_nulls(["start_ns", "end_ns"])


def _unknown(rank: int, stage: int) -> RankShares:
    return RankShares(
        rank=rank,
        stage=stage if stage >= 0 else None,
        compute_ns=None,
        transfer_ns=None,
        waiting_ns=None,
        idle_ns=None,
        overlap_ns=None,
    )
