"""A device as estimates need it: what its data sheet says, and what share of that programs reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU, its links to the others of its node, and its share of the node's network."""

    name: str

    peak_flops: Mapping[str, float]
    """By dtype: dense matrix products a second."""

    product_fraction: float
    """What large matrix products reach of that."""

    memory_bytes: float
    """That programs may use, or little more: what the driver keeps may be in it."""

    memory_bandwidth: float
    """Bytes a second."""

    memory_fraction: float
    """What operators that move data reach of that."""

    kernel_ns: float
    """What the smallest kernel takes."""

    inside_bandwidth: float
    """Bytes a second to the other GPUs of its node, one way."""

    across_bandwidth: float
    """Bytes a second to other nodes, one way."""

    link_fraction: float
    """What large communications reach of these."""

    base_ns: float
    """What any communication takes."""

    inside_ns: float
    """And what each hop in the node adds."""

    overhead_ns: float
    """What each hop of a ring over several nodes adds at least."""

    across_ns: float
    """What a ring's hop to another node adds, where several ranks of a node are in it."""

    exposed_ns: float
    """What a hop to another node adds that nothing hides: in trees, of messages, in rings of one rank a node."""
