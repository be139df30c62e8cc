"""Times for the page: what each rank was at over time, and its shares.

The shares are those of the report (analysis/shares.py), in which a moment of a step counts once, as the first of these
that it is: compute, transfer, waiting, the pipeline's bubble; else the host's. Estimates count as well, and are marked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.analysis.shares import find_spans, measure_steps, share_time
from truedag.tracer.analysis.spans import Spans, union
from truedag.tracer.graph import Graph
from truedag.tracer.graph.one_of_each import OneOfEach
from truedag.tracer.views.page.leaves import Leaves

_MOST_CELLS = 1 << 19
_MOST_BINS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupation:
    """What ranks were at; times from the first start to the last end of any rank.

    Attributes:
        start_ns, end_ns: that window, on the graph's clock.
        bins: [4, ranks, bins] uint8: how much of a bin was compute, transfer, waiting, bubble, of 255.
        spent_ns: [6, ranks] float64: compute, transfer, waiting, bubble, host, and what transfer was hidden by compute,
            in all steps; NaN is unknown.
        is_estimated: whether any of these times is an estimate.
    """

    start_ns: int
    end_ns: int
    bins: NDArray[np.uint8]
    spent_ns: NDArray[np.float64]
    is_estimated: bool


def occupy(graph: Graph, leaves: Leaves) -> Occupation | None:
    """Return it; None where nothing has a time."""
    timed = leaves.parts.filter(pl.col("timing") != "none").drop_nulls(["start_ns", "end_ns"])
    if timed.is_empty():
        return None
    first = timed.select(pl.min_horizontal(pl.col("start_ns").min(), pl.col("arrive_ns").min())).item()
    start, end = int(first), int(timed["end_ns"].max())  # type: ignore[arg-type]
    # Ranks of a class spend their time alike.
    graph = graph if graph.classes is None else Graph(OneOfEach(graph.classes))
    told = graph.nodes.select("node", "kind", "rank", "step", "start_ns", "end_ns", "timing").collect()
    is_estimate = pl.col("timing") == "estimated"
    nodes = told.with_columns(timing=pl.when(is_estimate).then(pl.lit("measured")).otherwise("timing"))
    participants, ranks = graph.participants.collect(), graph.ranks.sort("rank").collect()
    messages = graph.edges.filter(pl.col("kind") == "p2p").select("src", "dst").collect()
    spans = find_spans(nodes, participants, messages, graph.groups.collect(), ranks, in_part=True)
    shares, _ = share_time(spans, ranks, measure_steps(nodes, participants))
    windows = measure_steps(nodes, participants, with_rest=True)  # the map shows what ran between the steps as well
    stretches = union(np.array(sorted(windows.values()), np.int64).reshape(-1, 2)).tolist()
    num_bins = int(np.clip(_MOST_CELLS // max(len(leaves.ranks), 1), 64, _MOST_BINS))
    edges = np.linspace(start, end, num_bins + 1)
    bins = np.zeros((4, len(ranks), num_bins), np.uint8)
    spent = np.full((6, len(ranks)), np.nan)
    seen, whole = set(timed["rank"].unique().to_list()), _untimed_ranks(leaves)
    for place, share in enumerate(shares):
        own = spans[share.rank]
        if own is None or share.rank not in seen:
            continue
        layers = zip(*(own.layers(low, high) for low, high in stretches), strict=True)
        covered = [_cover(np.concatenate(layer), edges) for layer in layers]
        parts = np.diff(covered, axis=1, n=1) / np.diff(edges)
        bins[:, place] = np.rint(255 * np.maximum(np.diff(parts, axis=0, prepend=0), 0))
        if share.rank not in whole and share.parts is not None:
            spent[:, place] = (*share.parts, share.overlap_ns)
    of_rank = np.searchsorted(ranks["rank"].to_numpy(), leaves.ranks.sort("rank")["like"].to_numpy())
    return Occupation(
        start_ns=start, end_ns=end, bins=bins[:, of_rank], spent_ns=spent[:, of_rank],
        is_estimated=bool(told.select(is_estimate.any()).item()),
    )  # fmt: skip


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
