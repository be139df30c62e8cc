"""Join the communications of all ranks (DESIGN rule 4): by process group and place in its sequence, never by time.

Theory of operation. A group is the tuple of its ranks, its name, and how many groups of that name a rank had before.
The n-th collective of a group on one rank is the n-th on every other, or the program would hang; so a collective is the
records with one (group, n), and it is whole when each rank of the group has exactly one. A message is the n-th send
from one rank to another on a group under a tag, and the n-th receive there.

n counts from when the group was made, where the ranks counted before they recorded (`numbering`): recordings may then
begin and end anywhere, and records may be missing. Else n is the place in the recording, if all of them began at a
barrier of all ranks: then one counts from the same point everywhere, but for what was under way already. So where both
ends of a lane recorded, but not equally much, that would be a guess, as it is where there was no barrier: nothing is
joined.

A join is checked against the operator, the reduction, the root, the types and the bytes of each side. Those that differ
are not joined. Where n is a number that is all: it stays what the backend went by. Where it is a place, counting is
wrong from there on at the latest, so the rest of that sequence is not joined either. What is not whole is listed with
what is there, who is missing and why, and its records stay in the graph, each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeAlias

from truedag.tracer.merge.nodes import CommRecord
from truedag.tracer.merge.sequences import FAILED, TWICE, UNKNOWN_SOURCE


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
_UNKNOWN_RANKS = "the ranks of its group are unknown"
_NO_COMMON_POINT = (
    "ambiguous: the ranks began to record at different points and had not counted before; record with truedag trace, "
    "or import truedag.tracer before init_process_group"
)
_SEVERAL_LIVES = "ambiguous: there were several groups of this name, and how many before this one was not seen"
_AGAIN = "recorded twice"
_NOWHERE = frozenset({FAILED, TWICE, UNKNOWN_SOURCE})  # of no place, whatever is known of the others
_SIGNATURE = attrgetter("op", "reduce_op", "peer", "dtypes", "sent_bytes", "received_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stream:
    """The records of one sequence: the collectives of a group, or the messages of a lane."""

    group: Group
    ends: tuple[int, ...]  # whose they are: a group's ranks, or source and destination
    tag: int | None  # None: of collectives
    records: list[CommRecord] = field(default_factory=list)
    end: list[int] = field(default_factory=list)  # of each record: its rank's place in `ends`


def match_communications(ranks: Mapping[int, Sequence[CommRecord]]) -> Matched:
    """Join the communications that each rank recorded, as `numbering` has numbered them. A million take some seconds.

    Args:
        ranks: by rank, its records in any order.
    """
    matched = Matched(collectives=[], messages=[], unmatched=[])
    streams = _streams(ranks, matched.unmatched)
    lives: dict[tuple[tuple[int, ...], str], int] = {}  # how many groups of a name there are, by the look of it
    for ranks_in, name, _ in {stream.group for stream in streams}:
        lives[ranks_in, name] = lives.get((ranks_in, name), 0) + 1
    for stream in streams:
        ranks_in, name, incarnation = stream.group
        if incarnation < 0 and lives[ranks_in, name] > 1:
            matched.unmatched.extend(_each_alone(stream, _SEVERAL_LIVES))
        elif stream.tag is None:
            _join_collectives(stream, matched)
        else:
            _join_messages(stream, matched)
    return matched


def _streams(ranks: Mapping[int, Sequence[CommRecord]], unmatched: list[Unmatched]) -> list[_Stream]:
    """Tell the sequences apart; list what is of none."""
    streams: dict[tuple[Group, int, int, int | None], _Stream] = {}
    for rank, records in sorted(ranks.items()):
        # A group may have thousands of ranks: they are not compared for every record.
        known: dict[tuple[int, str, int, str, int, int], tuple[_Stream, int]] = {}
        for record in records:
            if not record.group or (record.doubt and record.doubt in _NOWHERE):
                what = record.doubt if record.doubt in _NOWHERE else _UNKNOWN_RANKS
                unmatched.append(_alone(what, rank, record, missing=()))
                continue
            op, peer, tag = (record.op, record.peer, record.tag) if record.is_p2p else ("", -1, -1)
            key = (id(record.group), record.group_name, record.incarnation, op, peer, tag)
            place = known.get(key)
            if place is None:
                place = known[key] = _stream_of(rank, record, streams)
            stream, end = place
            stream.records.append(record)
            stream.end.append(end)
    return list(streams.values())


def _stream_of(
    rank: int, record: CommRecord, streams: dict[tuple[Group, int, int, int | None], _Stream]
) -> tuple[_Stream, int]:
    group = (record.group, record.group_name, record.incarnation)
    if not record.is_p2p:
        stream = streams.setdefault((group, -1, -1, None), _Stream(group=group, ends=record.group, tag=None))
        return stream, record.group.index(rank)
    is_send = record.op == "c10d::send"
    source, destination = ends = (rank, record.peer) if is_send else (record.peer, rank)
    stream = _Stream(group=group, ends=ends, tag=record.tag)
    return streams.setdefault((group, source, destination, record.tag), stream), 0 if is_send else 1


def _by_place(stream: _Stream) -> bool:
    """Whether places in the recordings must do: some end has no numbers, and all recordings began at one point."""
    numbered = {end for record, end in zip(stream.records, stream.end, strict=True) if record.number is not None}
    began_as_one = len(stream.ends) == 1 or all(record.from_barrier for record in stream.records)
    return numbered != set(stream.end) and began_as_one


def _collect(
    stream: _Stream, places: Sequence[int | None], doubts: Sequence[str], unmatched: list[Unmatched]
) -> tuple[dict[int, dict[int, CommRecord]], set[int]]:
    """The records by their number and end, and the numbers for which one end has two that differ. List the others."""
    found: dict[int, dict[int, CommRecord]] = {}
    torn: set[int] = set()
    for record, end, place, doubt in zip(stream.records, stream.end, places, doubts, strict=True):
        if place is None or doubt:
            unmatched.append(_alone(doubt or _NO_COMMON_POINT, stream.ends[end], record, missing=()))
            continue
        there = found.setdefault(place, {})
        first = there.setdefault(end, record)
        if first is not record:
            unmatched.append(_alone(_AGAIN, stream.ends[end], record, missing=()))
            if _SIGNATURE(first) != _SIGNATURE(record):
                torn.add(place)
    return found, torn


def _join_collectives(stream: _Stream, matched: Matched) -> None:
    """Join the collectives of one group."""
    ranks, name, _ = stream.group
    by_place = _by_place(stream)
    if by_place:
        places: list[int | None] = [record.order for record in stream.records]
        doubts = [""] * len(places)
    else:
        places = [record.number for record in stream.records]
        doubts = [record.doubt for record in stream.records]
    found, torn = _collect(stream, places, doubts, matched.unmatched)
    faults: dict[tuple[object, ...], str] = {}  # most collectives are like others
    every = range(len(ranks))
    doubt = ""
    for order, there in sorted(found.items()):
        is_whole = len(there) == len(ranks) and order not in torn
        what = TWICE if order in torn else "ranks are missing"
        if is_whole:
            records = dict(zip(ranks, [there[end] for end in every], strict=True))
            key = tuple([_SIGNATURE(record) for record in records.values()])
            if key not in faults:
                faults[key] = find_fault(records)
            what = faults[key]
            if not what and not doubt:
                matched.collectives.append(Collective(group=ranks, group_name=name, order=order, records=records))
                continue
        present = {ranks[end]: there[end] for end in sorted(there)}
        matched.unmatched.append(
            Unmatched(
                what=what or doubt,
                op=" / ".join(sorted({record.op for record in present.values()})),
                group_name=name,
                group=ranks,
                order=order,
                present=tuple(present),
                missing=tuple(ranks[end] for end in every if end not in there),
                records=present,
            )
        )
        if is_whole and what and by_place:
            doubt = "ambiguous: the ranks differ in a collective before it"


def _join_messages(stream: _Stream, matched: Matched) -> None:
    """Join the messages of one lane."""
    (group, name, _), (source, destination) = stream.group, stream.ends
    by_place = _by_place(stream)
    doubts = [record.doubt for record in stream.records]
    if by_place:
        doubt = _doubt_of_places(stream, doubts)
        places: list[int | None] = list(_places(stream))
        doubts = [one or doubt for one in doubts]
    else:
        places = [record.number for record in stream.records]
    found, torn = _collect(stream, places, doubts, matched.unmatched)
    doubt = ""
    for order, there in sorted(found.items()):
        if len(there) < 2:
            ((end, record),) = there.items()
            what = ("send without receive", "receive without send")[end]
            what = TWICE if order in torn else what
            matched.unmatched.append(_alone(what, stream.ends[end], record, missing=(stream.ends[1 - end],)))
            continue
        send, receive = there[0], there[1]
        what = TWICE if order in torn else _differing_ends(send, receive)
        if what or doubt:
            matched.unmatched.append(_alone(what or doubt, source, send, missing=()))
            matched.unmatched.append(_alone(what or doubt, destination, receive, missing=()))
            if by_place:
                doubt = "ambiguous: a send and a receive before it differ"
            continue
        matched.messages.append(
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


def _places(stream: _Stream) -> list[int]:
    """Each message's place among those of its end."""
    orders: tuple[set[int], set[int]] = (set(), set())
    for record, end in zip(stream.records, stream.end, strict=True):
        orders[end].add(record.order)
    place = [{order: i for i, order in enumerate(sorted(some))} for some in orders]
    return [place[end][record.order] for record, end in zip(stream.records, stream.end, strict=True)]


