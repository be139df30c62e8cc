"""A world of ranks in classes: who runs which program, where each rank stands, and the process groups of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.errors import MergeError

Ints = NDArray[np.int64]
Groups = Sequence[tuple[str, str, tuple[int, ...]]]  # name, description and ranks of each


@dataclass(frozen=True, kw_only=True)
class World:
    """What is known of all ranks before any communication is looked at."""

    rank_class: Ints
    """[world] Which class a rank is of; classes are numbered by their lowest ranks, which stand for them."""

    coordinates: Mapping[str, Ints]
    """By axis: [world] where a rank stands on it."""

    first_expert: Ints
    """[world] The lowest number of a layer's experts that a rank holds; 0 where there are none."""

    groups: Groups
    """Name, description and ranks of every process group, in the order in which all ranks made them."""

    sized_as: Ints
    """[world] The lowest rank that has its sizes, for all that have them too; of each class one is its lowest rank."""

    @cached_property
    def members(self) -> list[Ints]:
        """Each class's ranks, ascending."""
        order = np.argsort(self.rank_class, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.rank_class))[:-1])

    @cached_property
    def representatives(self) -> list[int]:
        """Each class's lowest rank."""
        return [int(ranks[0]) for ranks in self.members]

    @cached_property
    def sized(self) -> list[Ints]:
        """Each class's ranks whose sizes are wanted, ascending: its lowest, and one for each other choice of sizes."""
        return [np.unique(self.sized_as[ranks]) for ranks in self.members]


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """Process groups that are the same to the classes of their members: place by place of one class."""

    number: int
    description: str
    groups: tuple[int, ...]
    """Which of the world's groups, in their order."""

    classes: tuple[int, ...]
    """By place in the group: the class of the rank there."""

    def place_of(self, rank_class: int) -> int | None:
        """Return the one place where a class stands; None if it stands at several."""
        return self.classes.index(rank_class) if self.classes.count(rank_class) == 1 else None


class Teams:
    """All teams of a world.

    A rank's group of a description is the n-th such that it is in; a class's ranks have groups of one team then, since
    they run one program.
    """

    def __init__(self, world: World) -> None:
        """Tell the teams apart.

        Raises:
            MergeError: groups of one class's ranks differ in the classes of their members.
        """
        self._world = world
        self.teams: list[Team] = []
        self.of_group = np.full(len(world.groups), -1)
        by_description: dict[str, list[int]] = {}
        for number, (_, description, _) in enumerate(world.groups):
            by_description.setdefault(description, []).append(number)
        for description, numbers in by_description.items():
            self._divide(description, numbers)
        self._own = {
            rank: {world.groups[number][0]: number for number in self._groups_of(rank)}
            for rank in world.representatives
        }

    def _groups_of(self, rank: int) -> list[int]:
        return [number for number, (_, _, ranks) in enumerate(self._world.groups) if rank in ranks]

    def _divide(self, description: str, numbers: Sequence[int]) -> None:
        members = [np.array(self._world.groups[number][2], np.int64) for number in numbers]
        flat = np.concatenate(members)
        classes = self._world.rank_class[flat]
        slot = classes * len(numbers) + _counts_before(flat)
        sizes = [len(one) for one in members]
        signatures = np.split(slot, np.cumsum(sizes)[:-1])
        found: dict[bytes, list[int]] = {}
        for place, signature in enumerate(signatures):
            found.setdefault(signature.tobytes(), []).append(place)
        owner: dict[int, int] = {}
        for key, places in found.items():
            team = len(self.teams)
            for one in np.unique(np.frombuffer(key, np.int64)).tolist():
                if owner.setdefault(one, team) != team:
                    raise MergeError(
                        f"the ranks of class {one // len(numbers)} are in groups of different make ({description}): "
                        "a bug in truedag, report it; --all-ranks trusts no class"
                    )
            which = tuple(numbers[place] for place in places)
            ranks = np.array(self._world.groups[which[0]][2], np.int64)
            self.teams.append(
                Team(
                    number=team,
                    description=description,
                    groups=which,
                    classes=tuple(self._world.rank_class[ranks].tolist()),
                )
            )
            self.of_group[list(which)] = team

    def group_of(self, representative: int, name: str) -> int:
        """Return the number of the world's group that a representative calls so.

        Raises:
            MergeError: it was not made while groups were noted.
        """
        number = self._own[representative].get(name)
        if number is None:
            raise MergeError(f"rank {representative} communicates in group {name}, which not all ranks have made")
        return number

    def find_link(self, rank_class: int, peer: int) -> int | None:
        """Return the smallest group of a class's representative that a rank is in, and the class at one place only.

        Where a class stands in it every rank of the class has its own peer: that of the same place in its own group.
        """
        representative = self._world.representatives[rank_class]
        found = [
            number
            for number in self._own[representative].values()
            if peer in self._world.groups[number][2]
            and self.teams[int(self.of_group[number])].place_of(rank_class) is not None
        ]
        return min(found, key=lambda number: (len(self._world.groups[number][2]), number), default=None)


def _counts_before(values: Ints) -> Ints:
    """How many of the same value come before each."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    found = np.empty(len(values), np.int64)
    found[order] = np.arange(len(values)) - np.searchsorted(ordered, ordered, "left")
    return found
