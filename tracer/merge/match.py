"""Join the communications of all ranks (DESIGN rule 4): by process group and place in its sequence, never by time.

Theory of operation. A group is the tuple of its ranks, its name, and how many groups of that name a rank had before.
The n-th collective of a group on one rank is the n-th on every other, or the program would hang; so a collective is the
records with one (group, n), and it is whole when each rank of the group has exactly one, of the same operator. A
message is the n-th send from one rank to another on a group under a tag, and the n-th receive there.

n counts from when the group was made, where the ranks counted before they recorded (`numbering`): recordings may then
begin and end anywhere. Else it is the backend's own count of collectives where it can be relied on, or the place in the
recording: recordings begin at a barrier of all ranks, so that one counts from the same point everywhere, but for what
was under way already. Where there was no such barrier, or both ends of a lane recorded, but not equally much, that
would be a guess, and nothing is joined.

A join is checked against the bytes that each side gives and gets. Where they contradict it, the count is wrong from
there on at the latest, so the rest of that sequence is not joined either. A receive from a source that is not known
could have taken a message of any lane into its rank: what comes after it there is not joined. What is not whole is
listed with what is there and who is missing, and its records stay in the graph, each by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import TypeAlias

from truedag.tracer.merge.nodes import CommRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One collective: every participant's record, by global rank in group order."""

    group: tuple[int, ...]
    group_name: str
    order: int
    records: dict[int, CommRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One point-to-point message."""

    group: tuple[int, ...]
    group_name: str
    order: int
    source: int
    destination: int
    send: CommRecord
    receive: CommRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmatched:
    """Records that do not make a whole communication."""

    what: str
    op: str
    group_name: str
    group: tuple[int, ...]
    order: int
    present: tuple[int, ...]
    missing: tuple[int, ...]
    records: dict[int, CommRecord]

    def describe(self) -> dict[str, object]:
        """Return what `meta.json` says of it."""
        return {
            "what": self.what,
            "op": self.op,
            "group": self.group_name,
            "group_ranks": list(self.group),
            "seq": self.order,
            "present_ranks": list(self.present),
            "missing_ranks": list(self.missing),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """All communications of a run."""

    collectives: list[Collective]
    messages: list[Message]
    unmatched: list[Unmatched]


Group: TypeAlias = tuple[tuple[int, ...], str, int]  # its ranks, its name, its incarnation
Lane: TypeAlias = tuple[Group, int, int, int]  # the group, source, destination, tag
_UNKNOWN_RANKS = "the ranks of its group are unknown"
_NO_COMMON_POINT = (
    "ambiguous: the ranks began to record at different points and had not counted before; record with truedag trace, "
    "or import truedag.tracer before init_process_group"
)


def match_communications(ranks: Mapping[int, Sequence[CommRecord]]) -> Matched:
    """Join the communications that each rank recorded."""
    collectives: dict[Group, dict[int, list[CommRecord]]] = {}
    with_messages: set[Group] = set()
    sends: dict[Lane, list[CommRecord]] = {}
    receives: dict[Lane, list[CommRecord]] = {}
    from_anybody: dict[tuple[Group, int, int], dict[Lane, int]] = {}  # how many receives there had been on each lane
    unmatched: list[Unmatched] = []
    for rank, records in sorted(ranks.items()):
        into: dict[tuple[Group, int], dict[Lane, int]] = {}
        for record in records:
            group = (record.group, record.group_name, record.incarnation)
            if not record.is_p2p:
                collectives.setdefault(group, {}).setdefault(rank, []).append(record)
                continue
            with_messages.add(group)
            if not record.group:
                unmatched.append(_alone(_UNKNOWN_RANKS, rank, record, missing=()))
            elif record.op == "c10d::send":
                sends.setdefault((group, rank, record.peer, record.tag), []).append(record)
            elif record.peer < 0:
                unmatched.append(_alone("receive from any source", rank, record, missing=()))
                from_anybody.setdefault((group, rank, record.tag), dict(into.get((group, record.tag), {})))
            else:
                lane = (group, record.peer, rank, record.tag)
                receives.setdefault(lane, []).append(record)
                into.setdefault((group, record.tag), {})[lane] = len(receives[lane])
    whole: list[Collective] = []
    for group, by_rank in collectives.items():
        _join_collectives(group, by_rank, group in with_messages, whole, unmatched)
    messages: list[Message] = []
    for lane in dict.fromkeys((*sends, *receives)):
        group, _, destination, tag = lane
        told = from_anybody.get((group, destination, tag))
        certain = None if told is None else told.get(lane, 0)
        _join_messages(lane, sends.get(lane, ()), receives.get(lane, ()), certain, messages, unmatched)
    return Matched(collectives=whole, messages=messages, unmatched=unmatched)


def _join_messages(
    lane: Lane,
    sends: Sequence[CommRecord],
    receives: Sequence[CommRecord],
    certain: int | None,
    messages: list[Message],
    unmatched: list[Unmatched],
) -> None:
    """Join the messages of one lane; up to its first `certain` receives if not None."""
    (group, name, _), source, destination, _ = lane
    by_number = all(record.number is not None for record in (*sends, *receives))
    sent, received = _by_order(sends, by_number=by_number), _by_order(receives, by_number=by_number)
    sure = {order for order, record in list(received.items())[:certain] if record.is_sure}
    doubt = "" if by_number else _doubt_of_places(sends, receives)
    for order in sorted(sent.keys() | received.keys()):
        send, receive = sent.get(order), received.get(order)
        if not doubt and order not in sure and (certain is not None or receive):
            doubt = "ambiguous: a receive from any source came before"
        if send and receive and not doubt and send.sent_bytes != receive.received_bytes:
            what = f"send and receive differ in bytes: {send.sent_bytes} and {receive.received_bytes}"
            unmatched.append(_alone(what, source, send, missing=()))
            unmatched.append(_alone(what, destination, receive, missing=()))
            doubt = "ambiguous: a send and a receive before it differ in bytes"
        elif send and receive and not doubt:
            messages.append(
                Message(
                    group=group,
                    group_name=name,
                    order=order,
                    source=source,
                    destination=destination,
                    send=send,
                    receive=receive,
                )
            )
        elif doubt:
            unmatched.extend([_alone(doubt, source, send, missing=())] if send else [])
            unmatched.extend([_alone(doubt, destination, receive, missing=())] if receive else [])
        elif send:
            unmatched.append(_alone("send without receive", source, send, missing=(destination,)))
        elif receive:
            unmatched.append(_alone("receive without send", destination, receive, missing=(source,)))


def _by_order(records: Sequence[CommRecord], *, by_number: bool) -> dict[int, CommRecord]:
    """The records of one end of a lane, by their number or else by their place in the recording."""
    if by_number:
        return {record.number: record for record in records if record.number is not None}
    return dict(enumerate(records))


def _doubt_of_places(sends: Sequence[CommRecord], receives: Sequence[CommRecord]) -> str:
    """Why places in the recordings do not tell which send ends in which receive; '' if they do."""
    if not (sends and receives):
        return ""
    begins = {sends[0].from_barrier, receives[0].from_barrier}
    if False in begins:
        return _NO_COMMON_POINT
    if len(sends) != len(receives) and begins != {None}:
        return f"ambiguous: {len(sends)} sends and {len(receives)} receives: which of them the others end is unknown"
    return ""


def _join_collectives(
    group: Group,
    by_rank: Mapping[int, Sequence[CommRecord]],
    has_messages: bool,
    whole: list[Collective],
    unmatched: list[Unmatched],
) -> None:
    """Join the collectives of one group."""
    ranks, name, _ = group
    by_number = all(record.number is not None for records in by_rank.values() for record in records)
    by_place = not by_number and (has_messages or not _backend_counts(ranks, by_rank))
    found: dict[int, dict[int, CommRecord]] = {}
    for rank, records in by_rank.items():
        for record in records:
            order = record.order if by_place else record.backend_sequence if record.number is None else record.number
            if rank in found.setdefault(order, {}):
                unmatched.append(_alone("recorded twice", rank, record, missing=()))
            else:
                found[order][rank] = record
    begins = {records[0].from_barrier for records in by_rank.values()}
    doubt = _NO_COMMON_POINT if by_place and len(by_rank) > 1 and False in begins else ""
    for order, records_there in sorted(found.items()):
        missing = tuple(rank for rank in ranks if rank not in records_there)
        what = _fault(ranks, records_there, missing)
        if not what and not doubt:
            ordered = {rank: records_there[rank] for rank in ranks}
            whole.append(Collective(group=ranks, group_name=name, order=order, records=ordered))
            continue
        unmatched.append(
            Unmatched(
                what=what or doubt,
                op=" / ".join(sorted({record.op for record in records_there.values()})),
                group_name=name,
                group=ranks,
                order=order,
                present=tuple(records_there),
                missing=missing,
                records=records_there,
            )
        )
        if what and ranks and not missing:
            doubt = "ambiguous: the ranks differ in a collective before it"


def _fault(ranks: tuple[int, ...], records: Mapping[int, CommRecord], missing: tuple[int, ...]) -> str:
    """Return why these records are no whole collective; '' if they are one."""
    if not ranks:
        return _UNKNOWN_RANKS
    if missing:
        return "ranks are missing"
    if len({record.op for record in records.values()}) > 1:
        return "ranks ran different operations"
    if len({record.reduce_op for record in records.values()}) > 1:
        return "ranks ran different reductions"
    if len({record.peer for record in records.values()}) > 1:
        return "ranks named different roots"
    return _differing_bytes(records)


def _backend_counts(ranks: tuple[int, ...], by_rank: Mapping[int, Sequence[CommRecord]]) -> bool:
    """Whether the backend's count tells one collective of a group from another, alike on all its ranks.

    It must rise with each. Some backends count messages too: if there were some before the recording, ranks are apart
    by a constant, and while the ranks have equally many collectives nothing but that tells them from each other.
    """
    counts = [[record.backend_sequence for record in by_rank[rank]] for rank in ranks if rank in by_rank]
    if not ranks or any(one[0] < 0 or any(b <= a for a, b in pairwise(one)) for one in counts):
        return False
    first, last, size = ({key(one) for one in counts} for key in (itemgetter(0), itemgetter(-1), len))
    return len(first) == 1 or len(last) == 1 or len(size) > 1


# What must hold of the bytes that participants send and receive. Operators that are not here say nothing: a barrier.
_SAME_SENT = frozenset({"allreduce_", "allreduce_coalesced_", "reduce_"})
_ALL_GET_ALL = frozenset({"allgather_", "_allgather_base_", "allgather_coalesced_", "allgather_into_tensor_coalesced_"})
_ALL_GIVE_ALL = frozenset({"reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"})
_SAME_TOTAL = frozenset({"alltoall_", "alltoall_base_", "gather_", "scatter_"})


def _differing_bytes(records: Mapping[int, CommRecord]) -> str:
    """Return how the bytes of a collective's participants contradict each other; '' if they do not."""
    op = next(iter(records.values())).op.removeprefix("c10d::")
    sent = {rank: record.sent_bytes for rank, record in records.items()}
    received = {rank: record.received_bytes for rank, record in records.items()}
    all_sent, all_received = sum(sent.values()), sum(received.values())
    if op in _SAME_SENT and len(set(sent.values())) > 1:
        return f"ranks reduce different numbers of bytes: {_list(sent)}"
    if op == "broadcast_" and any(received[rank] != all_sent for rank in records if rank != records[rank].peer):
        return f"ranks receive other numbers of bytes than the root sends, {all_sent}: {_list(received)}"
    if op in _ALL_GET_ALL and any(count != all_sent for count in received.values()):
        return f"ranks receive other numbers of bytes than all send, {all_sent}: {_list(received)}"
    if op in _ALL_GIVE_ALL and any(count != all_received for count in sent.values()):
        return f"ranks send other numbers of bytes than all receive, {all_received}: {_list(sent)}"
    if op in _SAME_TOTAL and all_sent != all_received:
        return f"ranks send {all_sent} bytes and receive {all_received}"
    return ""


def _list(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{count} on rank {rank}" for rank, count in counts.items())


def _alone(what: str, rank: int, record: CommRecord, *, missing: tuple[int, ...]) -> Unmatched:
    return Unmatched(
        what=what,
        op=record.op,
        group_name=record.group_name,
        group=record.group,
        order=record.order,
        present=(rank,),
        missing=missing,
        records={rank: record},
    )
