"""A class graph as a graph of its own: one rank of each class, and of each group the ranks among these.

Theory of operation. Ranks of a class run the same program, and where times were estimated, at the same times. So what
is asked of every rank alike (a critical path, what its data need) is asked of the lowest of each class, and holds for
the others. A team of alike groups is one group here. Numbers of nodes are the whole graph's: an own node's is that of
the lowest rank, a collective's that of the first group of its team.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from truedag.tracer.errors import GraphError
from truedag.tracer.graph.class_dataset import ClassDataset
from truedag.tracer.graph.class_world import Ints
from truedag.tracer.graph.source import TABLES

_SAID = ("seq", "arrive_ns", "start_ns", "end_ns", "send_bytes", "recv_bytes")


@dataclass(frozen=True)
class OneOfEach:
    """The tables of one rank of each class, as `TableSource`."""

    classes: ClassDataset

    @property
    def path(self) -> Path:
        """Where the class graph lies."""
        return self.classes.path

    @property
    def meta(self) -> Mapping[str, Any]:
        """What is said of the whole graph."""
        return self.classes.meta

    def scan(self, table: str, ranks: AbstractSet[int] | None = None) -> pl.LazyFrame:
        """Return a table; of whatever ranks are asked for, those of all.

        Participants have `num_alike` too: how many ranks of the class are in the group, all of them at the same time.

        Raises:
            GraphError: there is no such table.
        """
        del ranks
        if table not in (*TABLES, "kernels"):
            raise GraphError(f"{self.path} has no table {table}")
        if table == "kernels":
            return self.classes.scan(table)
        if table == "ranks":
            return self.classes.scan(table).filter(pl.col("rank").is_in(self.classes.world.lowest)).sort("rank")
        if table == "groups":
            return self._groups()
        rows = self.classes.scan_classes(table)
        if table == "edges":
            return rows.drop("rank_class", "team", "place")
        rank = pl.col("rank_class").replace_strict(self._ranks, default=-1, return_dtype=pl.Int32)
        if table == "nodes":
            return rows.with_columns(rank=rank).drop("rank_class", "team", "num")
        joint = self.classes.scan_classes("nodes").select("node", is_joint=pl.col("kind") == "collective")
        met = rows.join(joint, on="node", maintain_order="left").join(
            self._num_alike().lazy(), on=["team", "rank_class"], maintain_order="left"
        )
        num = pl.when("is_joint").then("num_alike").otherwise(1).alias("num_alike")
        return met.select("node", rank.alias("rank"), pl.col("team").alias("group"), *_SAID, num).with_columns(
            waited_ns=pl.lit(None, pl.Int64)
        )

    def in_whole(self, node: Ints, rank: Ints) -> Ints:
        """Return the numbers in the whole graph of what some ranks ran, or took part in.

        Args:
            node: numbers in this graph.
            rank: whose numbers are wanted: any of the class that the node stands for.
        """
        told = self.classes.scan_classes("nodes").select("node", "team").collect()
        place = np.searchsorted(told["node"].to_numpy(), node)
        team = told["team"].to_numpy().astype(np.int64)[place]
        moved: Ints = node + self.classes.world.turn[team, rank]
        return moved

    def group_in_whole(self, group: Ints, rank: Ints) -> Ints:
        """Return the numbers in the whole graph of the groups that some ranks are in.

        Args:
            group: numbers in this graph.
            rank: one of each group's ranks.
        """
        world = self.classes.world
        turn = world.turn[group, rank].tolist()
        return np.array([world.groups[team][one] for team, one in zip(group.tolist(), turn, strict=True)], np.int64)

    @property
    def _ranks(self) -> dict[int, int]:
        return dict(enumerate(self.classes.world.lowest))

    def _num_alike(self) -> pl.DataFrame:
        """Return how many ranks of each class are in a group of each team: team, rank_class, num_alike."""
        world = self.classes.world
        rows = [
            (team, rank_class, count)
            for team, ranks in enumerate(world.ranks)
            for rank_class, count in enumerate(np.bincount(world.rank_class[ranks[0]]).tolist())
            if count
        ]
        schema = {"team": pl.Int32, "rank_class": pl.Int32, "num_alike": pl.Int64}
        return pl.DataFrame(rows, schema=schema, orient="row")

    def _groups(self) -> pl.LazyFrame:
        """Teams, each with the ranks of the classes that take part in it."""
        met = self.classes.scan_classes("participants").select("team", "rank_class").unique()
        rank = pl.col("rank_class").replace_strict(self._ranks, return_dtype=pl.Int64)
        members = met.with_columns(rank=rank).group_by("team").agg(ranks=pl.col("rank").sort())
        told = self.classes.scan("groups").sort("group").group_by("team", maintain_order=True)
        said = told.agg(pl.col("axis", "name", "description").first())
        return members.join(said, on="team").sort("team").rename({"team": "group"}).select(
            "group", "axis", "ranks", "name", "description"
        )  # fmt: skip
