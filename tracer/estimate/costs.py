"""How long an operator or a communication takes on a device, alone: roofline, and alpha-beta by placement."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log2

from truedag.tracer.errors import GraphError
from truedag.tracer.estimate.device import Device

# Give memory out, or hand a number to the host: no kernel.
_NO_KERNEL = frozenset(
    {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
     "aten::_local_scalar_dense"}
)  # fmt: skip
# Read of their first argument only what they write.
_PICKING = frozenset({"aten::embedding", "aten::index_select", "aten::index", "aten::gather"})
_ALL_REDUCE = frozenset({"allreduce_", "allreduce_coalesced_"})
_ALL_GATHER = frozenset({"allgather_", "_allgather_base_", "allgather_coalesced_", "allgather_into_tensor_coalesced_"})
_REDUCE_SCATTER = frozenset({"reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"})
_ALL_TO_ALL = frozenset({"alltoall_", "alltoall_base_"})

ASSUMPTIONS = (
    "an operator takes the longest of its counted products at the device's reachable rate, its bytes moved once, and "
    "the smallest kernel; one runs at a time on a GPU, in program order; the host is never late",
    "operators are those that ran on the CPU: what a GPU has one kernel for and the CPU several operators (norms, "
    "optimizers), or a compiler would fuse, is as many kernels here",
    "a communication begins when its last participant has arrived; those of one group follow each other, those of "
    "several groups and computation do not slow each other down",
    "communications take a base, a time for each hop and the bytes at the slowest link: rings, for all-reduce rings or "
    "trees, whichever is faster; every pair at once in all-to-all",
    "where ranks of a class have sizes of their own, each takes as long as the largest; --all-ranks tells them apart",
    "hops take what those of short messages do, whatever is sent: long messages over many nodes come out too fast",
    "ranks fill nodes in order; messages of a group that is in several nodes go from one to another; links are never "
    "shared with other jobs",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the ranks of a process group are; of several alike groups, the one that is spread most."""

    size: int
    """Ranks of the group."""

    num_nodes: int

    @property
    def per_node(self) -> float:
        """Ranks of the group in a node."""
        return self.size / self.num_nodes


def operator_ns(device: Device, op: str, flops: int | None, num_bytes: tuple[int, int], dtype: str) -> float:
    """Return how long an operator takes.

    Args:
        device: where.
        op: its name.
        flops: of its products; None: it has none.
        num_bytes: read, and written.
        dtype: of what it computes.

    Raises:
        GraphError: the device file has no peak for the dtype of a product.
    """
    if op in _NO_KERNEL:
        return 0.0
    read, written = num_bytes
    moved = 2 * written if op in _PICKING else read + written
    longest = max(device.kernel_ns, moved / (device.memory_bandwidth * device.memory_fraction) * 1e9)
    if flops:
        peak = device.peak_flops.get(dtype)
        if peak is None:
            raise GraphError(f"the device file of {device.name} lacks peak_flops for {dtype}, which {op} needs: add it")
        longest = max(longest, flops / (peak * device.product_fraction) * 1e9)
    return longest


def communication_ns(device: Device, op: str, sent: int, received: int, placement: Placement) -> float:
    """Return how long a communication takes once all have arrived.

    Args:
        device: of every rank.
        op: its name.
        sent: most bytes that a participant gives.
        received: most bytes that one gets.
        placement: of its group.

    Source: Thakur, Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in MPICH"; the hops
    of rings and trees as NCCL 2.28 counts them in src/graph/tuning.cc.
    """
    size, nodes = placement.size, placement.num_nodes
    name = op.removeprefix("c10d::")
    if size == 1:
        return device.kernel_ns
    inside = device.inside_bandwidth * device.link_fraction
    across = device.across_bandwidth * device.link_fraction
    # Rings leave a node by as many network links as the group has ranks there.
    ring = inside if nodes == 1 else min(inside, across * placement.per_node)
    hops, depth_ns = _ring_ns(device, placement), _tree_ns(device, placement)
    share = (size - 1) / size
    if name in _ALL_REDUCE:
        by_ring = 2 * hops + 2 * share * sent / ring * 1e9
        by_tree = 2 * depth_ns + 2 * sent / ring * 1e9
        return device.base_ns + min(by_ring, by_tree)
    if name in _ALL_GATHER or name in _REDUCE_SCATTER:
        return device.base_ns + hops + share * max(sent, received) / ring * 1e9
    if name in _ALL_TO_ALL:
        moved = max(sent, received)
        near = moved * (placement.per_node - 1) / size / inside
        far = moved * (size - placement.per_node) / size / across
        latency = device.inside_ns if nodes == 1 else device.exposed_ns
        return device.base_ns + latency + max(near, far) * 1e9
    if name in ("send", "recv_", "recv_any_source_"):
        near_ns, link = (device.inside_ns, inside) if nodes == 1 else (device.exposed_ns, across)
        return device.base_ns + near_ns + max(sent, received) / link * 1e9
    return device.base_ns + depth_ns + max(sent, received) / ring * 1e9


def _ring_ns(device: Device, placement: Placement) -> float:
    """A ring's hops: one to each other rank, of which one for each other node leads to it."""
    size, nodes = placement.size, placement.num_nodes
    if nodes == 1:
        return (size - 1) * device.inside_ns
    across = device.exposed_ns if size == nodes else device.across_ns
    return (size - nodes) * max(device.inside_ns, device.overhead_ns) + (nodes - 1) * across


def _tree_ns(device: Device, placement: Placement) -> float:
    """A tree's hops, one way: from node to node by the logarithm that NCCL rounds down, and along a node's ranks."""
    depth = floor(log2(placement.num_nodes))
    return max(placement.per_node - 1, 0.0) * device.inside_ns + depth * device.exposed_ns
