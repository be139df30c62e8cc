"""What is audited, as columns: the same for a dataset and for a drawing, each with what it does not tell left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import polars as pl

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.copies import Copies
from truedag.tracer.audit.findings import pick_nodes

NODES = {
    "node": pl.Int64, "kind": pl.String, "op": pl.String, "label": pl.String, "role": pl.String, "layer": pl.Int32,
    "expert": pl.Int32, "phase": pl.String, "microbatch": pl.Int32, "decode_step": pl.Int32, "stage": pl.Int32,
    "inputs": pl.String, "outputs": pl.String,
}  # fmt: skip
COVERS = {
    "node": pl.Int64, "role": pl.String, "layer": pl.Int32, "expert": pl.Int32, "phase": pl.String,
    "microbatch": pl.Int32, "decode_step": pl.Int32,
}  # fmt: skip
WHERE = {"node": pl.Int64, "rank": pl.Int32}
COMMUNICATIONS = {
    "node": pl.Int64, "purpose": pl.String, "kind": pl.String, "axis": pl.String, "layer": pl.Int32,
    "phase": pl.String, "microbatch": pl.Int32, "decode_step": pl.Int32, "members": pl.String, "weight": pl.Float64,
}  # fmt: skip
PARTS = {"node": pl.Int64, "rank": pl.Int32, "send_bytes": pl.Int64, "recv_bytes": pl.Int64}
EDGES = {"src": pl.Int64, "dst": pl.Int64, "kind": pl.String, "bytes": pl.Int64, "type": pl.String}
GROUPS = {"axis": pl.String, "members": pl.String, "size": pl.Int32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A graph that is audited.

    A group is written as its ranks in ascending order, "0,1,4,5", a message as "0>4". -1 and null are untold.
    """

    name: str
    """How its reader calls it."""

    form: Literal["dataset", "drawing"]
    """A dataset is exact; a drawing tells what it tells."""

    nodes: pl.DataFrame
    """`NODES`: operators, and what goes in and out; communications too."""

    covers: pl.DataFrame
    """`COVERS`: what each node does and where in the model and the step; a node of a drawing may stand for much."""

    where: pl.DataFrame
    """`WHERE`: the ranks that a node is on; of a class graph's rows `copies` says it."""

    communications: pl.DataFrame
    """`COMMUNICATIONS`: one row for each collective and each message (at its send); `weight` is the part of a whole
    communication that it is, where a backend makes one of several."""

    parts: pl.DataFrame
    """`PARTS`: what each rank gave and got."""

    edges: pl.DataFrame
    """`EDGES`: dataflow and messages, without program order; type as in float32[64,512]."""

    groups: pl.DataFrame
    """`GROUPS`: what it says of process groups."""

    ranks: pl.DataFrame
    """rank, and where it stands on each axis (-1: unsaid), as far as the subject says it."""

    names: Mapping[int, str] = field(default_factory=dict)
    """Names of nodes that have one of their own."""

    dangling: tuple[str, ...] = ()
    """Edges of a drawing with an end that is no node."""

    unmatched: tuple[str, ...] = ()
    """Communications that its own maker could not join."""

    messages: pl.DataFrame | None = None
    """Src, dst of each message, where `edges` are those of a class graph."""

    copies: Copies | None = None
    """Of a class graph: its rows are the nodes, the edges and what `covers` says; this is what they stand
    for and on which ranks. `communications` and `parts` are those of the whole graph in any case."""

    @property
    def num_nodes(self) -> int:
        """Nodes, all that rows stand for."""
        return len(self.nodes) if self.copies is None else self.copies.num_nodes

    @property
    def num_edges(self) -> int:
        """Edges, all that rows stand for."""
        return len(self.edges) if self.copies is None else self.copies.num_edges

    def expand(self, nodes: pl.Series) -> pl.Series:
        """Return what nodes stand for: themselves, or of a class graph's rows all nodes of the whole graph."""
        return nodes if self.copies is None else self.copies.expand(nodes)

    def rows_of(self, nodes: pl.Series) -> pl.DataFrame:
        """Return the rows of `nodes` that nodes are, or that stand for them."""
        rows = nodes if self.copies is None else self.copies.rows_of(nodes)
        return self.nodes.filter(pl.col("node").is_in(rows.implode()))

    def where_of(self, nodes: pl.Series) -> pl.DataFrame:
        """Return node, rank of some nodes."""
        if self.copies is not None:
            return self.copies.ranks_of(nodes)
        return self.where.filter(pl.col("node").is_in(nodes.implode()))

    def ranks_of(self, nodes: pl.Series) -> list[int]:
        """Return the ranks that some nodes are on, in ascending order."""
        return self.where_of(nodes)["rank"].unique().sort().to_list()

    def on_ranks(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Return rows, each once for every rank that its `node` is on, with `rank`."""
        return rows.join(self.where, on="node") if self.copies is None else self.copies.spread(rows)

    def told_of_ranks(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Return what rows say beside their `node`, and rank: once for every rank of which any says it."""
        if self.copies is not None:
            return self.copies.spread_once(rows)
        return rows.join(self.where, on="node").drop("node").unique()

    def present(self) -> set[int]:
        """Return the ranks that any node is on."""
        return set((self.where if self.copies is None else self.copies.holders)["rank"].unique())

    def placed(self, *of: pl.Expr) -> pl.DataFrame:
        """Return `COVERS` that `of` chooses, and rank: what is done on each rank, experts as numbered there."""
        placed = self.on_ranks(self.covers.filter(*of))
        if self.copies is None:
            return placed
        expert = pl.when(pl.col("expert") >= 0).then(pl.col("expert") + pl.col("moved")).otherwise("expert")
        return placed.join(self.copies.moved, on="rank").with_columns(expert=expert).drop("moved")

    def count_edges(self, edges: pl.DataFrame) -> int:
        """Return how many edges some rows of `edges` stand for."""
        return len(edges) if self.copies is None else int(self.copies.num_of_edges(edges["rank_class"]).sum())

    def tells(self, column: str) -> bool:
        """Return whether any node says where it stands in a column of `covers`."""
        values = self.covers[column]
        return bool((values >= 0).any()) if values.dtype.is_integer() else bool(values.is_not_null().any())

    def name_nodes(self, nodes: Iterable[int]) -> tuple[str, ...]:
        """Return the names of the first few nodes."""
        picked = [int(name) for name in pick_nodes(map(str, nodes))]
        if self.names:
            return tuple(self.names.get(node, str(node)) for node in picked)
        numbers = pl.Series(picked, dtype=pl.Int64)
        rows = numbers if self.copies is None else self.copies.rows_of(numbers)
        told = self.nodes.filter(pl.col("node").is_in(rows.implode())).select("node", "label")
        labels = dict(told.iter_rows())
        return tuple(
            f"{node} ({labels[row]})" if labels.get(row) else str(node) for node, row in zip(picked, rows, strict=True)
        )


def write_members(ranks: Iterable[int]) -> str:
    """Write a group as subjects and requirements do."""
    return ",".join(map(str, sorted(ranks)))


def read_members(members: str) -> tuple[int, ...]:
    """Return the ranks of a group or a message."""
    return tuple(int(rank) for rank in members.replace(">", ",").split(",") if rank)


def tell_members(members: str | None) -> str:
    """Write a group or a message for people: 0-1016 step 8, 3>131."""
    if members is None or ">" in members:
        return members or "none"
    return write_runs(read_members(members))
