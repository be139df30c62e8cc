"""The levels to fold to, by name, and the fold of ranks of one class onto each other (DESIGN rule 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import polars as pl

from truedag.tracer.errors import GraphError
from truedag.tracer.graph.fold import Fold, count_parts, find_presence, fold, make_quotient, refold
from truedag.tracer.graph.rank_classes import class_items

Level = Literal["module", "layer", "stage", "rank_class"]
_CALL = ("step", "decode_step", "phase", "microbatch")
_COLUMNS: dict[str, tuple[str, ...]] = {
    "stage": (*_CALL, "stage"),
    "layer": (*_CALL, "stage", "layer"),
    "module": (*_CALL, "stage", "layer", "module"),
    "rank_class": (*_CALL, "stage", "layer", "module", "expert", "category", "op", "label"),
}


def fold_to_level(
    nodes: pl.LazyFrame,
    edges: pl.LazyFrame,
    participants: pl.LazyFrame,
    groups: pl.LazyFrame,
    level: Level | Sequence[str],
    *,
    by_class: bool,
    order: bool,
) -> Fold:
    """Fold a graph's tables; see `Graph.fold`.

    Raises:
        GraphError: there is no such level or column, or the fold is no DAG.
    """
    columns = nodes.collect_schema().names()
    if isinstance(level, str):
        if level not in _COLUMNS:
            raise GraphError(f"there is no level {level!r}: fold to {', '.join(get_args(Level))}, or by columns")
        by = _COLUMNS[level]
    else:
        by = tuple(level)
    if unknown := [name for name in by if name not in columns]:
        raise GraphError(f"nodes have no column {unknown[0]!r}: they have {', '.join(columns)}")
    if not by_class and level != "rank_class":
        needed = dict.fromkeys(("node", "kind", "rank", "op", "timing", "start_ns", "end_ns", "flops"))
        needed |= dict.fromkeys(("bytes_read", "bytes_written", *by))
        return fold(
            nodes.select(*needed).collect(),
            edges.select("src", "dst", "kind", "bytes").collect(),
            participants.select("node", "rank").collect(),
            by,
            order=order,
        )
    base, presence = _fold_classes(nodes, edges, participants, groups, by, order=order)
    return base if level == "rank_class" else refold(base, by, presence)


def _fold_classes(
    nodes: pl.LazyFrame,
    edges: pl.LazyFrame,
    participants: pl.LazyFrame,
    groups: pl.LazyFrame,
    by: Sequence[str],
    *,
    order: bool,
) -> tuple[Fold, pl.DataFrame]:
    """Fold what the ranks of a class do in the same place; return with it which classes each folded node is of."""
    all_nodes, all_participants, all_edges = nodes.collect(), participants.collect(), edges.collect()
    items = class_items(all_nodes, all_edges, all_participants, groups.collect())
    members = _join_collectives(items)
    if not order:
        all_edges = all_edges.filter(pl.col("kind") != "order")
    carried = all_edges.select("src", "dst", "kind", "bytes", num_edges=pl.lit(1, pl.Int64))
    ranks = find_presence(all_nodes, all_participants)
    try:
        base = make_quotient(count_parts(all_nodes, by), carried, members, ranks, by)
    except GraphError as error:
        raise GraphError(
            "ranks of one class wait for each other in turn, as stages of a pipeline do, so that folded together they "
            "make a cycle: fold without classes, or a subgraph of fewer ranks"
        ) from error
    presence = (
        items.select("node", rank="rank_class")
        .join(base.members, on="node")
        .select(node="fold", rank=pl.col("rank").cast(pl.Int64))
        .unique()
    )
    return base, presence


def _join_collectives(items: pl.DataFrame) -> pl.DataFrame:
    """Number what is folded together: node and segment.

    Items of one class and place are one; a communication is an item of each of its ranks, and they are all one.
    """
    places = items.select("node", place=pl.struct("rank_class", "item").rank("dense").cast(pl.Int64))
    lead = places.group_by("node").agg(pl.col("place").unique().sort())
    joins = lead.filter(pl.col("place").list.len() > 1)["place"].unique().to_list()
    root: dict[int, int] = {}

    def find(place: int) -> int:
        while place in root:
            place = root[place]
        return place

    for together in joins:
        first = find(together[0])
        for other in together[1:]:
            found = find(other)
            if found != first:
                low, high = sorted((first, found))
                root[high] = low
                first = low
    number = pl.DataFrame(
        {"place": list(root), "segment": [find(place) for place in root]},
        schema={"place": pl.Int64, "segment": pl.Int64},
    )
    firsts = lead.select("node", pl.col("place").list.first())
    return firsts.join(number, on="place", how="left").select("node", segment=pl.coalesce("segment", "place"))
