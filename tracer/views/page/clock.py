"""Times for the page: what each rank was at over time, its shares, and every slice of its lanes.

A moment counts once, as the first of these that it is: compute, transfer, waiting; else idle. The report tells more
apart (analysis/shares.py): waiting for another stage is a bubble there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.analysis.spans import Spans, length, union
from truedag.tracer.views.page.leaves import Leaves
from truedag.tracer.views.page.rows import COMMUNICATIONS
from truedag.tracer.views.page.tree import Tree

_MOST_CELLS = 1 << 19
_MOST_BINS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupation:
    """What ranks were at; times from the first start to the last end of any rank.

    Attributes:
        start_ns, end_ns: that window, on the graph's clock.
        bins: [3, ranks, bins] uint8: how much of a bin was compute, transfer, waiting, of 255.
        spent_ns: [5, ranks] float64: compute, transfer, waiting, idle, and compute that hid transfer; NaN is unknown.
        is_estimated: whether any of these times is an estimate.
    """

    start_ns: int
    end_ns: int
    bins: NDArray[np.uint8]
    spent_ns: NDArray[np.float64]
    is_estimated: bool


def occupy(leaves: Leaves, ranks: list[int]) -> Occupation | None:
    """Return it; None where nothing has a time."""
    timed = leaves.parts.filter(pl.col("timing") != "none").drop_nulls(["start_ns", "end_ns"])
    if timed.is_empty():
        return None
    first = timed.select(pl.min_horizontal(pl.col("start_ns").min(), pl.col("arrive_ns").min())).item()
    start, end = int(first), int(timed["end_ns"].max())  # type: ignore[arg-type]
    num_bins = int(np.clip(_MOST_CELLS // max(len(ranks), 1), 64, _MOST_BINS))
    edges = np.linspace(start, end, num_bins + 1)
    bins = np.zeros((3, len(ranks), num_bins), np.uint8)
    spent = np.full((5, len(ranks)), np.nan)
    whole = _untimed_ranks(leaves)
    parts = timed.select("rank", "kind", "arrive_ns", "start_ns", "end_ns").partition_by("rank", as_dict=True)
    for place, rank in enumerate(ranks):
        own = parts.get((rank,))
        if own is None:
            continue
        is_communication = pl.col("kind").is_in(COMMUNICATIONS)
        compute = union(_spans(own.filter(~is_communication), "start_ns"))
        met = own.filter(is_communication)
        moved = union(_spans(met, "start_ns"))
        busy = union(np.concatenate((compute, moved)))
        reached = union(np.concatenate((busy, _spans(met, "arrive_ns"))))
        covered = [_cover(spans, edges) for spans in (compute, busy, reached)]
        shares = np.diff(covered, axis=1) / np.diff(edges)
        bins[0, place] = np.rint(255 * shares[0])
        bins[1, place] = np.rint(255 * np.maximum(shares[1] - shares[0], 0))
        bins[2, place] = np.rint(255 * np.maximum(shares[2] - shares[1], 0))
        if rank not in whole:
            lengths = [length(spans) for spans in (compute, busy, reached, moved)]
            spent[:, place] = (
                lengths[0], lengths[1] - lengths[0], lengths[2] - lengths[1], end - start - lengths[2],
                lengths[0] + lengths[3] - lengths[1],
            )  # fmt: skip
    return Occupation(
        start_ns=start,
        end_ns=end,
        bins=bins,
        spent_ns=spent,
        is_estimated=bool((timed["timing"] == "estimated").any()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slices:
    """Every timed operator and every rank's part in a communication, by rank, lane and start.

    Attributes:
        table: rank, lane, node, leaf (its place in the walk), microbatch, wait, start, span (in ticks from the
            window's start; of a communication from the last arrival on, `wait` before it), is_estimated.
        tick_ns: how long a tick is.
    """

    table: pl.DataFrame
    tick_ns: int


def cut_slices(leaves: Leaves, tree: Tree, start_ns: int, end_ns: int) -> Slices:
    """List them."""
    tick = max(1, -(-(end_ns - start_ns) // ((1 << 32) - 2)))
    begin = pl.coalesce("start_ns", "arrive_ns")
    table = (
        leaves.parts.filter(pl.col("timing") != "none")
        .drop_nulls("end_ns")
        .filter(begin.is_not_null())
        .select(
            "rank", "lane", "node", "leaf", "microbatch",
            start=(begin - start_ns) // tick,
            span=pl.max_horizontal(pl.col("end_ns") - begin, 0) // tick,
            wait=pl.max_horizontal((begin - pl.col("arrive_ns")).fill_null(0), 0) // tick,
            is_estimated=(pl.col("timing") == "estimated").cast(pl.UInt8),
        )
        .sort("rank", "lane", "start", "node")
    )  # fmt: skip
    table = table.with_columns(leaf=pl.Series(tree.order[table["leaf"].to_numpy()]))
    return Slices(table=table, tick_ns=tick)


def _untimed_ranks(leaves: Leaves) -> set[int]:
    """Ranks with an operator or a communication of unknown time: their shares are unknown."""
    runs = leaves.parts.filter(~pl.col("kind").is_in(["parameter", "input", "output"]))
    unknown = runs.filter(pl.col("end_ns").is_null() | pl.col("start_ns").is_null() | (pl.col("timing") == "none"))
    return set(unknown["rank"].unique().to_list())


def _cover(spans: Spans, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how much of disjoint spans lies before each edge."""
    if not len(spans):
        return np.zeros(len(edges))
    lengths = spans[:, 1] - spans[:, 0]
    before = np.concatenate(([0], np.cumsum(lengths)))
    times = spans.reshape(-1)
    reached = np.stack((before[:-1], before[1:]), axis=1).reshape(-1)
    covered: NDArray[np.float64] = np.interp(edges, times, reached, left=0.0, right=float(before[-1]))
    return covered


def _spans(frame: pl.DataFrame, begin: str) -> Spans:
    columns = frame.select(pl.col(begin).cast(pl.Int64), pl.col("end_ns").cast(pl.Int64))
    spans: Spans = columns.drop_nulls().to_numpy().reshape(-1, 2)
    return spans
