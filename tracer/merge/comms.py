"""The communications of one rank, as it recorded them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.record.trace import Trace

_MESSAGES = ("c10d::send", "c10d::recv_", "c10d::recv_any_source_")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommRecord:
    """A communication as one rank recorded it."""

    node: int  # local
    op: str
    group: tuple[int, ...]  # global ranks, in group order
    group_name: str
    order: int
    backend_sequence: int
    peer: int  # global rank of root, source or destination; -1: none
    tag: int
    reduce_op: int
    is_async: bool
    work_start_ns: int | None  # on the backend's thread
    work_end_ns: int | None
    waited_ns: int | None = None  # how long the program waited for it; None: nobody was seen to
    sent_bytes: int = 0  # what this rank gives, and gets
    received_bytes: int = 0
    dtypes: str = ""  # of its tensors; '': it has none
    backend: str = ""  # of its group; '': unknown
    is_failed: bool = False  # it raised: the backend has not taken it
    incarnation: int = 0  # how many groups of this name there were before this one; below 0: that was not seen
    number: int | None = None  # among the group's collectives or in its lane, since the group was made; None: unknown
    doubt: str = ""  # why its number, or its place in the recording, may be wrong; '': it is right
    from_barrier: bool | None = None  # whether the recording began at a barrier of all ranks; None: not told

    @property
    def is_p2p(self) -> bool:
        """Whether it is a message and not a collective."""
        return self.op in _MESSAGES


def read_comms(
    trace: Trace,
    rows: NDArray[np.void],
    nodes: NDArray[np.int64],
    ops: NDArray[np.int64],
    sent: NDArray[np.int64],
    received: NDArray[np.int64],
    dtypes: Sequence[str],
    is_failed: NDArray[np.bool_],
) -> list[CommRecord]:
    """Return a rank's communications.

    Args:
        trace: the rank's.
        rows: [communications] their records (`format.COMM`), in program order.
        nodes: [communications] their nodes.
        ops: [communications] their operators' numbers.
        sent: [communications] bytes that the rank gives.
        received: [communications] bytes that it gets.
        dtypes: [communications] of the tensors that go in and come out.
        is_failed: [communications] which raised.
    """
    works: dict[int, tuple[int, int]] = {}
    waited: dict[int, int] = {}
    for thread in trace.threads:
        columns = (thread.works[name].tolist() for name in ("comm_id", "start_ns", "end_ns"))
        works |= {comm_id: (start, end) for comm_id, start, end in zip(*columns, strict=True)}
        lasted = thread.waits["end_ns"] - thread.waits["start_ns"]
        for comm_id, duration in zip(thread.waits["comm_id"].tolist(), lasted.tolist(), strict=True):
            waited[comm_id] = waited.get(comm_id, 0) + duration
    groups = _groups(trace)
    found = []
    names = ("id", "group", "order", "sequence", "peer", "tag", "reduce_op", "async_op")
    numbers = (nodes.tolist(), ops.tolist(), sent.tolist(), received.tolist(), dtypes, is_failed.tolist())
    for (
        node,
        op,
        sent_bytes,
        received_bytes,
        dtype,
        failed,
        comm_id,
        group,
        order,
        sequence,
        peer,
        tag,
        reduce_op,
        is_async,
    ) in zip(*numbers, *(rows[name].tolist() for name in names), strict=True):
        name, ranks, incarnation = groups[group]
        start, end = works.get(comm_id, (None, None))
        found.append(
            CommRecord(
                node=node,
                op=trace.ops[op]["name"],
                group=ranks,
                group_name=name,
                order=order,
                backend_sequence=sequence,
                peer=ranks[peer] if 0 <= peer < len(ranks) else -1,
                tag=tag,
                reduce_op=reduce_op,
                is_async=bool(is_async),
                work_start_ns=start,
                work_end_ns=end,
                waited_ns=waited.get(comm_id),
                sent_bytes=sent_bytes,
                received_bytes=received_bytes,
                dtypes=dtype,
                backend=str(trace.groups[group].get("backend") or ""),
                is_failed=failed,
                incarnation=incarnation,
            )
        )
    return found


def _groups(trace: Trace) -> Mapping[int, tuple[str, tuple[int, ...], int]]:
    """Each group's name, its global ranks, and how many of its name there were before it."""
    found: dict[int, tuple[str, tuple[int, ...], int]] = {}
    names: dict[str, int] = {}
    for number, told in sorted(trace.groups.items()):
        name = str(told["name"])
        names[name] = names.get(name, -1) + 1
        ranks = tuple(told.get("ranks") or trace.group_ranks.get(name, {}).get("ranks") or ())
        if not ranks and int(told["size"]) == int(trace.meta["world_size"]):
            ranks = tuple(range(int(told["size"])))
        found[number] = (name, ranks, names[name])
    return found
