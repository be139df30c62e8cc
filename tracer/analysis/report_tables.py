"""What the report reads of a graph: its nodes and participants, or rows of a class graph that stand for many of them.

A class graph has no measured times, so that nothing of a report depends on which of the ranks that are alike a row is
of; what does depend on the rank (whose experts, which tokens) is read for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from truedag.tracer.analysis.memory import RankMemory, measure_memory
from truedag.tracer.graph import Graph
from truedag.tracer.graph.one_of_each import OneOfEach

_NODES = ("node", "kind", "rank", "op", "label", "phase", "step", "microbatch", "decode_step", "layer", "expert",
          "start_ns", "end_ns", "timing", "flops")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTables:
    """Rows and what they stand for.

    Attributes:
        nodes: the columns that the report needs, and num, how many nodes a row stands for.
        participants: as in the dataset, and num, how many a row stands for.
        groups: group, axis, ranks, size (of the group) and num (how many groups a row stands for).
        ranks: all of the graph.
        messages: src and dst of rows.
        num_edges: by kind.
        memory: of each rank.
        nodes_where: the nodes, one by one and of every rank, of rows for which a condition holds.
    """

    nodes: pl.DataFrame
    participants: pl.DataFrame
    groups: pl.DataFrame
    ranks: pl.DataFrame
    messages: pl.DataFrame
    num_edges: Mapping[str, int]
    memory: tuple[RankMemory, ...]
    nodes_where: Callable[[pl.Expr], pl.LazyFrame]


def read_tables(graph: Graph) -> ReportTables:
    """Read a graph for its report; of a class graph whose ranks of a class have equal sizes only its rows."""
    rows = graph if graph.classes is None else Graph(OneOfEach(graph.classes))
    one = pl.lit(1, pl.Int64)
    tables = ReportTables(
        nodes=rows.nodes.select(*_NODES, num=one).collect(),
        participants=rows.participants.with_columns(num=one).collect(),
        groups=rows.groups.with_columns(size=pl.col("ranks").list.len(), num=one).collect(),
        ranks=graph.ranks.collect(),
        messages=rows.edges.filter(pl.col("kind") == "p2p").select("src", "dst").unique().collect(),
        num_edges=dict(rows.edges.group_by("kind").len().collect().iter_rows()),
        memory=tuple(_measure_memory(rows)),
        nodes_where=graph.nodes.filter,
    )
    return tables if graph.classes is None else _weigh(tables, OneOfEach(graph.classes))


def _weigh(tables: ReportTables, one: OneOfEach) -> ReportTables:
    """Say how many of the whole graph each row of one rank of each class stands for."""
    classes, world = one.classes, one.classes.world
    nodes = classes.scan_classes("nodes").select("node", "num").collect()
    sizes = {low: len(members) for low, members in zip(world.lowest, world.members, strict=True)}
    told = [(team, len(ranks), ranks.shape[1]) for team, ranks in enumerate(world.ranks)]
    schema: dict[str, Any] = {"group": tables.groups.schema["group"], "num": pl.Int64, "size": pl.Int64}
    teams = pl.DataFrame(told, schema=schema, orient="row")
    of_class = {world.rank_class[known.rank]: known for known in tables.memory}
    alike = [(rank, of_class[number]) for rank, number in enumerate(world.rank_class) if number in of_class]
    peaks = np.array([0 if known.peak_node is None else known.peak_node for _, known in alike], np.int64)
    moved = one.in_whole(peaks, np.array([rank for rank, _ in alike], np.int64)).tolist()
    memory = [
        replace(known, rank=rank, peak_node=None if known.peak_node is None else peak)
        for (rank, known), peak in zip(alike, moved, strict=True)
    ]
    return replace(
        tables,
        nodes=tables.nodes.drop("num").join(nodes, on="node", maintain_order="left"),
        participants=tables.participants.with_columns(num=pl.col("rank").replace_strict(sizes, return_dtype=pl.Int64)),
        groups=tables.groups.drop("num", "size").join(teams, on="group", maintain_order="left"),
        num_edges=classes.count_edges(),
        memory=tuple(memory),
        nodes_where=classes.scan_where,
    )


def _measure_memory(graph: Graph) -> list[RankMemory]:
    nodes = graph.nodes.select("node", "kind", "rank", "label", "phase").collect()
    sources = graph.nodes.filter(pl.col("kind").is_in(["parameter", "input"])).select("rank", "kind", "outputs")
    data = graph.edges.filter(pl.col("kind") == "data").select("src", "dst", "bytes")
    return measure_memory(nodes, data.collect(), sources.collect())
