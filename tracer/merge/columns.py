"""The graph while it is put together: nodes, edges and participants of all ranks, as columns.

A node's place in the columns is its number until the topological one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.labels import Label
from truedag.tracer.record.trace import Layout

NO_TIME = np.iinfo(np.int64).min
DATA, P2P, ORDER = 0, 1, 2
EDGE_KINDS = ("data", "p2p", "order")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRows:
    """One rank's kernels with the place of the node that each belongs to."""

    rank: int
    place: NDArray[np.int64]
    records: NDArray[np.void]  # `kernels.KERNEL`, times as of the nodes
    names: list[str]


@dataclass(slots=True)
class Assembly:
    """Nodes and edges of all ranks, as columns; a node's place is its number before the topological one."""

    rank: list[int] = field(default_factory=list)
    kind: list[str] = field(default_factory=list)
    op: list[str] = field(default_factory=list)
    label: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    stage: list[int | None] = field(default_factory=list)
    thread: list[int] = field(default_factory=list)
    stream: list[int] = field(default_factory=list)
    host_start_ns: list[int | None] = field(default_factory=list)  # the call on the host, wherever it ran
    host_end_ns: list[int | None] = field(default_factory=list)
    start_ns: list[int | None] = field(default_factory=list)
    end_ns: list[int | None] = field(default_factory=list)
    flops: list[int | None] = field(default_factory=list)
    bytes_read: list[int] = field(default_factory=list)
    bytes_written: list[int] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    sort_ns: list[int] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    src: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    dst: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    edge_kind: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    edge_bytes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    edge_layout: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # -1: none
    edge_update: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))  # dst then wrote what it read
    participants: list[dict[str, object]] = field(default_factory=list)
    kernels: list[KernelRows] = field(default_factory=list)  # one rank's each
    unlabelled: set[int] = field(default_factory=set)  # nodes that take their microbatch from their data

    @property
    def time_ns(self) -> NDArray[np.int64]:
        """When each node began, for numbering."""
        return np.array(self.sort_ns, np.int64)

    def add(
        self,
        *,
        rank: int,
        kind: str,
        op: str,
        label: str,
        labels: Label,
        sort_ns: int,
        stage: int | None = None,
        thread: int = -1,
        start_ns: int | None = None,
        end_ns: int | None = None,
        stream: int = -1,
        host_ns: tuple[int, int] | None = None,
        flops: int | None = None,
        bytes_read: int = 0,
        bytes_written: int = 0,
        inputs: str = "",
        outputs: str = "",
    ) -> int:
        """Add a node and return its place."""
        self.rank.append(rank)
        self.kind.append(kind)
        self.op.append(op)
        self.label.append(label)
        self.labels.append(labels)
        self.stage.append(stage)
        self.thread.append(thread)
        self.stream.append(stream)
        self.host_start_ns.append(None if host_ns is None else host_ns[0])
        self.host_end_ns.append(None if host_ns is None else host_ns[1])
        self.start_ns.append(start_ns)
        self.end_ns.append(end_ns)
        self.flops.append(flops)
        self.bytes_read.append(bytes_read)
        self.bytes_written.append(bytes_written)
        self.inputs.append(inputs)
        self.outputs.append(outputs)
        self.sort_ns.append(sort_ns)
        return len(self.rank) - 1


@dataclass(slots=True)
class EdgeList:
    """Edges in pieces, before they are laid end to end."""

    columns: list[tuple[NDArray[np.int64], ...]] = field(default_factory=list)

    def add(
        self,
        src: NDArray[np.int64],
        dst: NDArray[np.int64],
        kind: int,
        count: NDArray[np.int64] | None = None,
        layout: NDArray[np.int64] | None = None,
        update: NDArray[np.bool_] | None = None,
    ) -> None:
        """Add edges of one kind; without bytes they carry none, without layouts no tensor."""
        size = len(src)
        self.columns.append(
            (
                src,
                dst,
                np.full(size, kind, np.int64),
                np.zeros(size, np.int64) if count is None else count,
                np.full(size, -1, np.int64) if layout is None else layout,
                np.zeros(size, np.int64) if update is None else update.astype(np.int64),
            )
        )
