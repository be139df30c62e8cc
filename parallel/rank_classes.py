"""Which ranks of a deployment must execute the same program, and which groups each of them is in. No torch.

Theory of operation. What a rank runs follows from few of its coordinates: its stage says which layers, and that is all
but for these. In training the first tensor-parallel rank counts the parameters that all of them hold, when it sums up
the gradient's norm. A sharded optimizer gives each replica, dense and expert, another slice of the parameters. Under
context parallelism a rank attends to as many keys as come before its part. In inference a replica has the prompts that
fall to it, of their lengths. Which experts a rank holds changes their numbers, and the routing the number of tokens:
sizes, and not the program.

A rank's groups are those of any other rank of its class, moved: a group spans some values of some axes of the dense or
of the expert layers, and the rank keeps its place on all others (`GroupRole`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from truedag.parallel.inference import InferenceConfig
from truedag.parallel.strategy import Axis, Strategy
from truedag.parallel.training import TrainingConfig

ClassKey: TypeAlias = tuple[tuple[str, int], ...]

_FACTORS: tuple[tuple[Axis, ...], ...] = (("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankClass:
    """Ranks that execute the same program."""

    key: ClassKey
    """What they have in common, by name."""

    ranks: tuple[int, ...]
    """In ascending order; the first is executed for all."""

    alike: tuple[tuple[int, ...], ...]
    """Those whose sizes are equal too, ascending, by their first ranks: several where the routing sends ranks different
    numbers of tokens; the first of each is executed, or its sizes are derived."""

    @property
    def representative(self) -> int:
        """The rank that is executed for all."""
        return self.ranks[0]


def find_rank_classes(strategy: Strategy, workload: TrainingConfig | InferenceConfig) -> list[RankClass]:
    """Return the classes of all ranks, by their first rank."""
    key = {"pp": places_on(strategy, "pp")}
    if isinstance(workload, InferenceConfig):
        served = [
            tuple(workload.length_of(prompt) for prompt in workload.prompts_of(replica, strategy.dp))
            for replica in range(strategy.dp)
        ]
        if len(set(served)) > 1:  # a replica is named by the first that serves the same
            key["prompts_as_dp"] = np.array([served.index(own) for own in served])[places_on(strategy, "dp")]
    else:
        if strategy.tp > 1:
            key["is_first_tp"] = (places_on(strategy, "tp") == 0).astype(np.int64)
        if strategy.cp > 1:
            key["cp"] = places_on(strategy, "cp")
        if workload.distributed_optimizer:
            key |= {"dp": places_on(strategy, "dp"), "edp": places_on(strategy, "edp")}
    values, number = np.unique(np.stack(list(key.values()), axis=1), axis=0, return_inverse=True)
    order = np.argsort(number.ravel(), kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(number.ravel()))[:-1])
    classes = [
        RankClass(key=tuple(zip(key, value, strict=True)), ranks=tuple(ranks.tolist()), alike=(tuple(ranks.tolist()),))
        for value, ranks in zip(values.tolist(), parts, strict=True)
    ]
    return sorted(classes, key=lambda one: one.representative)


def places_on(strategy: Strategy, axis: Axis) -> NDArray[np.int64]:
    """Return where each rank stands on an axis, [world]; all at 0 where it is of one place."""
    axes = _FACTORS[0] if axis in _FACTORS[0] else _FACTORS[1]
    stride = math.prod(strategy.size(before) for before in axes[: axes.index(axis)])
    return np.arange(strategy.world_size) // stride % strategy.size(axis)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRole:
    """What a process group is to its members, wherever they stand."""

    axes: tuple[Axis, ...]
    """The dense layers' axes, or the expert layers'."""

    spans: tuple[tuple[int, ...], ...]
    """By axis: the places on it that the group spans; () where it stays at the member's own."""

    @classmethod
    def of(cls, strategy: Strategy, members: Sequence[int], *, expert: bool | None = None) -> GroupRole | None:
        """Return the role of a group of ranks; None if it is no product of places on axes.

        Args:
            strategy: the world's.
            members: its global ranks.
            expert: whether it is told to be a group of the expert layers; None: either.
        """
        choices = _FACTORS if expert is None else (_FACTORS[expert],)
        for axes in choices:
            places = [strategy.coordinates(rank) for rank in members]
            values = [sorted({place.get(axis, 0) for place in places}) for axis in axes]
            spans = tuple(tuple(value) if len(value) > 1 else () for value in values)
            role = cls(axes=axes, spans=spans)
            if role.members(strategy, members[0]) == tuple(sorted(members)):
                return role
        return None

    def members(self, strategy: Strategy, rank: int) -> tuple[int, ...]:
        """Return the ranks of the group of this role that stands where `rank` does, in ascending order."""
        own = strategy.coordinates(rank)
        choices = [span or (own.get(axis, 0),) for axis, span in zip(self.axes, self.spans, strict=True)]
        return tuple(
            sorted(strategy.rank_at(dict(zip(self.axes, place, strict=True))) for place in itertools.product(*choices))
        )
