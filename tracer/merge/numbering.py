"""What number each communication of one rank has: counted from when its group was made, not from when recording began.

Theory of operation. The rank counted its messages before the recording as well (`record/counters.py`), so a message's
number in its lane is the lane's count when the recording began and its place in the recording. A collective's number
is the backend's count, less the messages in it if the backend counts them too, those of monitored barriers included. A
receive from any source is in the lane of the source that its work told. What the counts contradict, or never covered,
has no number: `match` then goes by places in the recording, as far as that can be right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from truedag.tracer.merge.nodes import CommRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What the rank said of one group."""

    begin: Mapping[str, Any]
    end: Mapping[str, Any] | None


def number_communications(
    records: Sequence[CommRecord], start_ns: Sequence[int], lanes: Sequence[Mapping[str, Any]]
) -> list[CommRecord]:
    """Return a rank's communications in the same order, with the numbers that its counts give them.

    Args:
        records: in the order in which they began.
        start_ns: when they began.
        lanes: what the rank said of its counts (`record/counters.py`); nothing in older traces.
    """
    told: dict[tuple[str, int], _Told] = {}
    for entry in lanes:
        key = (str(entry["name"]), int(entry["made_ns"]))
        if entry["at"] != "end":
            told[key] = _Told(begin=entry, end=None)
        elif key in told:
            told[key] = replace(told[key], end=entry)
    places: dict[tuple[str, int], list[int]] = {}
    for place, record in enumerate(records):
        group = _group_at(told, record.group_name, start_ns[place])
        if group is not None:
            places.setdefault(group, []).append(place)
    found = list(records)
    for key, mine in places.items():
        numbered = _number_group(told[key], [records[place] for place in mine], [start_ns[place] for place in mine])
        for place, record in zip(mine, numbered, strict=True):
            found[place] = record
    return found


def _group_at(told: Mapping[tuple[str, int], _Told], name: str, time_ns: int) -> tuple[str, int] | None:
    """Which group had the name then: two of one name are never alive together."""
    made = [made_ns for known, made_ns in told if known == name and made_ns <= time_ns]
    return (name, max(made)) if made else None


def _number_group(told: _Told, records: Sequence[CommRecord], starts: Sequence[int]) -> list[CommRecord]:
    begin, end = told.begin, told.end
    messages = [(record, start) for record, start in zip(records, starts, strict=True) if record.is_p2p]
    # What another thread did between the recording's begin and the count's reading is in both.
    early = [record for record, start in messages if start < begin["time_ns"]]
    counts = begin["absolute"] and not begin["busy"]
    if end is not None and end["messages"] - begin["messages"] != len(messages) - len(early):
        counts = False
    counted = begin["counted"] if begin["counted"] is not None else _is_counted(records)
    ranks = records[0].group
    sources = dict(end["sources"]) if end is not None else {}
    sent: Counter[tuple[int, int]] = Counter()
    received: Counter[tuple[int, int]] = Counter()
    for peer, tag, num_sent, num_received in begin["lanes"]:
        if peer < len(ranks):
            sent[ranks[peer], tag], received[ranks[peer], tag] = num_sent, num_received
    unsure: set[int] = set()  # tags under which a receive's source is unknown from here on
    for number, tag in begin["open"]:
        if sources.get(number, len(ranks)) < len(ranks):
            received[ranks[sources[number]], tag] += 1
        else:
            unsure.add(tag)
    carried, excess = begin["messages"] - len(early), begin["excess"]
    for record in early:
        (sent if record.op == "c10d::send" else received)[record.peer, record.tag] -= 1
    found: list[CommRecord] = []
    for record, after in zip(records, (*records[1:], None), strict=True):
        peer, place, is_sure = record.peer, None, True
        if not record.is_p2p:
            if counted is False or counts:
                place = record.backend_sequence - excess - (carried if counted else 0)
            if record.op == "c10d::monitored_barrier_" and after is not None:
                excess += max(after.backend_sequence - record.backend_sequence - 1, 0)
        else:
            if record.op == "c10d::recv_any_source_" and sources.get(carried, len(ranks)) < len(ranks):
                peer = ranks[sources[carried]]
            elif record.op == "c10d::recv_any_source_":
                unsure.add(record.tag)
            carried += 1
            lane = sent if record.op == "c10d::send" else received
            is_sure = lane is sent or record.tag not in unsure
            if counts and peer >= 0:
                place = lane[peer, record.tag]
            lane[peer, record.tag] += 1
        found.append(
            replace(
                record,
                peer=peer,
                number=place,
                is_sure=is_sure,
                incarnation=int(begin["incarnation"]),
                from_barrier=bool(begin["synchronized"]),
            )
        )
    return _checked(found, is_whole=begin["at"] == "made")


def _checked(records: list[CommRecord], *, is_whole: bool) -> list[CommRecord]:
    """Take collectives' numbers away if they do not rise with each; places are numbers if all of the group is there."""
    numbers = [-1 if record.number is None else record.number for record in records if not record.is_p2p]
    if all(number >= 0 for number in numbers) and all(b > a for a, b in pairwise(numbers)):
        return records
    return [
        record if record.is_p2p else replace(record, number=record.order if is_whole else None) for record in records
    ]


def _is_counted(records: Sequence[CommRecord]) -> bool:
    """Whether the backend counted the first recorded message; if nothing comes after it, it does not matter."""
    for record, after in pairwise(records):
        if record.is_p2p:
            return after.backend_sequence > record.backend_sequence
    return False
