"""What happened before what on different ranks, as communications tell it (DESIGN rule 5).

A message cannot have been received before its sending began, and a collective in which every rank needs something of
every other cannot end anywhere before the last one arrived. Where only some need something of some, only that holds:
of a broadcast, that nobody has it before its root arrived. An all-to-all need not move anything between two ranks, so
nothing is concluded from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.clock import Clock
from truedag.tracer.merge.comms import CommRecord
from truedag.tracer.merge.facts import Facts
from truedag.tracer.merge.match import Matched
from truedag.tracer.merge.rank_graph import RankGraph

# So few clocks are all compared with each other.
_FEW = 4
_Moment: TypeAlias = tuple[int, int, int]  # a rank, its time, how far that may be off
_EVERYONE = frozenset(
    {
        "allreduce_", "allreduce_coalesced_", "_allgather_base_", "allgather_", "allgather_coalesced_",
        "allgather_into_tensor_coalesced_", "_reduce_scatter_base_", "reduce_scatter_",
        "reduce_scatter_tensor_coalesced_", "barrier",
    }
)  # fmt: skip
_FROM_ROOT = frozenset({"broadcast_", "scatter_"})
_TO_ROOT = frozenset({"reduce_", "gather_"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """When a rank did what, as far as it matters here."""

    clock: str
    """Names its host's clock."""
    start_ns: Mapping[int, int] | NDArray[np.int64]
    """When the host began each operator, by its local node."""
    has_kernels: bool
    """Whether communications ran on a GPU, so that their times are of its clock."""
    kernel_error_ns: int | None
    """How far that may be off; None: nobody knows."""

    @classmethod
    def of(cls, graph: RankGraph) -> Moments:
        """Take them from a rank's part of the graph."""
        return cls(
            clock=str(graph.nodes.trace.meta["boot_id"]),
            start_ns=graph.nodes.start_ns,
            has_kernels=graph.kernels is not None,
            kernel_error_ns=0 if graph.kernels is None else graph.kernels.clock.error_ns,
        )

    def arrival(self, record: CommRecord) -> tuple[int, int] | None:
        """When it arrived, and how far that may be off; None: unknown."""
        # A backend may announce a message's work when it is on its way already; not so the kernel that sends it.
        if record.work_start_ns is None or (record.op == "c10d::send" and not self.has_kernels):
            return int(self.start_ns[record.node]), 0  # the call, on the host
        return None if self.kernel_error_ns is None else (record.work_start_ns, self.kernel_error_ns)

    def end(self, record: CommRecord) -> tuple[int, int] | None:
        """When it was done, and how far that may be off; None: unknown."""
        if record.work_end_ns is None or self.kernel_error_ns is None:
            return None
        return record.work_end_ns, self.kernel_error_ns


def find_order(matched: Matched, ranks: Mapping[int, Moments], clocks: Mapping[int, Clock]) -> Facts:
    """Return what the joined communications tell of ranks (their numbers) whose clocks are not the same.

    Of the ranks of one clock, only the last that arrived and the first that was done say anything. Of many clocks,
    only what the one that seems to be the last or the first, and the first rank's, say of all others.

    Args:
        matched: the communications.
        ranks: those that took part.
        clocks: theirs, as far as they are known.
    """
    hosts = _Hosts({rank: one.clock for rank, one in ranks.items()}, clocks)
    if hosts.num == 1:
        return Facts.of([])
    for one in matched.collectives:
        arrivals, ends = _concerned(one.records)
        hosts.compare(
            [(rank, *told) for rank in arrivals if (told := ranks[rank].arrival(one.records[rank])) is not None],
            [(rank, *told) for rank in ends if (told := ranks[rank].end(one.records[rank])) is not None],
        )
    for message in matched.messages:
        sent = ranks[message.source].arrival(message.send)
        received = ranks[message.destination].end(message.receive)
        if sent is not None and received is not None:
            hosts.compare([(message.source, *sent)], [(message.destination, *received)])
    return Facts.of(hosts.rows)


def _concerned(records: Mapping[int, CommRecord]) -> tuple[list[int], list[int]]:
    """Whose arrival comes before whose end."""
    first = next(iter(records.values()))
    op, root = first.op.rpartition("::")[2], first.peer
    everyone = list(records)
    if op in _EVERYONE:
        # Who gives nothing is waited for by nobody.
        return [rank for rank in everyone if records[rank].sent_bytes > 0 or op == "barrier"], everyone
    if op in _FROM_ROOT and root in records and records[root].sent_bytes > 0:
        return [root], [rank for rank in everyone if rank != root]
    if op in _TO_ROOT and root in records:
        return [rank for rank in everyone if rank != root and records[rank].sent_bytes > 0], [root]
    return [], []


class _Hosts:
    """Compares what ranks of different clocks did."""

    def __init__(self, clock: Mapping[int, str], clocks: Mapping[int, Clock]) -> None:
        self.rows: list[tuple[int, int, int, int, int]] = []
        self._clock = clock
        self._clocks = clocks
        self._reference = clock[min(clock)]
        self.num = len(set(clock.values()))

    def compare(self, arrivals: Sequence[_Moment], ends: Sequence[_Moment]) -> None:
        """Add the rows of one communication: arrivals and ends are (rank, time, slack)."""
        last: dict[str, _Moment] = {}
        for one in sorted(arrivals, key=lambda one: one[1] - one[2]):
            last[self._clock[one[0]]] = one
        first: dict[str, _Moment] = {}
        for one in sorted(ends, key=lambda one: one[1] + one[2], reverse=True):
            first[self._clock[one[0]]] = one
        if not last or not first:
            return
        telling = {
            self._reference,
            max(last, key=lambda host: self._seen(last[host])),
            min(first, key=lambda host: self._seen(first[host])),
        }
        for here, (before, before_ns, before_slack) in last.items():
            for there in first if here in telling or len(first) <= _FEW else telling & first.keys():
                if here != there:
                    after, after_ns, after_slack = first[there]
                    self.rows.append((before, before_ns, after, after_ns, before_slack + after_slack))

    def _seen(self, moment: _Moment) -> int:
        return self._clocks[moment[0]].at(moment[1])
