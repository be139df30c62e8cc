"""What number each message of one group has in its lane (`numbering` says how)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.sequences import (
    FROM_ANY,
    FROM_ANYBODY,
    MISSING,
    NEVER,
    RECEIVE,
    SEND,
    UNKNOWN_SOURCE,
    Ints,
    Part,
    Told,
    copy_twins,
    once,
)

_COUNT_ALL = frozenset({"gloo"})  # backends that count messages among the collectives


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What is known of a group's messages on one rank, for the numbers of its collectives."""

    order: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    start: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    failed: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    num_before: int = 0  # since the group was made, before the first of the recording
    num_orders: int = 0  # in the recording
    is_absolute: bool = False  # whether the rank counted them from when the group was made
    is_known: bool = True  # whether it is known how many there were, up to each
    is_counted: bool | None = None  # by the backend; None: unknown

    @property
    def num_messages(self) -> int:
        """How many the rank knows of, since the group was made."""
        return self.num_before + self.num_orders


def number_messages(part: Part, told: Told, *, is_one: bool, hears_all: bool) -> Traffic:
    """Number the messages of one group; return what they tell of its collectives."""
    begin, end = told.begin, told.end
    places, twins = once(part, np.flatnonzero(part.kind >= SEND))
    order, failed = part.order[places], part.failed[places]
    missing = order - np.arange(len(order))  # how many before it
    # What another thread did between the recording's begin and the count's reading is in both.
    early = ~failed & (part.start[places] < begin["time_ns"])
    num_early, num_failed = int(early.sum()), int(failed.sum())
    num_heard = (int(order[-1]) + 1 if len(order) else 0) - num_early - num_failed
    num_counted = num_heard if end is None else int(end["messages"]) - int(begin["messages"])
    is_sound = is_one and not begin["busy"] and num_counted >= len(order) - num_early - num_failed
    # That nothing had happened on a group when counting began is by the backend's count, which must be of all.
    is_first = begin["made_ns"] > 0 or bool(begin["counted"]) or part.backend in _COUNT_ALL
    is_absolute = is_one and is_first and bool(begin["absolute"])
    is_heard = hears_all or (num_counted == num_heard and not missing.any())

    by_number = dict(end["sources"]) if end is not None and is_sound and is_heard else {}
    sources = {int(number): part.ranks[at] for number, at in by_number.items() if at < len(part.ranks)}
    index = int(begin["messages"]) - num_early + order - np.cumsum(failed) + failed
    for i in np.flatnonzero((part.kind[places] == FROM_ANY) & ~failed).tolist():
        if not missing[i] and int(index[i]) in sources:
            part.peer[places[i]] = sources[int(index[i])]
        else:
            part.doubt[places[i]] = UNKNOWN_SOURCE

    is_in_doubt = (missing > 0) | np.bool_(not (is_sound and is_heard))
    part.doubt[places[is_in_doubt & ~failed & (part.doubt[places] == "")]] = MISSING
    _doubt_receives_from_anybody(part, places, max(num_counted, num_heard) + num_early + num_failed)
    _doubt_after_receives_from_anybody(part, places, begin, sources)

    laned = places[~failed & (part.peer[places] >= 0)]
    lane, lanes = _lanes(part, laned)
    at_begin = np.array([_count_of(begin, part.ranks, *one) for one in lanes], np.int64)
    at_begin -= np.bincount(lane[part.start[laned] < begin["time_ns"]], minlength=len(lanes))
    for number, tag in begin["open"]:
        if number in sources and (known := (0, sources[number], tag)) in lanes:
            at_begin[lanes[known]] += 1
    if is_absolute and is_sound:
        part.number[laned] = at_begin[lane] + _places_within(lane)
    copy_twins(part, twins)
    return Traffic(
        order=order,
        start=part.start[places],
        failed=failed,
        num_before=int(begin["messages"]) - num_early,
        num_orders=max(num_counted, num_heard) + num_early + num_failed,
        is_absolute=is_absolute,
        is_known=is_sound and is_heard,
        is_counted=begin["counted"] if begin["counted"] is not None else _is_counted(part, places, missing),
    )


