"""Join the communications of all ranks (DESIGN rule 4): by process group and place in its sequence, never by time.

Theory of operation. A group is the tuple of its ranks and its name; the n-th collective of a group on one rank is the
n-th on every other, or the program would hang. So a collective is the records with one (group, n), and it is whole
when each rank of the group has exactly one, of the same operator. A message is the n-th send from one rank to another
on a group under a tag, and the n-th receive there. Recordings begin between two barriers, so n counts from the same
point everywhere. What is not whole is listed with what is there and who is missing, and its records stay in the graph,
each by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from truedag.tracer.nodes import CommRecord


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


def match_communications(ranks: Mapping[int, Sequence[CommRecord]]) -> Matched:
    """Join the communications that each rank recorded."""
    collectives: dict[tuple[tuple[int, ...], str, int], dict[int, CommRecord]] = {}
    sends: dict[tuple[tuple[int, ...], str, int, int, int, int], CommRecord] = {}
    receives: dict[tuple[tuple[int, ...], str, int, int, int, int], CommRecord] = {}
    counts: dict[tuple[str, tuple[int, ...], str, int, int, int], int] = {}
    unmatched: list[Unmatched] = []
    for rank, records in sorted(ranks.items()):
        for record in records:
            if not record.is_p2p:
                collectives.setdefault((record.group, record.group_name, record.order), {})[rank] = record
                continue
            is_send = record.op == "c10d::send"
            if record.peer < 0:
                unmatched.append(_alone("receive from any source", rank, record, missing=()))
                continue
            ends = (rank, record.peer) if is_send else (record.peer, rank)
            lane = (record.op if is_send else "recv", record.group, record.group_name, *ends, record.tag)
            order = counts[lane] = counts.get(lane, -1) + 1
            side = sends if is_send else receives
            side[record.group, record.group_name, *ends, record.tag, order] = record
    whole, broken = _whole_collectives(collectives)
    messages = [
        Message(
            group=key[0],
            group_name=key[1],
            source=key[2],
            destination=key[3],
            order=key[5],
            send=send,
            receive=receives[key],
        )
        for key, send in sends.items()
        if key in receives
    ]
    for key, record in sends.items():
        if key not in receives:
            unmatched.append(_alone("send without receive", key[2], record, missing=(key[3],)))
    for key, record in receives.items():
        if key not in sends:
            unmatched.append(_alone("receive without send", key[3], record, missing=(key[2],)))
    return Matched(collectives=whole, messages=messages, unmatched=[*broken, *unmatched])


def _whole_collectives(
    found: Mapping[tuple[tuple[int, ...], str, int], dict[int, CommRecord]],
) -> tuple[list[Collective], list[Unmatched]]:
    whole, broken = [], []
    for (group, name, order), records in found.items():
        ops = sorted({record.op for record in records.values()})
        missing = tuple(rank for rank in group if rank not in records)
        if len(ops) == 1 and not missing and group:
            ordered = {rank: records[rank] for rank in group}
            whole.append(Collective(group=group, group_name=name, order=order, records=ordered))
            continue
        if not group:
            what = "the ranks of its group are unknown"
        else:
            what = "ranks are missing" if missing else "ranks ran different operations"
        broken.append(
            Unmatched(
                what=what,
                op=" / ".join(ops),
                group_name=name,
                group=group,
                order=order,
                present=tuple(records),
                missing=missing,
                records=records,
            )
        )
    return whole, broken


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
