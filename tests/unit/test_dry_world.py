"""Process groups that are alike to the classes of their ranks are told from those that are not."""

from __future__ import annotations

import numpy as np
import pytest

from truedag.tracer.dry.world import Teams, World
from truedag.tracer.errors import MergeError


def world(rank_class: list[int], groups: list[tuple[str, str, tuple[int, ...]]]) -> World:
    size = len(rank_class)
    lowest = np.array([rank_class.index(one) for one in rank_class])
    return World(
        rank_class=np.array(rank_class),
        coordinates={},
        first_expert=np.zeros(size, np.int64),
        groups=groups,
        sized_as=lowest,
    )


def test_groups_of_equal_make_are_one_team() -> None:
    some = world(
        [0, 1, 0, 1],
        [
            ("0", "world", (0, 1, 2, 3)),
            ("1", "tp", (0, 1)),
            ("2", "tp", (2, 3)),
            ("3", "dp", (0, 2)),
            ("4", "dp", (1, 3)),
        ],
    )
    teams = Teams(some)
    assert [(team.description, team.groups, team.classes) for team in teams.teams] == [
        ("world", (0,), (0, 1, 0, 1)),
        ("tp", (1, 2), (0, 1)),
        ("dp", (3,), (0, 0)),
        ("dp", (4,), (1, 1)),
    ]
    assert [team.place_of(1) for team in teams.teams] == [None, 1, None, None]
    assert teams.group_of(1, "1") == 1
    with pytest.raises(MergeError, match="rank 1 communicates in group 2, which"):
        teams.group_of(1, "2")


def test_a_peer_is_told_by_the_smallest_group_in_which_its_class_has_one_place() -> None:
    groups = [("0", "world", (0, 1, 2, 3)), ("1", "mp", (0, 2)), ("2", "mp", (1, 3)), ("3", "dp", (0, 1))]
    teams = Teams(world([0, 0, 1, 1], [*groups, ("4", "dp", (2, 3))]))
    assert teams.find_link(0, 2) == 1
    assert teams.find_link(1, 0) == 1, "both ends are told by one group"
    assert teams.find_link(0, 3) is None, "in the world's group the class has two places"
    assert teams.find_link(0, 1) is None, "its own class"


def test_a_ranks_second_group_of_a_description_is_another_team() -> None:
    some = world([0, 0], [("1", "undefined", (0, 1)), ("2", "undefined", (0, 1))])
    assert [team.groups for team in Teams(some).teams] == [(0,), (1,)]


def test_ranks_of_a_class_in_groups_of_different_make_are_refused() -> None:
    some = world([0, 0, 1], [("1", "tp", (0, 2)), ("2", "tp", (1,))])
    with pytest.raises(MergeError, match=r"the ranks of class 0 are in groups of different make \(tp\)"):
        Teams(some)
