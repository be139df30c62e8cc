"""Classes of ranks are divided until the groups of each one's ranks are of one make."""

from __future__ import annotations

import numpy as np
import pytest

from truedag.tracer.dry.programs import refine_classes
from truedag.tracer.dry.world import Teams, World

GROUPS = [("1", "tp", (0, 1)), ("2", "tp", (2, 3)), ("3", "dp", (0, 2)), ("4", "dp", (1, 3))]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([0, 1, 0, 1], [0, 1, 0, 1]),
        ([5, 3, 5, 3], [0, 1, 0, 1]),
        ([0, 1, 2, 1], [0, 1, 2, 3]),  # who is with a rank of another class has another group
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_ranks_of_a_class_are_in_groups_of_one_make(given: list[int], found: list[int]) -> None:
    classes = refine_classes(np.array(given), GROUPS)
    assert classes.tolist() == found
    size = len(given)
    lowest = np.array([found.index(one) for one in found])
    nothing = np.zeros(size, np.int64)
    world = World(rank_class=classes, coordinates={}, first_expert=nothing, groups=GROUPS, sized_as=lowest)
    assert len(Teams(world).teams) >= 2
