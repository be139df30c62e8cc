"""Who sent how much to whom. Messages say it; of a collective only what each rank gave is known."""

from __future__ import annotations

import polars as pl

from truedag.tracer.graph import Graph
from truedag.tracer.views.page.leaves import Leaves


def message_traffic(graph: Graph) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return source, destination (ranks), num, bytes of messages; and source and destination (nodes) of each."""
    pairs = graph.edges.filter(pl.col("kind") == "p2p").select("src", "dst", "bytes").sort("src", "dst").collect()
    places = graph.nodes.filter(pl.col("kind").is_in(["send", "recv"])).select("node", "rank").collect()
    traffic = (
        pairs.join(places.rename({"node": "src", "rank": "source"}), on="src")
        .join(places.rename({"node": "dst", "rank": "destination"}), on="dst")
        .group_by("source", "destination")
        .agg(num=pl.len(), bytes=pl.col("bytes").sum())
        .sort("source", "destination")
    )
    return traffic, pairs.select(source="src", destination="dst")


def collective_traffic(leaves: Leaves) -> pl.DataFrame:
    """Return group, kind (all-reduce, ...), rank, num, bytes (given by the rank), wait_ns, transfer_ns."""
    kinds = leaves.table.select("leaf", kind=pl.col("label").str.split(" ").list.first())
    wait = pl.col("start_ns") - pl.col("arrive_ns")
    transfer = pl.col("end_ns") - pl.col("start_ns")
    return (
        leaves.parts.filter(pl.col("kind") == "collective")
        .drop("kind")
        .join(kinds, on="leaf")
        .group_by("group", "kind", "rank")
        .agg(
            num=pl.len().cast(pl.Int64),
            bytes=pl.col("bytes").sum(),
            wait_ns=pl.when(wait.is_not_null().all()).then(wait.sum()),
            transfer_ns=pl.when(transfer.is_not_null().all()).then(transfer.sum()),
        )
        .sort("group", "kind", "rank")
    )


def stage_matrix(leaves: Leaves, spent: pl.DataFrame) -> pl.DataFrame:
    """Return phase, stage, layer, and over the ranks of each: mean_ns, max_ns, worst_rank, wait_ns, sent_bytes, ..."""
    told = leaves.table.filter(~pl.col("kind").is_in(["parameter", "input", "output"]))
    cells = told.select("leaf", "phase", "stage", "layer", "num_nodes")
    by_rank = spent.join(cells, on="leaf").group_by("phase", "stage", "layer", "rank").agg(
        time_ns=_known_sum("time_ns"), estimated_ns=_known_sum("estimated_ns"), wait_ns=_known_sum("wait_ns"),
        sent_bytes=pl.col("sent_bytes").sum(),
    )  # fmt: skip
    counts = cells.group_by("phase", "stage", "layer").agg(pl.col("num_nodes").sum())
    return (
        by_rank.group_by("phase", "stage", "layer")
        .agg(
            mean_ns=pl.col("time_ns").mean(),
            max_ns=pl.col("time_ns").max(),
            worst_rank=pl.col("rank").sort_by("time_ns", nulls_last=False).last(),
            estimated_ns=pl.col("estimated_ns").mean(),
            wait_ns=pl.col("wait_ns").mean(),
            sent_bytes=pl.col("sent_bytes").sum(),
            num_ranks=pl.len().cast(pl.Int64),
        )
        .join(counts, on=["phase", "stage", "layer"], nulls_equal=True)
        .sort("stage", "phase", "layer")
    )


def _known_sum(name: str) -> pl.Expr:
    return pl.when(pl.col(name).is_not_null().any()).then(pl.col(name).sum())
