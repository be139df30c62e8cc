"""Fold the graph: a coarser graph that is still a DAG and says what it stands for (DESIGN rule 8).

Theory of operation. A rank's operators, taken in the graph's own numbering, are cut into segments: a new one begins
where a folding column changes and after every communication of that rank. A segment is then a stretch of one rank's
numbering without a communication inside. An edge between two segments of one rank leads forward in it; data leave a
rank only through its communications, which stay nodes of their own, and a communication lies before or after a whole
segment. So the number of a segment's first operator orders the folded graph, and it is a DAG whatever the columns are.

A second fold, across ranks or microbatches, has no such proof: `coarsen` looks for a cycle and refuses one. What was
there when the recording began has no predecessor, and what remains has no successor, so these fold by columns alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from truedag.tracer.errors import GraphError
from truedag.tracer.topology import number_nodes

COMMUNICATIONS = ("collective", "send", "recv")
ENDS = ("parameter", "input", "output")
_SOURCES = ("parameter", "input")
_NOT_SEGMENTED = (*COMMUNICATIONS, *_SOURCES, "output")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """A quotient of the graph; folded nodes are numbered in a topological order.

    Attributes:
        nodes: fold, kind, the folding columns, ranks, num_nodes, num_ranks, num_parts, ops, time_ns, mean_ns, max_ns,
            num_measured, estimated_ns, num_estimated, flops, bytes_read, bytes_written, num_inner_edges, inner_bytes. A
            part is what the last folding put together: an operator, or a segment. time_ns sums the measured durations
            of its operators; mean_ns and max_ns are over its parts; estimated_ns sums the estimated ones. They are null
            where nothing was. num_measured and num_estimated say of how many nodes; the inner edges are those between
            its nodes, and what they carry.
        edges: src, dst, kind, num_edges, bytes between different folded nodes.
        members: node, fold.
        num_inner_edges: edges inside a folded node.
    """

    nodes: pl.DataFrame
    edges: pl.DataFrame
    members: pl.DataFrame
    num_inner_edges: int


def fold(
    nodes: pl.DataFrame, edges: pl.DataFrame, participants: pl.DataFrame, by: Sequence[str], *, order: bool = False
) -> Fold:
    """Fold every rank's operators by the columns `by` and into segments; `order` keeps program order's edges too.

    Raises:
        GraphError: the edges make a cycle, or lead between ranks past a communication.
    """
    if not order:
        edges = edges.filter(pl.col("kind") != "order")
    presence = find_presence(nodes, participants)
    members = cut_segments(nodes.select("node", "kind", key=pl.struct(by)), presence)
    return make_quotient(
        count_parts(nodes, by), edges.with_columns(num_edges=pl.lit(1, pl.Int64)), members, presence, by
    )


def refold(fine: Fold, by: Sequence[str], presence: pl.DataFrame) -> Fold:
    """Cut a folded graph into segments by columns of its nodes and fold it again.

    Args:
        fine: what is folded again.
        by: columns of its nodes.
        presence: node and rank, as `find_presence` returns them, of its folded nodes.

    Raises:
        GraphError: the graph is broken.
    """
    parts = fine.nodes.rename({"fold": "node"})
    members = cut_segments(parts.select("node", "kind", key=pl.struct(by)), presence)
    real = _spread_ranks(fine)
    return _compose(fine, make_quotient(parts, fine.edges, members, real, by))


def coarsen(fine: Fold, by: Sequence[str]) -> Fold:
    """Fold folded nodes of equal kind and equal columns `by` (columns of `fine.nodes`) together.

    Raises:
        GraphError: what comes out is no DAG.
    """
    members = fine.nodes.select(node="fold", segment=pl.struct("kind", *by).rank("dense").cast(pl.Int64))
    parts = fine.nodes.rename({"fold": "node"})
    presence = _spread_ranks(fine)
    return _compose(fine, make_quotient(parts, fine.edges, members, presence, by))


def _compose(fine: Fold, coarse: Fold) -> Fold:
    """Say of the coarser fold what it stands for in the graph itself."""
    leads = coarse.members.rename({"node": "part"})
    return Fold(
        nodes=coarse.nodes,
        edges=coarse.edges,
        members=fine.members.rename({"fold": "part"}).join(leads, on="part").select("node", "fold").sort("node"),
        num_inner_edges=fine.num_inner_edges + coarse.num_inner_edges,
    )


def _spread_ranks(fine: Fold) -> pl.DataFrame:
    return fine.nodes.select(node="fold", rank="ranks").explode("rank", empty_as_null=True, keep_nulls=True)


def count_parts(nodes: pl.DataFrame, by: Sequence[str]) -> pl.DataFrame:
    """Turn the graph's nodes into parts of a fold, each of which stands for itself."""
    duration = pl.col("end_ns") - pl.col("start_ns")
    is_measured, is_estimated = pl.col("timing") == "measured", pl.col("timing") == "estimated"
    return nodes.select(
        "node",
        part=pl.col("node"),
        num_nodes=pl.lit(1, pl.Int64),
        time_ns=pl.when(is_measured).then(duration),
        num_measured=is_measured.cast(pl.Int64),
        estimated_ns=pl.when(is_estimated).then(duration),
        num_estimated=is_estimated.cast(pl.Int64),
        ops=pl.concat_list("op"),
        kind="kind",
        flops="flops",
        bytes_read="bytes_read",
        bytes_written="bytes_written",
        num_inner_edges=pl.lit(0, pl.Int64),
        inner_bytes=pl.lit(0, pl.Int64),
        **{name: pl.col(name) for name in by if name != "kind"},
    )


