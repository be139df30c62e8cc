"""Who sent how much to whom. Messages say it; of a collective only what each rank gave is known."""

from __future__ import annotations

import polars as pl

from truedag.tracer.graph import Graph
from truedag.tracer.graph.class_dataset import ClassDataset
from truedag.tracer.views.page.class_rows import receivers_of
from truedag.tracer.views.page.figures import rank_of_most, weighted_mean
from truedag.tracer.views.page.leaves import Leaves
from truedag.tracer.views.page.tree import name_parts

PLACES = ("phase", "stage", "layer", "part")
_ENDS = ("parameter", "input", "output")


def message_traffic(graph: Graph) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return source, destination (ranks), num, bytes of messages; and source and destination (nodes) of each."""
    classes = graph.classes
    if classes is not None:
        pairs = classes.messages().sort("src", "dst").select(source="src", destination="dst")
        return _class_messages(classes), pairs
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


def _class_messages(classes: ClassDataset) -> pl.DataFrame:
    world = classes.world
    edges = classes.scan_classes("edges").filter(pl.col("kind") == "p2p")
    told = edges.group_by("rank_class", "team", "place").agg(num=pl.len(), bytes=pl.col("bytes").sum()).collect()
    pairs = []
    for rank_class, team, place, num, size in told.iter_rows():
        ranks = world.members[rank_class]
        receivers = receivers_of(world, ranks, team, place)
        pairs += [(one, other, num, size) for one, other in zip(ranks.tolist(), receivers.tolist(), strict=True)]
    schema = {"source": pl.Int64, "destination": pl.Int64, "num": pl.Int64, "bytes": pl.Int64}
    found = pl.DataFrame(pairs, schema=schema, orient="row")
    return found.group_by("source", "destination").agg(pl.col("num", "bytes").sum()).sort("source", "destination")


def collective_traffic(leaves: Leaves) -> pl.DataFrame:
    """Return group, kind (all-reduce, ...), rank, num, bytes (given by the rank), wait_ns, transfer_ns."""
    kinds = leaves.table.select("leaf", kind=pl.col("label").str.split(" ").list.first())
    wait = pl.col("start_ns") - pl.col("arrive_ns")
    transfer = pl.col("end_ns") - pl.col("start_ns")
    told = (
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
        .rename({"rank": "alike", "group": "told"})
        .with_columns(pl.col("alike").cast(pl.Int64))
    )
    return (
        told.join(leaves.ranks, on="alike")
        .join(leaves.groups, on=["rank", "told"], how="left")
        .with_columns(group=pl.coalesce("group", "told"))
        .select("group", "kind", "rank", "num", "bytes", "wait_ns", "transfer_ns")
        .sort("group", "kind", "rank")
    )


def stage_matrix(leaves: Leaves, spent: pl.DataFrame) -> pl.DataFrame:
    """Return PLACES, and over the ranks of each: mean_ns, max_ns, worst_rank, estimated_ns, wait_ns, sent_bytes, ...

    A place is a phase of a stage's layer; where no layer was told, of a part of the model (`tree.name_parts`).
    """
    told = leaves.table.with_columns(name_parts(leaves.table)).filter(~pl.col("kind").is_in(_ENDS))
    cells = told.select("leaf", *PLACES, "num_nodes", "flops")
    by_rank = spent.join(cells, on="leaf").group_by(*PLACES, "rank").agg(
        *(_known_sum(name) for name in ("time_ns", "estimated_ns", "wait_ns", "estimated_wait_ns")),
        sent_bytes=pl.col("sent_bytes").sum(),
    ).with_columns(pl.col("rank").cast(pl.Int64)).join(
        leaves.ranks.group_by(rank="alike").agg(weight=pl.len().cast(pl.Int64)), on="rank"
    ).sort("rank")  # fmt: skip
    counts = cells.group_by(PLACES).agg(pl.col("num_nodes", "flops").sum())
    return (
        by_rank.group_by(PLACES)
        .agg(
            mean_ns=weighted_mean("time_ns"),
            max_ns=pl.col("time_ns").max(),
            worst_rank=rank_of_most("time_ns"),
            estimated_ns=weighted_mean("estimated_ns"),
            estimated_max_ns=pl.col("estimated_ns").max(),
            wait_ns=weighted_mean("wait_ns"),
            estimated_wait_ns=weighted_mean("estimated_wait_ns"),
            sent_bytes=(pl.col("sent_bytes") * pl.col("weight")).sum(),
            num_ranks=pl.col("weight").sum(),
        )
        .join(counts, on=PLACES, nulls_equal=True)
        .sort("stage", "phase", "layer", "part")
    )


def _known_sum(name: str) -> pl.Expr:
    return pl.when(pl.col(name).is_not_null().any()).then(pl.col(name).sum())