def _doubt_receives_from_anybody(part: Part, places: Ints, num_orders: int) -> None:
    """Doubt receives from any source that may have waited while a receive began whose record is missing."""
    starts = part.start[places]
    order = np.append(part.order[places], num_orders)
    for i in np.flatnonzero(part.kind[places] == FROM_ANY).tolist():
        after = np.flatnonzero(starts[i + 1 :] >= part.end[places[i]])
        until = i + 1 + (int(after[0]) if len(after) else len(starts) - i - 1)
        if order[until] - order[i] != until - i and part.doubt[places[i]] == "":
            part.doubt[places[i]] = FROM_ANYBODY


def _doubt_after_receives_from_anybody(
    part: Part, places: Ints, begin: Mapping[str, Any], sources: Mapping[int, int]
) -> None:
    """Doubt receives of which a receive from any source may have taken the message, or the other way round."""
    open_tags = {tag for number, tag in begin["open"] if number not in sources}
    open_lanes = {(sources[number], tag) for number, tag in begin["open"] if number in sources}
    receives = places[(part.kind[places] >= RECEIVE) & ~part.failed[places]]
    from_any = part.kind[receives] == FROM_ANY
    if not (from_any.any() or open_tags or open_lanes):
        return
    doubtful: list[int] = []
    by_lane: dict[tuple[int, int], list[int]] = {}
    for place, peer, tag in zip(
        receives.tolist(), part.peer[receives].tolist(), part.tag[receives].tolist(), strict=True
    ):
        if tag in open_tags:
            doubtful.append(place)
        elif peer < 0:
            open_tags.add(tag)
        else:
            by_lane.setdefault((peer, tag), []).append(place)
    for lane, mine in by_lane.items():
        waiting = NEVER if lane in open_lanes else -NEVER  # until when one from any source may have waited
        waiters: list[int] = []
        for place in mine:
            start, end = int(part.start[place]), int(part.end[place])
            if part.kind[place] == FROM_ANY:
                waiters.append(place)
                waiting = max(waiting, end)
            elif start < waiting:
                doubtful.append(place)
                doubtful.extend(one for one in waiters if start < int(part.end[one]))
    chosen = np.array(doubtful, np.int64)
    part.doubt[chosen[part.doubt[chosen] == ""]] = FROM_ANYBODY


def _lanes(part: Part, places: Ints) -> tuple[Ints, dict[tuple[int, int, int], int]]:
    """The lane of each message, and the lanes: whether it is a send, the peer, the tag."""
    peers, peer = np.unique(part.peer[places], return_inverse=True)
    tags, tag = np.unique(part.tag[places], return_inverse=True)
    code = (peer * len(tags) + tag) * 2 + (part.kind[places] == SEND)
    codes, lane = np.unique(code, return_inverse=True)
    lanes = {
        (code % 2, int(peers[code // 2 // len(tags)]), int(tags[code // 2 % len(tags)])): i
        for i, code in enumerate(codes.tolist())
    }
    return lane, lanes


def _count_of(begin: Mapping[str, Any], ranks: tuple[int, ...], is_send: int, peer: int, tag: int) -> int:
    """How many messages a lane had carried when the recording began."""
    for at, known_tag, sent, received in begin["lanes"]:
        if at < len(ranks) and (ranks[at], known_tag) == (peer, tag):
            return int(sent if is_send else received)
    return 0


def _places_within(code: Ints) -> Ints:
    """How many of the same code come before each."""
    order = np.argsort(code, kind="stable")
    sorted_code = code[order]
    first = np.searchsorted(sorted_code, sorted_code, "left")
    found = np.empty(len(code), np.int64)
    found[order] = np.arange(len(code)) - first
    return found


def _is_counted(part: Part, messages: Ints, missing: Ints) -> bool | None:
    """Whether the backend counted the recorded messages as well; None: that cannot be told."""
    others = np.flatnonzero((part.kind < SEND) & (part.doubt == ""))
    both = np.concatenate([messages, others])
    both = both[~part.failed[both]]
    both = both[np.argsort(part.start[both], kind="stable")]
    after = np.flatnonzero(part.kind[both[:-1]] >= SEND)
    if not len(after):
        return True  # whatever it is: nothing that is recorded comes after
    if not (part.sequence[both[after + 1]] > part.sequence[both[after]]).any():
        return False
    orders = np.unique(part.order[others])
    is_complete = not missing.any() and len(orders) == (orders[-1] + 1 if len(orders) else 0)
    return True if is_complete or part.backend in _COUNT_ALL else None  # it may be what is missing that was counted