def find_presence(nodes: pl.DataFrame, participants: pl.DataFrame) -> pl.DataFrame:
    """Which ranks take part in each node, as node and rank; a message's ends are on their own ranks."""
    own = nodes.filter(pl.col("kind") != "collective").select("node", pl.col("rank").cast(pl.Int64))
    collectives = nodes.filter(pl.col("kind") == "collective").select("node")
    met = collectives.join(participants, on="node").select("node", pl.col("rank").cast(pl.Int64))
    return pl.concat([own, met])


def cut_segments(keys: pl.DataFrame, presence: pl.DataFrame) -> pl.DataFrame:
    """Cut each rank's operators into segments: node and segment, any numbers that tell them apart.

    Args:
        keys: node, kind and key; a new segment begins where the key changes, and after every communication.
        presence: node and rank of all nodes.

    Raises:
        GraphError: an operator is on no rank, or on several.
    """
    plain = keys.filter(~pl.col("kind").is_in(_NOT_SEGMENTED)).select("node", "kind")
    timeline = (
        presence.join(keys, on="node", how="left")
        .filter(~pl.col("kind").is_in([*_SOURCES, "output"]))
        .sort("rank", "node")
        .with_columns(is_communication=pl.col("kind").is_in(COMMUNICATIONS))
        .with_columns(passed=pl.col("is_communication").cum_sum().over("rank"))
    )
    segments = (
        timeline.filter(~pl.col("is_communication"))
        .with_columns(segment=pl.struct("rank", "passed", "key").rle_id())
        .select("node", "segment")
    )
    if len(segments) != len(plain):
        raise GraphError("an operator is on no rank, or on several: the dataset is broken, merge its traces again")
    alone = keys.filter(pl.col("kind").is_in(COMMUNICATIONS)).select("node", segment=-1 - pl.col("node"))
    ends = (
        keys.join(presence, on="node", how="left")
        .filter(pl.col("kind").is_in([*_SOURCES, "output"]))
        .sort("node")
        .with_columns(segment=pl.struct("kind", "rank", "key").rank("dense").cast(pl.Int64))
        .select("node", segment=pl.col("segment") + len(segments))
    )
    return pl.concat([segments.with_columns(pl.col("segment").cast(pl.Int64)), alone, ends])


