"""Put a rank's kernels into the graph: when an operator ran on its GPU, nodes of what no operator launched, order.

A kernel launched outside of every operator is a node of its own, and so is the launch of a CUDA graph with all its
kernels: they ran, and which memory they read and wrote nobody saw. They are told in `meta.json` as opaque. An edge of
order leads only from what the host began earlier to what it began later, as all edges of a rank do: two operators
whose launches alternate on a stream are ordered by the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.kernels import KERNEL_KINDS
from truedag.tracer.merge.launches import RankKernels, calls_of
from truedag.tracer.merge.nodes import RankNodes
from truedag.tracer.merge.streams import host_waits, order_pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchNode:
    """What was launched by no operator. `host_end_ns` None: before the recording."""

    op: str
    label: str
    begun_ns: int
    host_end_ns: int | None
    thread: int
    start_ns: int
    end_ns: int
    stream: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceNodes:
    """What a rank's kernels add to its part of the graph."""

    launches: list[LaunchNode]  # their local numbers follow each other
    before: NDArray[np.int64]  # edges of order, by local numbers
    after: NDArray[np.int64]
    owner: NDArray[np.int64]  # [kernels] the local number of each one's node


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpans:
    """Operators that ran on a GPU: their first kernel's start, their last one's end, and the first's stream."""

    node: NDArray[np.int64]
    start_ns: NDArray[np.int64]
    end_ns: NDArray[np.int64]
    stream: NDArray[np.int64]


def node_spans(tied: RankKernels) -> NodeSpans:
    """Return each operator's time on its GPU."""
    kernels = tied.trace.kernels
    order = np.lexsort((kernels["start_ns"], tied.node))
    order = order[tied.node[order] >= 0]
    nodes, first = np.unique(tied.node[order], return_index=True)
    ends = np.maximum.reduceat(kernels["end_ns"][order], first) if len(first) else np.zeros(0, np.int64)
    return NodeSpans(
        node=nodes,
        start_ns=kernels["start_ns"][order[first]],
        end_ns=ends,
        stream=kernels["stream"][order[first]],
    )


def find_device_nodes(tied: RankKernels, nodes: RankNodes, first: int) -> DeviceNodes:
    """Find the nodes of kernels that no operator launched, and the edges of streams and waits.

    Args:
        tied: the rank's kernels.
        nodes: the rank's operators.
        first: the local number of the first node that is added.
    """
    kernels = tied.trace.kernels
    owner = tied.node.copy()
    begun = np.where(tied.node >= 0, np.append(nodes.start_ns, 0)[tied.node], 0)  # on the host
    launches: list[LaunchNode] = []
    for alone in _launched_together(tied):
        one = _launch(tied, alone)
        owner[alone], begun[alone] = first + len(launches), one.begun_ns
        launches.append(one)
    before, after = order_pairs(kernels, tied.trace.syncs, tied.waits)
    forward = begun[before] < begun[after]
    held = _hold_host(tied, nodes, owner, begun)
    return DeviceNodes(
        launches=launches,
        before=np.concatenate([owner[before[forward]], *(src for src, _ in held)]),
        after=np.concatenate([owner[after[forward]], *(dst for _, dst in held)]),
        owner=owner,
    )


def _launched_together(tied: RankKernels) -> list[NDArray[np.int64]]:
    """The kernels outside of every operator, those of one launch together."""
    alone = np.flatnonzero(tied.node < 0)
    if not len(alone):
        return []
    launch = np.where(tied.call[alone] >= 0, tied.call[alone], -1 - alone)
    order = np.argsort(launch, kind="stable")
    return np.split(alone[order], np.flatnonzero(np.diff(launch[order])) + 1)


def _launch(tied: RankKernels, alone: NDArray[np.int64]) -> LaunchNode:
    kernels, calls = tied.trace.kernels[alone], tied.trace.calls
    first = int(kernels["start_ns"].argmin())
    start, end = int(kernels["start_ns"][first]), int(kernels["end_ns"].max())
    call = int(tied.call[alone[0]])
    is_graph = tied.is_graph(int(alone[0]))
    name = tied.trace.names[int(kernels["name"][first])]
    return LaunchNode(
        op="cuda::graph" if is_graph else f"cuda::{KERNEL_KINDS[int(kernels['kind'][first])]}",
        label=f"CUDA graph of {len(alone)} kernels" if is_graph else _short(name),
        begun_ns=start if call < 0 else int(calls["start_ns"][call]),
        host_end_ns=None if call < 0 else int(calls["end_ns"][call]),
        thread=-1 if call < 0 else int(tied.thread[call]),
        start_ns=start,
        end_ns=end,
        stream=int(kernels["stream"][first]),
    )


def _short(name: str) -> str:
    """Name a kernel without its template arguments and parameters."""
    return name.removeprefix("void ").partition("<")[0].partition("(")[0].strip() or name


def _hold_host(
    tied: RankKernels, nodes: RankNodes, owner: NDArray[np.int64], begun: NDArray[np.int64]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Lead from what the host waited for to the operator that its thread begins next."""
    trace = tied.trace
    wait, kernel = host_waits(trace.syncs, tied.waits)
    call = calls_of(trace.syncs, trace.calls)[wait]
    call, kernel = call[call >= 0], kernel[call >= 0]
    found = []
    for thread in np.unique(tied.thread[call]).tolist():
        mine = np.flatnonzero(nodes.thread == thread)
        here = tied.thread[call] == thread
        following = np.searchsorted(nodes.start_ns[mine], trace.calls["end_ns"][call[here]], "left")
        held = following < len(mine)
        next_one, waited = mine[following[held]], kernel[here][held]
        forward = begun[waited] < nodes.start_ns[next_one]
        found.append((owner[waited[forward]], next_one[forward]))
    return found
