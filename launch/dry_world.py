"""The world of a dry run: what the tracer is told of ranks that are not executed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from truedag.launch.deployment import Deployment
from truedag.parallel.rank_classes import RankClass, places_on
from truedag.parallel.strategy import AXES
from truedag.tracer.dry.world import World


def describe_world(
    deployment: Deployment, classes: Sequence[RankClass], groups: Sequence[tuple[str, str, tuple[int, ...]]]
) -> World:
    """Return what the tracer is told of ranks that are not executed."""
    strategy = deployment.strategy
    rank_class, sized_as = np.zeros((2, strategy.world_size), np.int64)
    for number, one in enumerate(classes):
        rank_class[list(one.ranks)] = number
        for ranks in one.alike:
            sized_as[list(ranks)] = ranks[0]
    axes = [axis for axis in AXES if axis != "cp" or strategy.cp > 1]
    coordinates = {str(axis): places_on(strategy, axis) for axis in axes}
    return World(
        rank_class=rank_class,
        coordinates=coordinates,
        first_expert=first_experts(deployment),
        groups=groups,
        sized_as=sized_as,
    )


def first_experts(deployment: Deployment) -> NDArray[np.int64]:
    """Return [world] the lowest number of a layer's experts that a rank holds; 0 where there are none."""
    per_rank = (deployment.model.num_experts or 0) // deployment.strategy.ep
    return places_on(deployment.strategy, "ep") * per_rank
