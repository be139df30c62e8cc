"""Where each part of a model runs: sizes, coordinates and groups of every axis. Pure arithmetic, no torch.

Theory of operation (megatron-core's order, "tp-cp-ep-dp-pp", the first axis varying fastest):

    dense layers    rank = tp + TP * (cp + CP * (dp + DP * pp))
    expert layers   rank = etp + ETP * (ep + EP * (edp + EDP * pp))

Both factor the same ranks of a stage: TP * CP * DP = ETP * EP * EDP.

Two notations, told apart by ETP:

    TP2-PP2-DP2-EP2-ETP1   folded: every axis is named, DP is the dense layers', the world is TP * CP * PP * DP (8
                           ranks); the expert axes are laid over the same ranks
    EP64-TP8-PP2-DP2       orthogonal: the product is the world (2048 ranks); experts are tensor-parallel like the rest
                           (ETP = TP), DP is the experts' replication (EDP, but for CP), and dense layers see
                           DP = EP * DP

Both may name CP, and VPP, which is no axis of ranks: a stage holds VPP chunks of consecutive layers, and chunk c of
stage s is the block c * PP + s of all PP * VPP.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from truedag.parallel.errors import StrategyError

Axis = Literal["tp", "cp", "dp", "pp", "etp", "ep", "edp"]
Notation = Literal["folded", "orthogonal"]

AXES: tuple[Axis, ...] = get_args(Axis)
_DENSE: tuple[Axis, ...] = ("tp", "cp", "dp", "pp")
_EXPERT: tuple[Axis, ...] = ("etp", "ep", "edp", "pp")
_TOKEN = re.compile(r"^([A-Z]+)([0-9]+)$")
_MOST_RANKS = 2**20
_TOKENS = ("TP", "CP", "PP", "VPP", "DP", "EP", "ETP")


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """How many ranks each axis has, in megatron-core's terms.

    Raises:
        StrategyError: a size is not positive, or the expert axes do not fit over the ranks of a stage.
    """

    tp: int = 1
    """Tensor-parallel size of the dense layers."""

    cp: int = 1
    """Context-parallel size: ranks over which a sequence is split."""

    pp: int = 1
    """Pipeline stages."""

    vpp: int = 1
    """Chunks of the model on each stage; more than one are run interleaved."""

    dp: int = 1
    """Replicas of the dense layers."""

    ep: int = 1
    """Expert-parallel size: ranks over which a layer's experts are spread."""

    etp: int = 1
    """Tensor-parallel size of each expert."""

    notation: Notation = "folded"
    """How it was stated, and how it prints."""

    def __post_init__(self) -> None:
        for axis in ("tp", "cp", "pp", "vpp", "dp", "ep", "etp"):
            if (size := getattr(self, axis)) < 1:
                raise StrategyError(f"{axis}={size}: the size of an axis must be at least 1")
        if self.world_size > _MOST_RANKS or self.ep * self.etp > _MOST_RANKS:
            raise StrategyError(f"{self} has {self.world_size} ranks; the most is {_MOST_RANKS}")
        if self.stage_size % (self.ep * self.etp) != 0:
            etp = math.gcd(self.stage_size, self.etp)
            ep = nearest_divisor(self.stage_size // etp, self.ep)
            raise StrategyError(
                f"EP{self.ep} x ETP{self.etp} = {self.ep * self.etp} ranks do not divide the {self.stage_size} ranks "
                f"of a stage ({self._stage_factors()}), over which the experts are laid; "
                f"nearest valid: EP{ep}-ETP{etp}"
            )
        if self.notation == "orthogonal" and self.etp != self.tp:
            raise StrategyError(f"etp={self.etp}, tp={self.tp}: in the orthogonal notation experts have ETP = TP")
        if self.vpp > 1 and self.pp == 1:
            raise StrategyError(f"VPP{self.vpp}: only a pipeline of at least two stages (PP) interleaves model chunks")

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tp * self.cp * self.dp

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.stage_size * self.pp

    @property
    def edp(self) -> int:
        """Replicas of each expert."""
        return self.stage_size // (self.ep * self.etp)

    def _stage_factors(self) -> str:
        context = f" x CP{self.cp}" if self.cp > 1 else ""
        return f"TP{self.tp}{context} x DP{self.dp}"

    def size(self, axis: Axis) -> int:
        """Return the size of an axis."""
        size: int = getattr(self, axis)
        return size

    def __str__(self) -> str:
        context = f"-CP{self.cp}" if self.cp > 1 else ""
        virtual = f"-VPP{self.vpp}" if self.vpp > 1 else ""
        if self.notation == "orthogonal":
            return f"EP{self.ep}-TP{self.tp}{context}-PP{self.pp}{virtual}-DP{self.dp // self.ep}"
        return f"TP{self.tp}{context}-PP{self.pp}{virtual}-DP{self.dp}-EP{self.ep}-ETP{self.etp}"

    def describe(self) -> str:
        """Return the strategy in full: its notation, and every axis in megatron-core's terms."""
        context = f" CP={self.cp}" if self.cp > 1 else ""
        virtual = f" VPP={self.vpp}" if self.vpp > 1 else ""
        return (
            f"{self} ({self.notation}, {self.world_size} ranks): dense TP={self.tp}{context} DP={self.dp}, "
            f"experts ETP={self.etp} EP={self.ep} EDP={self.edp}, PP={self.pp}{virtual}"
        )

    def coordinates(self, rank: int) -> dict[Axis, int]:
        """Return where a rank stands on every axis; on cp only where there is more than one place.

        Raises:
            StrategyError: there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise StrategyError(f"rank {rank}: {self} has ranks 0 to {self.world_size - 1}")
        place: dict[Axis, int] = {}
        for axes in (_DENSE, _EXPERT):
            rest = rank
            for axis in axes:
                rest, place[axis] = divmod(rest, self.size(axis))
        return {axis: place[axis] for axis in AXES if axis != "cp" or self.cp > 1}

    def rank_at(self, place: dict[Axis, int]) -> int:
        """Return the rank that stands at dense coordinates (tp, cp, dp, pp) or at expert ones (etp, ep, edp, pp).

        cp may be left out where its size is 1.
        """
        axes = _EXPERT if "edp" in place else _DENSE
        rank = 0
        for axis in reversed(axes):
            rank = rank * self.size(axis) + (place[axis] if self.size(axis) > 1 else 0)
        return rank

    def groups(self, axis: Axis) -> list[tuple[int, ...]]:
        """Return the groups of an axis, each in the axis' order, sorted by their first rank.

        They partition the ranks; the ranks of a group differ in nothing but their place on the axis.
        """
        axes = _DENSE if axis in _DENSE else _EXPERT
        stride = math.prod(self.size(before) for before in axes[: axes.index(axis)])
        span = stride * self.size(axis)
        return [
            tuple(range(start + offset, start + offset + span, stride))
            for start in range(0, self.world_size, span)
            for offset in range(stride)
        ]

    def group_of(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """Return the group of an axis that a rank belongs to."""
        axes = _DENSE if axis in _DENSE else _EXPERT
        stride = math.prod(self.size(before) for before in axes[: axes.index(axis)])
        span = stride * self.size(axis)
        first = rank // span * span + rank % stride
        return tuple(range(first, first + span, stride))

    def gradient_group_of(self, rank: int) -> tuple[int, ...]:
        """Return the ranks over which a rank's dense gradients are summed: those of its cp and dp groups together."""
        return tuple(sorted(other for replica in self.group_of("dp", rank) for other in self.group_of("cp", replica)))

    def layers_of_chunk(self, num_layers: int, stage: int, chunk: int) -> range:
        """Return the layers (0-based, in the whole model) of a chunk of a stage.

        `num_layers` must be a multiple of PP * VPP.
        """
        per_chunk = num_layers // (self.pp * self.vpp)
        block = chunk * self.pp + stage
        return range(block * per_chunk, (block + 1) * per_chunk)

    def layers_of_stage(self, num_layers: int, stage: int) -> tuple[int, ...]:
        """Return the layers (0-based, in the whole model) of a stage, all its chunks together, in ascending order."""
        return tuple(layer for chunk in range(self.vpp) for layer in self.layers_of_chunk(num_layers, stage, chunk))

    def stage_of_layer(self, num_layers: int, layer: int) -> int:
        """Return the stage that holds a layer (0-based, in the whole model)."""
        return layer // (num_layers // (self.pp * self.vpp)) % self.pp

    def experts_of_rank(self, num_experts: int, rank: int) -> range:
        """Return the experts (0-based, in each of its layers) of a rank; `num_experts` must be a multiple of EP."""
        per_rank = num_experts // self.ep
        place = self.coordinates(rank)["ep"]
        return range(place * per_rank, (place + 1) * per_rank)

    def ranks_of_expert(self, num_layers: int, num_experts: int, layer: int, expert: int) -> list[int]:
        """Return all ranks that hold a shard of an expert of a layer, in ascending order."""
        stage, place = self.stage_of_layer(num_layers, layer), expert // (num_experts // self.ep)
        return [
            self.rank_at({"etp": etp, "ep": place, "edp": edp, "pp": stage})
            for edp in range(self.edp)
            for etp in range(self.etp)
        ]


def parse_strategy(text: str) -> Strategy:
    """Return the strategy that a notation states: folded where it names ETP, orthogonal where it names EP alone.

    An axis that is not named has size 1.

    Raises:
        StrategyError: a part is malformed, unknown or repeated, or the sizes do not fit together.
    """
    sizes: dict[str, int] = {}
    for part in text.split("-"):
        match = _TOKEN.match(part)
        if match is None or match.group(1) not in _TOKENS:
            raise StrategyError(
                f"strategy {text!r}: {part!r} is not an axis with its size; the axes are {', '.join(_TOKENS)}, "
                f"for example TP2-PP2-DP2-EP2-ETP1 (folded) or EP64-TP8-PP2-DP2 (orthogonal)"
            )
        if match.group(1) in sizes:
            raise StrategyError(f"strategy {text!r}: {match.group(1)} is named twice")
        sizes[match.group(1)] = int(match.group(2))
    tp, cp, pp, vpp, dp, ep = (sizes.get(axis, 1) for axis in ("TP", "CP", "PP", "VPP", "DP", "EP"))
    if "ETP" in sizes or "EP" not in sizes:
        return Strategy(tp=tp, cp=cp, pp=pp, vpp=vpp, dp=dp, ep=ep, etp=sizes.get("ETP", 1), notation="folded")
    return Strategy(tp=tp, cp=cp, pp=pp, vpp=vpp, dp=ep * dp, ep=ep, etp=tp, notation="orthogonal")


def nearest_divisor(number: int, wanted: int) -> int:
    """Return the divisor of a number that is nearest to the wanted one, the smaller of two."""
    divisors = [candidate for candidate in range(1, number + 1) if number % candidate == 0]
    return min(divisors, key=lambda candidate: (abs(candidate - wanted), candidate))
