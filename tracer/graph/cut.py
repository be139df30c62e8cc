"""A part of a graph: which nodes are in it, lazily."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import polars as pl

from truedag.tracer.errors import GraphError


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What a node must be to be in the part; None asks nothing.

    Attributes:
        ranks: on one of these ranks; a collective is if one of them takes part in it.
        where: a condition on the columns of nodes.
        nodes: one of these.
    """

    ranks: AbstractSet[int] | None = None
    where: pl.Expr | None = None
    nodes: pl.Series | None = None

    def select(self, nodes: pl.LazyFrame, participants: pl.LazyFrame) -> pl.LazyFrame:
        """Return the nodes in the part, in their order; `participants` are those of all these nodes."""
        if self.where is not None:
            nodes = nodes.filter(self.where)
        if self.nodes is not None:
            nodes = nodes.filter(pl.col("node").is_in(self.nodes.implode()))
        if self.ranks is not None:
            is_own = pl.col("rank").is_in(sorted(self.ranks))
            met = participants.filter(is_own).select("node", is_met=True).unique("node")
            joined = nodes.join(met, on="node", how="left", maintain_order="left")
            nodes = joined.filter(is_own | ((pl.col("rank") < 0) & pl.col("is_met"))).drop("is_met")
        return nodes


def make_cut(
    *,
    ranks: int | Iterable[int] | None,
    layers: int | Iterable[int] | None,
    phases: str | Iterable[str] | None,
    steps: int | Iterable[int] | None,
    time_ns: tuple[int, int] | None,
    where: pl.Expr | None,
    nodes: Iterable[int] | None,
) -> Cut:
    """Put conditions together; see `Graph.subgraph`.

    Raises:
        GraphError: the time ends before it begins.
    """
    conditions = [] if where is None else [where]
    for column, wanted in (("layer", layers), ("phase", phases), ("step", steps)):
        if wanted is not None:
            conditions.append(pl.col(column).is_in([wanted] if isinstance(wanted, int | str) else list(wanted)))
    if time_ns is not None:
        begin, end = time_ns
        if end < begin:
            raise GraphError(f"the time from {begin} to {end} ns ends before it begins: give (begin, end)")
        runs = (pl.col("end_ns") > begin) | (pl.col("start_ns") >= begin)
        conditions.append((pl.col("start_ns") < end) & runs)
    return Cut(
        ranks=None if ranks is None else frozenset([ranks] if isinstance(ranks, int) else ranks),
        where=pl.all_horizontal(conditions) if conditions else None,
        nodes=None if nodes is None else pl.Series("node", list(nodes), dtype=pl.Int64),
    )
