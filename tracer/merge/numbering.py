"""What number each communication of one rank has: counted from when its group was made, not from when recording began.

Theory of operation. A rank counts a group's messages whether they are recorded or not (`record/counters.py`), and its
recorder numbers the collectives and the messages that it hears of within the recording (`CommRecord.order`). So it
shows where a record is missing, and in what order things were begun, whatever order the records come in.

A message's number in its lane (direction, peer, tag) is the lane's count when the recording began, and its place in the
recording. That can be told up to the first message of its group that was not recorded: from there on, each may have
been of any lane. A receive from any source is in the lane of the source that its work told; while it waits, a later
receive that names this source is served first, so which of the two got which message cannot be told.

A collective's number is the backend's count before it, less what is none of the group's collectives: the messages
before it, if the backend counts them too, and what monitored barriers took beyond one each, which differs by rank. Each
takes at least one; so where the count has risen by no more than what is known of, nothing else was there.

What cannot be told has no number, or one that is in doubt, and says why. Believed are five things: that all messages
go through the methods that are counted; that no two threads use one lane at once; that a trace without an end ends
everywhere at the same time (its rank was killed); that of what is missing nothing had failed, or was begun before the
counts were read; and that ranks which began to count when a group was there already found the same one of its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.lane_numbers import Traffic, number_messages
from truedag.tracer.merge.nodes import CommRecord
from truedag.tracer.merge.sequences import (
    COLLECTIVE,
    FAILED,
    KINDS,
    MAY_FOLLOW_MONITORED,
    MONITORED,
    NEVER,
    REPEATED,
    SEND,
    UNCOUNTED,
    UNTOLD,
    Ints,
    Part,
    Told,
    copy_twins,
    once,
)

# Of a group of which nothing was told.
_UNTOLD = {"at": "begin", "time_ns": 0, "excess": 0, "messages": 0, "sequence": -1}
_COUNT_COLLECTIVES_ALONE = frozenset({"nccl"})  # backends that do not count messages
_Key: TypeAlias = tuple[str, int]  # a group's name, and when it was made


def number_communications(
    records: Sequence[CommRecord],
    start_ns: Sequence[int],
    lanes: Sequence[Mapping[str, Any]],
    *,
    hears_all: bool = False,
) -> list[CommRecord]:
    """Return a rank's communications in the same order, with the numbers that its counts give them.

    Args:
        records: of one rank, in any order.
        start_ns: when they began.
        lanes: what the rank said of its counts (`record/counters.py`).
        hears_all: whether the recorder hears all threads, as the native one does: what was counted in the end and is
            not among the records was then lost at their end. Else it may have been anywhere.
    """
    told = _read(lanes)
    synchronized = next((bool(entry["synchronized"]) for entry in lanes if entry["at"] != "end"), None)
    columns = _columns(records, start_ns)
    lives = _lives(records, columns["start"], told)
    num_told: dict[_Key | None, int] = {}
    for (key, _), _ in lives:
        num_told[key] = num_told.get(key, 0) + 1
    incarnations = np.zeros(len(records), np.int64)
    for (key, incarnation), places in lives:
        first = records[int(places[0])]
        part = Part(
            ranks=first.group,
            backend=first.backend,
            **{name: column[places] for name, column in columns.items()},
        )
        if key is None:
            _number_collectives(part, Traffic(), _UNTOLD)
            part.doubt[(part.kind >= SEND) & (part.doubt == "")] = UNTOLD
        else:
            begin = told[key].begin
            incarnation = int(begin["incarnation"])
            is_one = told[key].is_one and num_told[key] == 1
            traffic = number_messages(part, told[key], is_one=is_one, hears_all=hears_all)
            _number_collectives(part, traffic, begin)
        incarnations[places] = _life(told, key, incarnation, synchronized=bool(synchronized))
        for name in ("order", "peer", "number", "doubt"):
            columns[name][places] = getattr(part, name)
    order, peer, number, doubt = (columns[name].tolist() for name in ("order", "peer", "number", "doubt"))
    found = zip(records, order, peer, number, doubt, incarnations.tolist(), strict=True)
    return [_with(synchronized, *one) for one in found]


def _life(told: Mapping[_Key, Told], key: _Key | None, incarnation: int, *, synchronized: bool) -> int:
    """How many groups of its name there were before: below 0 if the rank may not have seen the first."""
    alike = [] if key is None else [(made, one) for (name, made), one in told.items() if name == key[0]]
    if synchronized:  # those that met count from the one that was there then
        return incarnation - min((int(one.begin["incarnation"]) for _, one in alike), default=0)
    return incarnation if alike and all(made > 0 for made, _ in alike) else -1 - incarnation


def _read(lanes: Sequence[Mapping[str, Any]]) -> dict[_Key, Told]:
    told: dict[_Key, Told] = {}
    for entry in lanes:
        key = (str(entry["name"]), int(entry["made_ns"]))
        if entry["at"] != "end":
            told[key] = Told(begin=entry, is_one=key not in told)
        elif key in told:
            told[key] = replace(told[key], end=entry)
    return told


def _columns(records: Sequence[CommRecord], start_ns: Sequence[int]) -> dict[str, NDArray[Any]]:
    num = len(records)

    def column(name: str) -> Ints:
        return np.fromiter(map(attrgetter(name), records), np.int64, num)

    failed = column("is_failed") > 0
    return {
        "order": column("order"),
        "sequence": column("backend_sequence"),
        "kind": np.fromiter((KINDS.get(one.op, COLLECTIVE) for one in records), np.int64, num),
        "peer": column("peer"),
        "tag": column("tag"),
        "start": np.fromiter(start_ns, np.int64, num),
        "end": np.fromiter((NEVER if one.work_end_ns is None else one.work_end_ns for one in records), np.int64, num),
        "failed": failed,
        "number": np.full(num, -1),
        "doubt": np.where(failed, FAILED, "").astype(object),
    }


def _lives(
    records: Sequence[CommRecord], starts: Ints, told: Mapping[_Key, Told]
) -> list[tuple[tuple[_Key | None, int], Ints]]:
    """The places of each group's records, by what was told of it and by how many of its name were recorded before."""
    codes: dict[tuple[str, int], int] = {}
    code = np.fromiter(
        (codes.setdefault((one.group_name, one.incarnation), len(codes)) for one in records), np.int64, len(records)
    )
    by_code = np.argsort(code, kind="stable")
    bounds = np.searchsorted(code[by_code], np.arange(1, len(codes)))
    found: list[tuple[tuple[_Key | None, int], Ints]] = []
    for (name, incarnation), places in zip(codes, np.split(by_code, bounds), strict=False):
        # Two groups of one name are never alive together.
        made = sorted(at for known, at in told if known == name)
        life = np.searchsorted(np.array(made, np.int64), starts[places], "right") - 1
        found.extend(
            (((name, made[one]) if one >= 0 else None, incarnation), places[life == one])
            for one in np.unique(life).tolist()
        )
    return found


