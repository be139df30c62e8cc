"""What the rows of a class graph stand for: which nodes of which ranks, and where their experts are.

A row of the class graph stands for one node of each rank of its class, or for one collective in each group of its team.
These nodes have numbers one after the other, the row's own first (`graph/class_dataset.py`). So a check looks at rows,
which are few, and what it finds is told of all the nodes that they stand for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.graph.class_dataset import ClassEdges
from truedag.tracer.graph.class_experts import move_experts
from truedag.tracer.graph.class_world import ClassWorld

Ints = NDArray[np.int64]
_PLACE = ("rank_class", "team")


@dataclass(frozen=True, kw_only=True)
class Copies:
    """The rows of a class graph and its world."""

    nodes: pl.DataFrame
    """node, rank_class, team, num; ascending."""

    edges: pl.DataFrame
    """src, dst, kind, rank_class, team, place; without program order."""

    world: ClassWorld

    @cached_property
    def num_nodes(self) -> int:
        """Nodes of the whole graph."""
        return int(self.nodes["num"].sum())

    @cached_property
    def num_edges(self) -> int:
        """Edges of the whole graph, without program order."""
        return int(self.num_of_edges(self.edges["rank_class"]).sum())

    @cached_property
    def holders(self) -> pl.DataFrame:
        """rank_class, team, rank: all ranks that rows of a class and a team stand for."""
        schema = {"rank_class": pl.Int32, "team": pl.Int32, "rank": pl.Int32}
        frames = [pl.DataFrame(schema=schema)]
        for rank_class, team in self.nodes.select("rank_class", "team").unique().iter_rows():
            ranks = np.unique(self.world.members[rank_class] if team < 0 else self.world.ranks[team])
            frames.append(
                pl.DataFrame({"rank": ranks}, schema={"rank": pl.Int32}).select(
                    pl.lit(rank_class, pl.Int32).alias("rank_class"), pl.lit(team, pl.Int32).alias("team"), "rank"
                )
            )
        return pl.concat(frames)

    def spread(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Return rows, each once for every rank that its `node` stands for, with `rank`."""
        placed = rows.join(self.nodes.select("node", *_PLACE), on="node")
        return placed.join(self.holders, on=_PLACE).drop(_PLACE)

    def spread_once(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Return what rows say beside their `node`, and rank: once for every rank that any of them stands for."""
        placed = rows.join(self.nodes.select("node", *_PLACE), on="node").drop("node").unique()
        return placed.join(self.holders, on=_PLACE).drop(_PLACE).unique()

    @cached_property
    def moved(self) -> pl.DataFrame:
        """Rank, moved: how much higher its experts' numbers are than those of the rank that stands for its class."""
        world = self.world
        moved = world.first_expert - world.first_expert[np.array(world.lowest)][world.rank_class]
        return pl.DataFrame(
            {"rank": np.arange(len(moved)), "moved": moved}, schema_overrides={"rank": pl.Int32, "moved": pl.Int32}
        )

    def num_of_edges(self, rank_class: pl.Series) -> pl.Series:
        """Return how many edges each stands for, by the class that tells of it."""
        sizes = np.array([len(ranks) for ranks in self.world.members], np.int64)
        return pl.Series("num", sizes[rank_class.to_numpy()])

    def expand(self, rows: pl.Series) -> pl.Series:
        """Return the nodes that rows stand for, row by row; a row that is named twice is there twice."""
        place = self._places(rows)
        num = self.nodes["num"].to_numpy()[place]
        begin = np.cumsum(num) - num
        nodes = np.repeat(rows.to_numpy() - begin, num) + np.arange(int(num.sum()))
        return pl.Series(rows.name, nodes, dtype=pl.Int64)

    def rows_of(self, nodes: pl.Series) -> pl.Series:
        """Return the row of each node of the whole graph."""
        first = self.nodes["node"].to_numpy()
        return pl.Series(nodes.name, first[self._places(nodes)], dtype=pl.Int64)

    def ranks_of(self, nodes: pl.Series) -> pl.DataFrame:
        """Return node, rank of nodes of the whole graph."""
        place = self._places(nodes)
        numbers = nodes.to_numpy()
        turn = numbers - self.nodes["node"].to_numpy()[place]
        rank_class, team = (self.nodes[name].to_numpy()[place] for name in ("rank_class", "team"))
        frames = [pl.DataFrame(schema={"node": pl.Int64, "rank": pl.Int32})]
        for one in np.unique(rank_class[team < 0]).tolist():
            here = (team < 0) & (rank_class == one)
            frames.append(_ranks(numbers[here], self.world.members[one][turn[here]][:, None]))
        frames += [
            _ranks(numbers[team == one], self.world.ranks[one][turn[team == one]])
            for one in np.unique(team[team >= 0]).tolist()
        ]
        return pl.concat(frames)

    def labels_of(self, rows: pl.DataFrame) -> pl.Series:
        """Return the labels, once each, of what rows with `node` and `label` stand for."""
        places = self.nodes.join(rows.select("node"), on="node", how="semi").select(_PLACE).unique()
        moves = self.holders.join(places, on=_PLACE, how="semi").join(self.moved, on="rank").drop("rank").unique()
        told = rows.select("node", "label").join(self.nodes.select("node", *_PLACE), on="node")
        many = told.join(moves, on=_PLACE).select("node", "label", "moved")
        moved = many["moved"].to_numpy().astype(np.int64)
        return move_experts(many.select("label"), np.arange(len(many)), moved)["label"].unique()

    def parts_of(self, rows: pl.Series) -> pl.DataFrame:
        """Return node, part of the nodes that rows stand for, the part equal where edges connect them."""
        first = self.nodes["node"].to_numpy()
        is_own = self.nodes["team"].to_numpy() < 0
        src, dst = (np.searchsorted(first, self.edges[end].to_numpy()) for end in ("src", "dst"))
        inside = is_own[src] & is_own[dst] & (self.edges["team"].to_numpy() < 0)
        # What a rank's own edges connect is one; then the classes' ranks are put together.
        label = connect(len(first), src[inside], dst[inside])
        joints = self.edges.filter(~pl.Series(inside)).with_columns(
            src=pl.Series(first[label[src[~inside]]]), dst=pl.Series(first[label[dst[~inside]]])
        )
        joints = joints.unique(["src", "dst", "rank_class", "team", "place"])
        ends = ClassEdges.of(self.nodes, joints).in_whole(self.world)
        known, where = np.unique(np.concatenate(ends), return_inverse=True)
        half = len(where) // 2
        part = connect(len(known), where[:half], where[half:])
        place = self._places(rows)
        nodes = self.expand(rows)
        num = self.nodes["num"].to_numpy()[place]
        joint = nodes.to_numpy() + np.repeat(first[label[place]] - first[place], num)
        at = np.minimum(np.searchsorted(known, joint), max(len(known) - 1, 0))
        found = known[part[at]] if len(known) else joint
        is_known = known[at] == joint if len(known) else np.zeros(len(joint), bool)
        return pl.DataFrame({"node": nodes, "part": np.where(is_known, found, joint)})

    def _places(self, nodes: pl.Series) -> Ints:
        return np.searchsorted(self.nodes["node"].to_numpy(), nodes.to_numpy(), "right") - 1


def connect(num_nodes: int, src: Ints, dst: Ints) -> Ints:
    """Return a label for each node, equal for nodes that are connected: least labels spread along edges."""
    label = np.arange(num_nodes)
    while True:
        before = label.copy()
        least = np.minimum(label[src], label[dst])
        np.minimum.at(label, src, least)
        np.minimum.at(label, dst, least)
        np.minimum.at(label, before[src], least)
        np.minimum.at(label, before[dst], least)
        label = label[label]
        if np.array_equal(label, before):
            return label


def _ranks(nodes: Ints, ranks: Ints) -> pl.DataFrame:
    """Pair nodes [n] with their ranks [n, m]."""
    return pl.DataFrame(
        {"node": np.repeat(nodes, ranks.shape[1]), "rank": ranks.ravel()}, schema={"node": pl.Int64, "rank": pl.Int32}
    )
