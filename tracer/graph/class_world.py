"""Where every rank of a class graph's world stands: in its class, and in the teams of process groups that are alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ClassWorld:
    """The tables of ranks and groups as arrays. A rank's turn is its place in its class, a group's in its team."""

    rank_class: Ints  # [world]
    members: list[Ints]  # by class, ascending
    first_expert: Ints  # [world]
    groups: list[Ints]  # by team: the numbers of its groups, by turn
    ranks: list[Ints]  # by team: [groups, ranks of a group]

    @classmethod
    def of(cls, ranks: pl.DataFrame, groups: pl.DataFrame) -> ClassWorld:
        """Take it from the class graph's tables."""
        ranks = ranks.sort("rank")
        rank_class = ranks["rank_class"].to_numpy().astype(np.int64)
        teams = groups.sort("team", "group").group_by("team", maintain_order=True).agg("group", "ranks")
        order = np.argsort(rank_class, kind="stable")
        return cls(
            rank_class=rank_class,
            members=np.split(order, np.cumsum(np.bincount(rank_class))[:-1]),
            first_expert=ranks["first_expert"].to_numpy().astype(np.int64),
            groups=[np.array(groups, np.int64) for groups in teams["group"].to_list()],
            ranks=[np.array(members, np.int64) for members in teams["ranks"].to_list()],
        )

    @cached_property
    def place(self) -> Ints:
        """[world] Each rank's turn in its class."""
        place = np.empty(len(self.rank_class), np.int64)
        for ranks in self.members:
            place[ranks] = np.arange(len(ranks))
        return place

    @cached_property
    def turn(self) -> NDArray[np.int32]:
        """[1 + teams, world] The turn of a rank's group in each team, -1: it is in none; of team -1, its own."""
        turn = np.full((len(self.ranks) + 1, len(self.rank_class)), -1, np.int32)
        for team, ranks in enumerate(self.ranks):
            turn[team, ranks] = np.arange(len(ranks))[:, None]
        turn[-1] = self.place
        return turn

    @cached_property
    def lowest(self) -> list[int]:
        """By class: the rank that stands for it."""
        return [int(ranks[0]) for ranks in self.members]

    def experts_moved(self, rank: Ints, team: Ints, turn: Ints) -> Ints:
        """Return how much higher the experts' numbers are than in the class graph.

        Args:
            rank: of each node, -1: of a collective.
            team: of each collective.
            turn: of each collective's group in it.
        """
        joint = np.flatnonzero(rank < 0)
        rank = rank.copy()
        for one in np.unique(team[joint]).tolist():
            here = joint[team[joint] == one]
            rank[here] = self.ranks[one][turn[here], 0]
        moved: Ints = self.first_expert[rank] - self.first_expert[np.array(self.lowest)][self.rank_class[rank]]
        return moved


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Ranks that are asked for, and what they take part in."""

    world: ClassWorld
    has: Bools  # [world]

    @cached_property
    def members(self) -> list[Ints]:
        """By class: its ranks among them."""
        return [ranks[self.has[ranks]] for ranks in self.world.members]

    @cached_property
    def has_turn(self) -> Bools:
        """[teams, groups] Which groups one of them is in."""
        most = max((len(ranks) for ranks in self.world.ranks), default=0)
        found = np.zeros((len(self.world.ranks), most), bool)
        for team, ranks in enumerate(self.world.ranks):
            found[team, : len(ranks)] = self.has[ranks].any(axis=1)
        return found

    @cached_property
    def turns(self) -> list[Ints]:
        """By team: the turns of groups that one of them is in."""
        return [np.flatnonzero(one) for one in self.has_turn]

    def partners(self, rank_class: int, team: int) -> Ints:
        """Return a class's ranks that are in one group of a team with one of them."""
        ranks = self.world.members[rank_class]
        found: Ints = ranks[self.has_turn[team, self.world.turn[team, ranks]]]
        return found