def _number_collectives(part: Part, traffic: Traffic, begin: Mapping[str, Any]) -> None:
    """Number the collectives of one group."""
    places, twins = once(part, np.flatnonzero(part.kind < SEND))
    failed = part.failed[places]
    order = (part.order[places] - np.cumsum(failed) + failed)[~failed]
    places = places[~failed]
    if not len(places):
        return
    part.order[places] = order
    counts_alone = traffic.is_counted is False or part.backend in _COUNT_COLLECTIVES_ALONE
    is_known = not traffic.num_messages or (bool(traffic.is_counted) and traffic.is_known)
    if (part.sequence[places] < 0).any():
        part.number[places] = order if begin["at"] == "made" else -1
    elif counts_alone or (traffic.is_absolute and is_known):
        _number_by_backend(part, places, order, traffic, begin, counts_alone=counts_alone)
    elif traffic.is_absolute:
        part.doubt[places] = UNCOUNTED
    copy_twins(part, twins)


def _number_by_backend(
    part: Part, places: Ints, order: Ints, traffic: Traffic, begin: Mapping[str, Any], *, counts_alone: bool
) -> None:
    """Number collectives, in the order in which they were begun, by the backend's count before each."""
    sequence, kind = part.sequence[places], part.kind[places]
    carried, is_certain = _messages_before(part.start[places], traffic)
    if counts_alone or not traffic.num_messages:
        carried[:], is_certain[:] = 0, True
    # The reading of the counts tells as much as a collective would that was begun then.
    at = int((part.start[places] < begin["time_ns"]).sum())
    reading = [at] if begin["sequence"] >= 0 else []
    if reading:
        sequence, kind = np.insert(sequence, at, begin["sequence"]), np.insert(kind, at, COLLECTIVE)
        order, is_certain = np.insert(order, at, at), np.insert(is_certain, at, values=True)
        carried = np.insert(carried, at, 0 if counts_alone else begin["messages"])
    value = sequence - carried - int(begin["excess"])
    step, least = np.diff(value), np.diff(order)
    num_missing = least - 1
    num_missing[reading if at < len(least) else []] += 1
    is_tight = np.diff(sequence) == least  # nothing but collectives that take one each
    is_told = is_certain[:-1] & is_certain[1:]  # how many messages were between them
    explained = is_told & ((step == least) | ((num_missing == 0) & (kind[:-1] != COLLECTIVE)))
    is_exact = is_tight | explained | ((num_missing == 0) & ~is_told & (kind[:-1] != MONITORED)) | counts_alone
    taken = np.where(explained & (kind[:-1] == MONITORED), step - least, 0)
    value[1:] -= np.cumsum(taken)
    value += taken[:at].sum()  # what another thread's took before the counts were read is in `excess` as well
    # From the first that is not exact on, a monitored barrier whose record is missing may be in the count.
    is_unknown = bool(not reading and order[0] and not counts_alone) or bool((~is_exact[:at]).any())
    is_lost = np.logical_or.accumulate(np.concatenate([[is_unknown], ~is_exact]))
    number = np.where(is_certain & ~is_lost, value, -1)

    # What is uncertain by itself is as far from a certain one as the count says, where nothing else was between them.
    run = np.concatenate([[0], np.cumsum(~is_tight)])
    anchors = np.full(run[-1] + 1, -1)
    known = np.flatnonzero(number >= 0)[::-1]
    anchors[run[known]] = known
    anchor = anchors[run]
    number = np.where(anchor >= 0, number[anchor] + order - order[anchor], -1)
    number, order, is_lost = (np.delete(column, reading) for column in (number, order, is_lost))

    is_repeated = _are_repeated(number, order, counts_alone=counts_alone)
    number[is_repeated] = -1
    part.number[places] = number
    why = np.where(is_repeated, REPEATED, np.where(is_lost, MAY_FOLLOW_MONITORED, UNCOUNTED))
    part.doubt[places] = np.where(number >= 0, "", why)


