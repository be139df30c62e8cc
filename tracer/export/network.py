"""A graph, or a fold of one, as two tables that every format of graphs is written from."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from truedag.tracer.graph import Graph
from truedag.tracer.graph.fold import Fold
from truedag.tracer.graph.levels import Level


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Nodes and edges; lists are written as text, what is unknown is null.

    Attributes:
        nodes: node and whatever is said of it.
        edges: src, dst and whatever is said of it.
        is_fold: whether a node stands for several of the graph's.
        name: of the graph.
    """

    nodes: pl.DataFrame
    edges: pl.DataFrame
    is_fold: bool
    name: str


def make_network(graph: Graph, level: Level | None, *, order: bool) -> Network:
    """Take a graph as it is, or folded to a level; `order` keeps program order's edges.

    Raises:
        GraphError: the fold is no DAG, or the graph is broken.
    """
    name = str(graph.meta.get("deployment") or "recorded program")
    if level is not None:
        return _from_fold(graph.fold(level, order=order), f"{name}, folded by {level}")
    edges = graph.edges if order else graph.edges.filter(pl.col("kind") != "order")
    nodes = _plain(graph.nodes.collect())
    return Network(nodes=nodes, edges=_plain(edges.collect()), is_fold=False, name=name)


def _from_fold(fold: Fold, name: str) -> Network:
    nodes = fold.nodes.rename({"fold": "node"})
    return Network(nodes=_plain(nodes), edges=_plain(fold.edges), is_fold=True, name=name)


def _plain(frame: pl.DataFrame) -> pl.DataFrame:
    """Write lists as text, and the numbers that stand for none as null."""
    absent = [
        pl.when(pl.col(name) >= 0).then(pl.col(name)).alias(name)
        for name in ("layer", "stage", "microbatch", "expert", "step", "decode_step", "thread", "stream")
        if name in frame.columns
    ]
    lists = [
        pl.col(name).cast(pl.List(pl.String)).list.join(" ")
        for name, dtype in frame.schema.items()
        if isinstance(dtype, pl.List)
    ]
    return frame.with_columns(*absent, *lists)
