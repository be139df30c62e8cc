"""What a graph of a deployment must show: plain data, made by whoever knows strategy and model.

Nothing here is computed from the graph that is audited, and nothing of it becomes a node of any graph: it is what the
subject is compared with. Layers, experts and ranks are counted from 0 in the whole model and the whole world.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Place = tuple[str, int, int]
"""Where in a step: phase, microbatch and decode step (-1: none)."""

Group = tuple[int, ...]
"""Ranks of a process group; of a message, its source and its destination."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operators:
    """An operator that runs on all ranks of a stage, in each of some layers and places."""

    role: str
    """What it does, a role of `truedag.tracer.audit.roles`."""

    layers: tuple[int, ...]
    """In which layers; (-1,): outside of the layers."""

    stage: int | None = None
    """On which stage, where `layers` does not say it."""

    per_expert: bool = False
    """Once for each expert of the layer, on the ranks that hold it."""

    phases: tuple[str, ...] = ()
    """In all places of these phases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """A communication that some groups make, so many times in each place."""

    purpose: str
    """What it is for, a purpose of `truedag.tracer.audit.roles`."""

    axis: str
    """Over which axis: tp, ep, pp, ...; tp+pp spans both."""

    kind: str
    """all-reduce, reduce-scatter, all-gather, all-to-all, message, ..."""

    layer: int
    """In which layer; -1: outside of the layers."""

    groups: tuple[Group, ...]
    """Which groups make it."""

    places: tuple[Place, ...]
    """When."""

    num: int = 1
    """How often each group makes it in each place."""

    send_bytes: tuple[int, ...] | None = None
    """Bytes that a rank gives, in each of `places`; None: they depend on the data."""

    recv_bytes: tuple[int, ...] | None = None
    """Bytes that a rank gets."""

    total_bytes: tuple[int, int] | None = None
    """Where it may be cut into buckets: least and most bytes that a rank gives in all; `num` is then the least count
    and there may be more."""

    in_parts: bool = False
    """A backend without the uneven form makes it of one broadcast or reduce for each rank of the group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter of the whole model."""

    name: str
    shape: tuple[int, ...]
    dim: int | None
    """Which dimension is split; None: replicated."""

    axis: str = "tp"
    """Over which axis it is split."""

    layer: int = -1
    expert: int = -1

    @property
    def size(self) -> int:
        """Numbers in it."""
        size = 1
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """All that a graph of one deployment must show."""

    name: str
    """Of the deployment."""

    strategy: str
    """In full."""

    kind: str
    """train or infer."""

    sizes: Mapping[str, int]
    """Ranks on each axis: tp, cp, pp, dp, ep, etp, edp."""

    coordinates: tuple[Mapping[str, int], ...]
    """Where each rank stands on each axis."""

    groups: Mapping[str, tuple[Group, ...]]
    """The groups of each axis."""

    stage_of_layer: tuple[int, ...]
    """Of each layer."""

    chunks: int = 1
    """Blocks of consecutive layers on a stage."""

    expert_layers: tuple[int, ...] = ()
    """Layers that have experts."""

    num_experts: int = 0
    """In each of them."""

    ranks_of_expert: tuple[tuple[Group, ...], ...] = ()
    """By stage and expert: the ranks that hold a shard of it."""

    tokens_per_pass: int | None = None
    """(token, expert) pairs of one layer in a pass of all replicas, where passes are alike and none is dropped."""

    places: tuple[Place, ...] = ()
    """All places of a step, forward and backward, prefill and decode."""

    operators: tuple[Operators, ...] = ()
    communications: tuple[Communication, ...] = ()
    optional: frozenset[str] = frozenset()
    """Purposes that may be there or not, as often as they like."""

    parameters: tuple[Parameter, ...] = ()
    bytes_per_parameter: int = 4
    training_bytes_per_parameter: float = 0.0
    """Of gradient and optimizer state that a rank keeps of each parameter that it holds, at least."""

    num_nodes: int | None = None
    """Nodes that a drawing with one node for each operator, layer and rank of one pass would have, at least."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    """What a claim may state: layers, hidden, heads, kv_heads, ffn, experts, vocabulary, batch, sequence, ..."""

    @property
    def world_size(self) -> int:
        """Ranks."""
        return len(self.coordinates)

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return self.sizes["pp"]

    @property
    def num_parameters(self) -> int:
        """Numbers in all parameters of the whole model."""
        return sum(parameter.size for parameter in self.parameters)

    def ranks_of_stage(self, stage: int) -> tuple[int, ...]:
        """Return the ranks of a stage."""
        return tuple(rank for rank, place in enumerate(self.coordinates) if place["pp"] == stage)

    def ranks_of_layer(self, layer: int) -> tuple[int, ...]:
        """Return the ranks of a layer's stage."""
        return self.ranks_of_stage(self.stage_of_layer[layer])