def _are_repeated(number: Ints, order: Ints, *, counts_alone: bool) -> NDArray[np.bool_]:
    """Which numbers the backend has given twice; all, if it cannot have counted as was believed."""
    told = np.flatnonzero(number >= 0)
    rises = np.diff(number[told])
    if (rises < 0).any() or (not counts_alone and (rises < np.diff(order[told])).any()):
        return np.ones(len(number), bool)
    found = np.zeros(len(number), bool)
    if (rises == 0).any():
        same = np.flatnonzero(rises == 0)
        found[told[np.concatenate([same, same + 1])]] = True
        found[[0, -1]] = True  # of these it is unknown whether there were others
    return found


def _messages_before(starts: Ints, traffic: Traffic) -> tuple[Ints, NDArray[np.bool_]]:
    """How many of the group's messages the backend had counted when each began, and whether that is certain."""
    by_start = np.argsort(traffic.start, kind="stable")
    order = traffic.order[by_start]
    at = np.searchsorted(traffic.start[by_start], starts, "left")
    least = np.concatenate([[0], np.maximum.accumulate(order) + 1])[at]
    most = np.concatenate([np.minimum.accumulate(order[::-1])[::-1], [traffic.num_orders]])[at]
    num_failed = np.searchsorted(traffic.order[traffic.failed], least, "left")
    return traffic.num_before + least - num_failed, least == most


def _with(
    from_barrier: bool | None,
    record: CommRecord,
    order: int,
    peer: int,
    number: int,
    doubt: str,
    incarnation: int,
) -> CommRecord:
    """The record with what was found; `dataclasses.replace` takes twice the time."""
    return CommRecord(
        node=record.node,
        op=record.op,
        group=record.group,
        group_name=record.group_name,
        order=order,
        backend_sequence=record.backend_sequence,
        peer=peer,
        tag=record.tag,
        reduce_op=record.reduce_op,
        is_async=record.is_async,
        work_start_ns=record.work_start_ns,
        work_end_ns=record.work_end_ns,
        waited_ns=record.waited_ns,
        sent_bytes=record.sent_bytes,
        received_bytes=record.received_bytes,
        dtypes=record.dtypes,
        backend=record.backend,
        is_failed=record.is_failed,
        incarnation=incarnation,
        number=None if number < 0 else number,
        doubt=doubt,
        from_barrier=from_barrier,
    )