def make_quotient(
    parts: pl.DataFrame, edges: pl.DataFrame, members: pl.DataFrame, presence: pl.DataFrame, by: Sequence[str]
) -> Fold:
    """Group the parts by segment, number the groups topologically, add up the rest.

    Args:
        parts: what is folded, as `count_parts` returns it.
        edges: between parts, with num_edges.
        members: node and segment of every part.
        presence: node and rank of every part.
        by: the columns that the folded nodes keep, each as its first part has it.

    Raises:
        GraphError: what comes out is no DAG.
    """
    first = members.group_by("segment").agg(first=pl.col("node").min()).sort("first").with_row_index("place")
    place = members.join(first, on="segment").select("node", pl.col("place").cast(pl.Int64))
    crossing = (
        edges.join(place.rename({"node": "src", "place": "from"}), on="src")
        .join(place.rename({"node": "dst", "place": "to"}), on="dst")
        .with_columns(inner=pl.col("from") == pl.col("to"))
    )
    outer, within = crossing.filter(~pl.col("inner")), crossing.filter("inner")
    order, cycle = number_nodes(np.arange(len(first)), outer["from"].to_numpy(), outer["to"].to_numpy())
    if cycle:
        raise GraphError(
            f"folding by {', '.join(by)} makes a cycle of {len(cycle)} folded nodes: keep what tells its parts apart, "
            "such as the microbatch"
        )
    number = pl.DataFrame({"place": np.arange(len(first)), "fold": order}, schema={"place": pl.Int64, "fold": pl.Int64})
    place = place.join(number, on="place").select("node", "fold")
    ranks = presence.join(place, on="node").group_by("fold").agg(ranks=pl.col("rank").unique().sort().cast(pl.Int64))
    held = (
        within.join(number.rename({"place": "from"}), on="from")
        .group_by("fold")
        .agg(more_edges=pl.col("num_edges").sum(), more_bytes=pl.col("bytes").sum())
    )
    grouped = (
        parts.join(place, on="node")
        .sort("node")
        .group_by("fold", maintain_order=True)
        .agg(
            pl.col("kind").first(),
            *(pl.col(name).first() for name in by if name != "kind"),
            pl.col("num_nodes").sum(),
            num_parts=pl.len().cast(pl.Int64),
            ops=pl.col("ops").explode(empty_as_null=True, keep_nulls=True).unique().sort(),
            time_ns=_sum("time_ns"),
            mean_ns=pl.col("time_ns").mean(),
            max_ns=pl.col("time_ns").max(),
            flops=_sum("flops"),
            bytes_read=_sum("bytes_read"),
            bytes_written=_sum("bytes_written"),
            num_measured=pl.col("num_measured").sum(),
            estimated_ns=_sum("estimated_ns"),
            num_estimated=pl.col("num_estimated").sum(),
            num_inner_edges=pl.col("num_inner_edges").sum(),
            inner_bytes=pl.col("inner_bytes").sum(),
        )
        .join(ranks, on="fold", how="left")
        .join(held, on="fold", how="left")
        .with_columns(
            pl.col("num_inner_edges") + pl.col("more_edges").fill_null(0),
            pl.col("inner_bytes") + pl.col("more_bytes").fill_null(0),
        )
        .drop("more_edges", "more_bytes")
        .with_columns(num_ranks=pl.col("ranks").list.len().cast(pl.Int64))
        .sort("fold")
    )
    lead = number.rename({"place": "from", "fold": "first"}), number.rename({"place": "to", "fold": "last"})
    folded = (
        outer.join(lead[0], on="from")
        .join(lead[1], on="to")
        .group_by(src="first", dst="last", kind="kind")
        .agg(pl.col("num_edges").sum(), pl.col("bytes").sum())
        .sort("src", "dst", "kind")
    )
    inner = int(within["num_edges"].sum())
    return Fold(nodes=grouped, edges=folded, members=place.sort("node"), num_inner_edges=inner)


def _sum(name: str) -> pl.Expr:
    """Sum what is known; null where nothing is."""
    return pl.when(pl.col(name).is_not_null().any()).then(pl.col(name).sum()).alias(name)
