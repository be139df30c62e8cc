"""Put a rank's kernels into the graph: when an operator ran on its GPU, nodes of what no operator launched, order.

A kernel launched outside of every operator is a node of its own, and so is the launch of a CUDA graph with all its
kernels: they ran, and which memory they read and wrote nobody saw. They are told in `meta.json` as opaque. An edge of
order leads only from what the host began earlier to what it began later, as all edges of a rank do: two operators
whose launches alternate on a stream are ordered by the first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.clock import Clock
from truedag.tracer.merge.columns import ORDER, Assembly, EdgeList, KernelRows
from truedag.tracer.merge.kernels import KERNEL_KINDS
from truedag.tracer.merge.labels import Label
from truedag.tracer.merge.launches import RankKernels, calls_of
from truedag.tracer.merge.nodes import RankNodes
from truedag.tracer.merge.streams import host_waits, order_pairs


def node_spans(tied: RankKernels) -> dict[int, tuple[int, int, int]]:
    """Return each operator's time on its GPU: its first kernel's start, its last one's end, and the first's stream."""
    kernels = tied.trace.kernels
    order = np.lexsort((kernels["start_ns"], tied.node))
    order = order[tied.node[order] >= 0]
    nodes, first = np.unique(tied.node[order], return_index=True)
    if not len(nodes):
        return {}
    ends = np.maximum.reduceat(kernels["end_ns"][order], first)
    starts, streams = kernels["start_ns"][order[first]], kernels["stream"][order[first]]
    rows = zip(starts.tolist(), ends.tolist(), streams.tolist(), strict=True)
    return dict(zip(nodes.tolist(), rows, strict=True))


def add_kernels(
    out: Assembly,
    edges: EdgeList,
    tied: RankKernels,
    nodes: RankNodes,
    place: NDArray[np.int64],
    *,
    rank: int,
    clock: Clock,
    stage: int | None,
) -> None:
    """Add the nodes of kernels that no operator launched, the edges of streams and waits, and the rows of all kernels.

    Args:
        out: what is put together.
        edges: its edges.
        tied: the rank's kernels.
        nodes: the rank's operators.
        place: [operators] the place of each in `out`.
        rank: the rank.
        clock: what brings the rank's times onto the graph's clock.
        stage: the rank's pipeline stage.
    """
    kernels = tied.trace.kernels
    owner = np.where(tied.node >= 0, np.append(place, -1)[tied.node], -1)
    begun = np.where(tied.node >= 0, np.append(nodes.start_ns, 0)[tied.node], 0)  # on the host
    for alone in _launched_together(tied):
        owner[alone], begun[alone] = _add_alone(out, tied, alone, rank=rank, clock=clock, stage=stage)
    before, after = order_pairs(kernels, tied.trace.syncs, tied.waits)
    forward = begun[before] < begun[after]
    edges.add(owner[before[forward]], owner[after[forward]], ORDER)
    _hold_host(edges, tied, nodes, place, owner, begun)
    records = kernels.copy()
    for name in ("start_ns", "end_ns"):
        records[name] = clock.correct(records[name])
    out.kernels.append(KernelRows(rank=rank, place=owner, records=records, names=tied.trace.names))


def _launched_together(tied: RankKernels) -> list[NDArray[np.int64]]:
    """The kernels outside of every operator, those of one launch together."""
    alone = np.flatnonzero(tied.node < 0)
    if not len(alone):
        return []
    launch = np.where(tied.call[alone] >= 0, tied.call[alone], -1 - alone)
    order = np.argsort(launch, kind="stable")
    return np.split(alone[order], np.flatnonzero(np.diff(launch[order])) + 1)


def _add_alone(
    out: Assembly, tied: RankKernels, alone: NDArray[np.int64], *, rank: int, clock: Clock, stage: int | None
) -> tuple[int, int]:
    """Add the node of one launch; return its place and when the host began it."""
    kernels, calls = tied.trace.kernels[alone], tied.trace.calls
    first = int(kernels["start_ns"].argmin())
    start, end = int(kernels["start_ns"][first]), int(kernels["end_ns"].max())
    call = int(tied.call[alone[0]])
    begun = start if call < 0 else int(calls["start_ns"][call])
    is_graph = tied.is_graph(int(alone[0]))
    name = tied.trace.names[int(kernels["name"][first])]
    op = "cuda::graph" if is_graph else f"cuda::{KERNEL_KINDS[int(kernels['kind'][first])]}"
    place = out.add(
        rank=rank,
        kind="compute",
        op=op,
        label=f"CUDA graph of {len(alone)} kernels" if is_graph else _short(name),
        labels=Label(),
        sort_ns=clock.at(begun),
        stage=stage,
        thread=-1 if call < 0 else int(tied.thread[call]),
        start_ns=clock.at(start),
        end_ns=clock.at(end),
        stream=int(kernels["stream"][first]),
        host_ns=None if call < 0 else (clock.at(begun), clock.at(int(calls["end_ns"][call]))),
    )
    return place, begun


def _short(name: str) -> str:
    """Name a kernel without its template arguments and parameters."""
    return name.removeprefix("void ").partition("<")[0].partition("(")[0].strip() or name


def _hold_host(
    edges: EdgeList,
    tied: RankKernels,
    nodes: RankNodes,
    place: NDArray[np.int64],
    owner: NDArray[np.int64],
    begun: NDArray[np.int64],
) -> None:
    """Lead from what the host waited for to the operator that its thread begins next."""
    trace = tied.trace
    wait, kernel = host_waits(trace.syncs, tied.waits)
    call = calls_of(trace.syncs, trace.calls)[wait]
    call, kernel = call[call >= 0], kernel[call >= 0]
    for thread in np.unique(tied.thread[call]).tolist():
        mine = np.flatnonzero(nodes.thread == thread)
        here = tied.thread[call] == thread
        following = np.searchsorted(nodes.start_ns[mine], trace.calls["end_ns"][call[here]], "left")
        held = following < len(mine)
        following, waited = mine[following[held]], kernel[here][held]
        forward = begun[waited] < nodes.start_ns[following]
        edges.add(owner[waited[forward]], place[following[forward]], ORDER)
