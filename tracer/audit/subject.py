"""What is audited, as columns: the same for a dataset and for a drawing, each with what it does not tell left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import polars as pl

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
    """`WHERE`: the ranks that a node is on."""

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

    def tells(self, column: str) -> bool:
        """Return whether any node says where it stands in a column of `covers`."""
        values = self.covers[column]
        return bool((values >= 0).any()) if values.dtype.is_integer() else bool(values.is_not_null().any())

    def name_nodes(self, nodes: Iterable[int]) -> tuple[str, ...]:
        """Return the names of the first few nodes."""
        picked = [int(name) for name in pick_nodes(map(str, nodes))]
        if self.names:
            return tuple(self.names.get(node, str(node)) for node in picked)
        told = self.nodes.filter(pl.col("node").is_in(picked)).select("node", "label")
        labels = dict(told.iter_rows())
        return tuple(f"{node} ({labels[node]})" if labels.get(node) else str(node) for node in picked)


def write_members(ranks: Iterable[int]) -> str:
    """Write a group as subjects and requirements do."""
    return ",".join(map(str, sorted(ranks)))


def read_members(members: str) -> tuple[int, ...]:
    """Return the ranks of a group or a message."""
    return tuple(int(rank) for rank in members.replace(">", ",").split(",") if rank)
