"""What each node of the tree stands for: how many, how long on which rank, how many bytes, measured or estimated.

A node's time on a rank is the sum over all its calls there; the mean and the maximum are over the ranks that ran it.
A communication's time on a rank is from the last arrival to its end there; waiting for that arrival is apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.views.page.leaves import Leaves
from truedag.tracer.views.page.rows import COMMUNICATIONS
from truedag.tracer.views.page.tree import Tree

_SUMS = ("num_nodes", "num_measured", "num_estimated", "flops", "bytes_read", "bytes_written")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One row for each node of the tree.

    Attributes:
        table: num_nodes, num_measured, num_estimated, num_communications, flops, bytes_read, bytes_written, sent_bytes;
            ranks, microbatches (lists); mean_ns, max_ns, worst_rank of measured times on a rank, and wait_mean_ns,
            wait_max_ns, wait_rank; call_mean_ns, call_max_ns, call_rank of single calls; of estimated times
            estimated_mean_ns, estimated_max_ns, estimated_rank and estimated_wait_mean_ns, estimated_wait_max_ns,
            estimated_wait_rank. Null is unknown.
    """

    table: pl.DataFrame


def on_ranks(leaves: Leaves) -> pl.DataFrame:
    """Return what each leaf took on each rank: leaf, rank, calls, time_ns, estimated_ns, wait_ns, sent_bytes, ..."""
    duration = pl.col("end_ns") - pl.col("start_ns")
    measured = duration.filter(pl.col("timing") == "measured")
    estimated = duration.filter(pl.col("timing") == "estimated")
    waited = pl.col("start_ns") - pl.col("arrive_ns")
    return leaves.parts.group_by("leaf", "rank").agg(
        calls=pl.len().cast(pl.Int64),
        timed=measured.count().cast(pl.Int64),
        time_ns=_known_sum(measured),
        call_max_ns=measured.max(),
        estimated_ns=_known_sum(estimated),
        wait_ns=_known_sum(waited.filter(pl.col("timing") == "measured")),
        estimated_wait_ns=_known_sum(waited.filter(pl.col("timing") == "estimated")),
        sent_bytes=pl.col("bytes").sum(),
    )


def measure(leaves: Leaves, tree: Tree, spent: pl.DataFrame) -> Figures:
    """Add up; `spent` is what `on_ranks` returns."""
    count = len(tree.name)
    ancestors = _ancestors(tree, len(leaves.table))
    wide = spent.join(ancestors, on="leaf").drop("leaf")
    by_rank = wide.group_by("at", "rank").agg(
        pl.col("calls", "timed", "sent_bytes").sum(),
        *(_known_sum(pl.col(name)).alias(name) for name in ("time_ns", "estimated_ns", "wait_ns", "estimated_wait_ns")),
        pl.col("call_max_ns").max(),
    )
    alike = leaves.ranks.sort("rank").group_by("alike").agg(others="rank")
    by_rank = by_rank.with_columns(pl.col("rank").cast(pl.Int64)).join(
        alike.select(rank="alike", weight=pl.col("others").list.len().cast(pl.Int64)), on="rank"
    )
    ranked = by_rank.sort("rank").group_by("at").agg(
        *_over_ranks("time_ns", "mean_ns", "max_ns", "worst_rank"),
        *_over_ranks("wait_ns", "wait_mean_ns", "wait_max_ns", "wait_rank"),
        *_over_ranks("estimated_ns", "estimated_mean_ns", "estimated_max_ns", "estimated_rank"),
        *_over_ranks("estimated_wait_ns", "estimated_wait_mean_ns", "estimated_wait_max_ns", "estimated_wait_rank"),
        alike=pl.col("rank"),
        call_mean_ns=(pl.col("time_ns") * pl.col("weight")).sum() / (pl.col("timed") * pl.col("weight")).sum(),
        call_max_ns=pl.col("call_max_ns").max(),
        call_rank=rank_of_most("call_max_ns"),
        sent_bytes=(pl.col("sent_bytes") * pl.col("weight")).sum(),
    )  # fmt: skip
    ranked = ranked.join(_list_ranks(ranked["alike"], alike), on="alike").drop("alike")
    is_communication = pl.col("kind").is_in(COMMUNICATIONS)
    summed = (
        leaves.table.with_columns(num_communications=pl.when(is_communication).then("num_nodes").otherwise(0))
        .join(ancestors, on="leaf")
        .group_by("at")
        .agg(pl.col(*_SUMS, "num_communications").sum())
    )
    batches = (
        leaves.parts.select("leaf", "microbatch").unique().join(ancestors, on="leaf").filter(pl.col("microbatch") >= 0)
        .group_by("at").agg(microbatches=pl.col("microbatch").unique().sort().cast(pl.Int64))
    )  # fmt: skip
    table = pl.DataFrame({"at": np.arange(count)})
    for frame in (summed, ranked, batches):
        table = table.join(frame, on="at", how="left", maintain_order="left")
    return Figures(table=table)


def _over_ranks(column: str, mean: str, most: str, worst: str) -> list[pl.Expr]:
    value = pl.col(column)
    return [
        weighted_mean(column).alias(mean),
        value.max().alias(most),
        rank_of_most(column).alias(worst),
    ]


def rank_of_most(column: str) -> pl.Expr:
    """The rank with the most, the lowest of several; null where nobody's is known. Rows are sorted by rank."""
    by_value = pl.col("rank").sort_by(column, descending=True, nulls_last=True, maintain_order=True)
    return pl.when(pl.col(column).is_not_null().any()).then(by_value.first())


def weighted_mean(column: str) -> pl.Expr:
    """The mean over all ranks that `weight` counts, of those where it is known."""
    value, weight = pl.col(column), pl.col("weight")
    is_known = value.is_not_null()
    return pl.when(is_known.any()).then((value * weight).sum() / weight.filter(is_known).sum())


def _list_ranks(lists: pl.Series, alike: pl.DataFrame) -> pl.DataFrame:
    """Return alike (lists of ranks that stand for others) and ranks (all of these)."""
    others = dict(alike.iter_rows())
    known = lists.unique()
    told = [sorted(rank for one in some for rank in others[one]) for some in known.to_list()]
    return pl.DataFrame({"alike": known, "ranks": told}, schema_overrides={"ranks": pl.List(pl.Int64)})


def _ancestors(tree: Tree, num_leaves: int) -> pl.DataFrame:
    """Return leaf and at: each leaf with its own node and every node that it is in."""
    leaf_of = np.empty(num_leaves, np.int64)
    leaf_of[tree.order] = np.arange(num_leaves)
    at: NDArray[np.int64] = tree.leaf_node
    leaf = leaf_of
    pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    while len(at):
        pairs.append((leaf, at))
        up = tree.parent[at]
        inside = up >= 0
        leaf, at = leaf[inside], up[inside]
    joined = [np.concatenate(part) for part in zip(*pairs, strict=True)] if pairs else [at, at]
    return pl.DataFrame({"leaf": joined[0], "at": joined[1]})


def _known_sum(values: pl.Expr) -> pl.Expr:
    return pl.when(values.is_not_null().any()).then(values.sum())
