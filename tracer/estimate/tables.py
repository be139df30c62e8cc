"""The tables that an estimate is made of, and the times that it writes back: of a class graph, or of all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from truedag.tracer.estimate.simulation import Simulated
from truedag.tracer.graph.class_dataset import FORM
from truedag.tracer.graph.class_sizes import SIZE_TABLES
from truedag.tracer.graph.dataset import Dataset

_RUNNING = ("compute", "collective", "send", "recv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """A graph as the simulation takes it: rows of classes. In a graph of all ranks each rank is a class."""

    nodes: pl.DataFrame
    """Beside their columns `flops_of_all`: of all that a row stands for."""

    edges: pl.DataFrame
    parts: pl.DataFrame
    groups: pl.DataFrame
    ranks: pl.DataFrame
    num_ranks: Mapping[int, int]
    """By class."""


def read_tables(folder: Path) -> Tables:
    """Read a graph. Of ranks of a class that have sizes of their own, the largest of each node is taken.

    Raises:
        GraphError: there is none, or it is of another format version.
    """
    dataset = Dataset.open(folder)
    if dataset.meta.get("form") == FORM:
        return _of_classes(folder)
    return _of_ranks(dataset)


def _of_classes(folder: Path) -> Tables:
    nodes, edges, parts, groups, ranks = (
        pl.read_parquet(folder / f"{name}.parquet") for name in ("nodes", "edges", "participants", "groups", "ranks")
    )
    nodes = nodes.with_columns(flops_of_all=pl.col("flops") * pl.col("num"))
    own = folder / f"{SIZE_TABLES['nodes']}.parquet"
    if own.exists():
        sizes = pl.read_parquet(own).drop_nulls("flops")
        more = sizes["flops"] - nodes["flops"].gather(sizes["row"])
        added = np.zeros(len(nodes), np.int64)
        np.add.at(added, sizes["row"].to_numpy(), more.to_numpy())
        nodes = nodes.with_columns(pl.col("flops_of_all") + pl.Series(added))
    return Tables(
        nodes=_largest(folder, "nodes", nodes, ("flops", "bytes_read", "bytes_written")),
        edges=edges,
        parts=_largest(folder, "participants", parts, ("send_bytes", "recv_bytes")),
        groups=groups,
        ranks=ranks,
        num_ranks=dict(ranks["rank_class"].value_counts().iter_rows()),
    )


def _largest(folder: Path, table: str, frame: pl.DataFrame, columns: tuple[str, ...]) -> pl.DataFrame:
    path = folder / f"{SIZE_TABLES[table]}.parquet"
    if not path.exists():
        return frame
    most = pl.read_parquet(path).group_by("row").agg(pl.col(name).max().alias(f"{name}_most") for name in columns)
    joined = frame.with_row_index("row").with_columns(pl.col("row").cast(pl.Int64))
    joined = joined.join(most, on="row", how="left", maintain_order="left")
    return joined.with_columns(pl.max_horizontal(name, f"{name}_most").alias(name) for name in columns).select(
        frame.columns
    )


def _of_ranks(dataset: Dataset) -> Tables:
    nodes, edges, parts, groups, ranks = (
        dataset.scan(name).collect() for name in ("nodes", "edges", "participants", "groups", "ranks")
    )
    return Tables(
        nodes=nodes.with_columns(rank_class=pl.col("rank"), flops_of_all=pl.col("flops")),
        edges=_edges_of_ranks(nodes, edges, parts),
        parts=parts.with_columns(rank_class=pl.col("rank"), team=pl.col("group")),
        groups=groups.with_columns(team=pl.col("group")),
        ranks=ranks,
        num_ranks=dict.fromkeys(ranks["rank"].to_list(), 1),
    )


def _edges_of_ranks(nodes: pl.DataFrame, edges: pl.DataFrame, parts: pl.DataFrame) -> pl.DataFrame:
    """Say whose each edge is; one between two collectives is an edge of every rank that takes part in both."""
    rank = nodes.select("node", "rank")
    told = edges.join(rank.rename({"node": "src", "rank": "before"}), on="src", maintain_order="left")
    told = told.join(rank.rename({"node": "dst", "rank": "after"}), on="dst", maintain_order="left")
    told = told.with_columns(rank_class=pl.when(pl.col("before") >= 0).then("before").otherwise("after"))
    met = parts.select("node", "rank")
    joint = told.filter(pl.col("rank_class") < 0).drop("rank_class")
    joint = joint.join(met.rename({"node": "src", "rank": "rank_class"}), on="src")
    joint = joint.join(met.rename({"node": "dst", "rank": "rank_class"}), on=["dst", "rank_class"])
    own = told.filter(pl.col("rank_class") >= 0)
    return pl.concat([own, joint.select(own.columns)]).drop("before", "after")


def write_times(folder: Path, tables: Tables, found: Simulated) -> None:
    """Write what was simulated into a graph's tables, marked as estimated.

    Args:
        folder: the graph's.
        tables: that were simulated.
        found: when what began and ended.
    """
    dataset = Dataset.open(folder)
    times = {"start_ns": found.start_ns, "end_ns": found.end_ns}
    whole = {name: np.rint(values).astype(np.int64) for name, values in times.items()}
    node = tables.nodes["node"].to_numpy()
    for path in dataset.files("nodes"):
        frame = pl.read_parquet(path)
        rows = np.searchsorted(node, frame["node"].to_numpy())
        runs = pl.col("kind").is_in(_RUNNING)
        frame = frame.with_columns(
            *(pl.when(runs).then(pl.Series(values[rows])).alias(name) for name, values in whole.items()),
            timing=pl.when(runs).then(pl.lit("estimated")).otherwise(pl.lit("none")),
        )
        frame.write_parquet(path, compression="zstd", compression_level=1)
    (path,) = dataset.files("participants")
    frame = pl.read_parquet(path)
    rows = np.searchsorted(node, frame["node"].to_numpy())
    arrived = [
        round(found.arrive_ns.get((row, rank_class), 0.0))
        for row, rank_class in zip(rows.tolist(), tables.parts["rank_class"].to_list(), strict=True)
    ]
    frame.with_columns(
        pl.Series("arrive_ns", arrived, dtype=pl.Int64),
        *(pl.Series(name, values[rows]) for name, values in whole.items()),
    ).write_parquet(path, compression="zstd", compression_level=1)