def _doubt_of_places(stream: _Stream, doubts: Sequence[str]) -> str:
    """Why places in the recordings do not tell which send ends in which receive; '' if they do."""
    sends, receives = (
        len({record.order for record, at in zip(stream.records, stream.end, strict=True) if at == end})
        for end in range(2)
    )
    if sends and receives and sends != receives:
        return f"ambiguous: {sends} sends and {receives} receives: which of them the others end is unknown"
    return next((doubt for doubt in doubts if doubt), "")


def _differing_ends(send: CommRecord, receive: CommRecord) -> str:
    """Return how the ends of a message contradict each other; '' if they do not."""
    if send.sent_bytes != receive.received_bytes:
        return f"send and receive differ in bytes: {send.sent_bytes} and {receive.received_bytes}"
    if send.dtypes != receive.dtypes and send.dtypes and receive.dtypes:
        return f"send and receive differ in type: {send.dtypes} and {receive.dtypes}"
    return ""


def _each_alone(stream: _Stream, what: str) -> Iterator[Unmatched]:
    for record, end in zip(stream.records, stream.end, strict=True):
        yield _alone(what, stream.ends[end], record, missing=())


def find_fault(records: Mapping[int, CommRecord]) -> str:
    """Return why these records of all ranks are no whole collective; '' if they are one."""
    if len({record.op for record in records.values()}) > 1:
        return "ranks ran different operations"
    if len({record.reduce_op for record in records.values()}) > 1:
        return "ranks ran different reductions"
    if len({record.peer for record in records.values()}) > 1:
        return "ranks named different roots"
    dtypes = {rank: record.dtypes for rank, record in records.items() if record.dtypes}
    if len(set(dtypes.values())) > 1:
        return f"ranks gave different types: {', '.join(f'{dtype} on rank {rank}' for rank, dtype in dtypes.items())}"
    return _differing_bytes(records)


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
        order=record.order if record.number is None else record.number,
        present=(rank,),
        missing=missing,
        records={rank: record},
    )
