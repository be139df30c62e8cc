"""Which ranks a drawing reads, and whom each of them stands for.

A recorded graph is read whole: every rank stands for itself and its own times. Of a dry run's class graph, and of a
recorded one that would be too large, one rank of each class is read; the others of its class ran the same program,
which the graph says, and are counted and named through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import polars as pl

from truedag.tracer.errors import DrawError
from truedag.tracer.graph import Graph
from truedag.tracer.graph.fold import ENDS
from truedag.tracer.views.faults import Faults

# Above so many nodes a graph is drawn from one rank of each class.
MAX_NODES = 3_000_000
_OF_EXPERTS = ("ep", "etp", "edp")
_AXES = ("tp", "ep", "etp", "pp", "dp", "edp", "cp")


@dataclass(frozen=True)
class Scope:
    """What is read of a graph.

    Attributes:
        whole: the graph.
        members: for each class, by its lowest rank, its ranks.
        is_folded: whether one rank of each class is read, and not every rank.
        faults: what an audit found, to be marked.
    """

    whole: Graph
    members: dict[int, tuple[int, ...]]
    is_folded: bool
    faults: Faults = field(default_factory=Faults)

    @property
    def graph(self) -> Graph:
        """The part that is read."""
        return self.whole.subgraph(ranks=sorted(self.members)) if self.is_folded else self.whole

    @property
    def read(self) -> list[int]:
        """The ranks that are read."""
        return sorted(self.members) if self.is_folded else sorted(rank for one in self.members.values() for rank in one)

    def spread(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Return the ranks that these stand for."""
        if not self.is_folded:
            return tuple(sorted(ranks))
        return tuple(sorted(other for rank in ranks for other in self.members.get(rank, (rank,))))

    def weight(self, rank: int) -> int:
        """Return how many ranks this one stands for."""
        return len(self.members.get(rank, (rank,))) if self.is_folded else 1

    @property
    def about(self) -> str:
        """What stands before counts of nodes: 'about ' where one rank of a class was counted for others that ran.

        For experts without tokens a rank runs other operators than another of its class.
        """
        return "about " if self.is_folded and self.whole.meta.get("form") != "classes" else ""

    def class_of(self, rank: int) -> int:
        """Return the lowest rank of a rank's class."""
        return self._firsts[rank]

    @cached_property
    def _firsts(self) -> dict[int, int]:
        return {rank: first for first, ranks in self.members.items() for rank in ranks}

    @cached_property
    def places(self) -> dict[int, dict[str, Any]]:
        """Where each rank stands: its row of the graph's ranks."""
        rows: dict[int, dict[str, Any]] = {row["rank"]: row for row in self.whole.ranks.collect().to_dicts()}
        return rows

    def coordinate(self, rank: int, axis: str) -> int:
        """Return where a rank stands on an axis; -1: nobody told."""
        value = self.places.get(rank, {}).get(axis)
        return -1 if value is None else int(value)

    def size(self, axis: str) -> int:
        """Return how many places an axis has; 0: nobody told."""
        return self._sizes.get(axis, 0)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {axis: 1 + max((self.coordinate(rank, axis) for rank in self.places), default=-1) for axis in _AXES}

    @cached_property
    def stage_sizes(self) -> dict[int, int]:
        """How many ranks each stage has."""
        sizes: dict[int, int] = {}
        for rank in self.places:
            stage = self.coordinate(rank, "pp")
            sizes[stage] = sizes.get(stage, 0) + 1
        return sizes

    @cached_property
    def by_place(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """The ranks of each place on the pipeline's and the experts' axes: they hold the same experts."""
        found: dict[tuple[int, int], list[int]] = {}
        for rank in sorted(self.places):
            found.setdefault((self.coordinate(rank, "pp"), self.coordinate(rank, "ep")), []).append(rank)
        return {place: tuple(ranks) for place, ranks in found.items()}

    @property
    def name(self) -> str:
        """What was run: deployment and strategy."""
        strategy = (self.whole.meta.get("strategy") or "").partition(" ")[0]
        return " · ".join(part for part in (self.whole.meta.get("deployment") or "recorded program", strategy) if part)

    @cached_property
    def num_total(self) -> int:
        """How many nodes the graph has."""
        told = self.whole.meta.get("num_nodes")
        return int(told) if told is not None else len(self.whole.nodes.select("node").collect())

    @cached_property
    def axes(self) -> list[str]:
        """The axes on which ranks differ; those of experts only where there are some."""
        is_expert = self.graph.nodes.filter(pl.col("expert") >= 0).select("node").head(1)
        axes = _AXES if len(is_expert.collect()) else [axis for axis in _AXES if axis not in _OF_EXPERTS]
        return [axis for axis in axes if self.size(axis) > 1]


def find_scope(graph: Graph, faults: Faults | None = None) -> Scope:
    """Decide what is read: every rank, or one of each class where the graph is too large.

    Raises:
        DrawError: there is nothing to draw.
    """
    ran = graph.nodes.filter(~pl.col("kind").is_in(ENDS)).select("node").head(1)
    if ran.collect().is_empty():
        raise DrawError(f"{graph.path} holds no operator: there is nothing to draw")
    is_folded = graph.meta.get("form") == "classes" or (graph.meta.get("num_nodes") or 0) > MAX_NODES
    ranks = graph.ranks.select("rank", "pp", "rank_class").collect().sort("rank")
    if not is_folded:  # the recorded class tells ranks apart that were given other data
        ranks = ranks.drop("rank_class").join(graph.rank_classes(), on="rank", how="left", maintain_order="left")
    members: dict[object, list[int]] = {}
    for rank, stage, number in ranks.select("rank", "pp", "rank_class").iter_rows():
        members.setdefault(rank if number is None or number < 0 else (stage, number), []).append(rank)
    by_first = {found[0]: tuple(found) for found in members.values()}
    return Scope(whole=graph, members=by_first, is_folded=is_folded, faults=faults or Faults())


def weigh(scope: Scope, nodes: pl.DataFrame, participants: pl.DataFrame) -> pl.DataFrame:
    """Say how many nodes of the graph each stands for: of a rank its class, of a collective the groups."""
    if not scope.is_folded:
        return nodes.select("node", weight=pl.lit(1.0))
    of_ranks = pl.DataFrame(
        {"rank": list(scope.members), "num": [len(ranks) for ranks in scope.members.values()]},
        schema={"rank": pl.Int64, "num": pl.Float64},
    )
    sizes = scope.whole.groups.select(pl.col("group").cast(pl.Int64), size=pl.col("ranks").list.len()).collect()
    met = (
        participants.select("node", pl.col("rank").cast(pl.Int64), pl.col("group").cast(pl.Int64))
        .join(of_ranks, on="rank")
        .join(sizes, on="group")
        .group_by("node")
        .agg(met=(pl.col("num") / pl.col("size")).sum())
    )
    own = nodes.select("node", "kind", pl.col("rank").cast(pl.Int64)).join(of_ranks, on="rank", how="left")
    is_joint = pl.col("kind") == "collective"
    weight = pl.when(is_joint).then("met").otherwise("num").fill_null(1.0)
    return own.join(met, on="node", how="left").select("node", weight=weight)
