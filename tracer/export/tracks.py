"""Which track of its rank each slice is on: threads, streams, one for each axis, and lanes for what overlaps there."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.export.numbering import Ints, number_values, sort_places

THREAD, STREAM, COMMUNICATION = range(3)
_NAMES = {THREAD: "thread {}", STREAM: "stream {}", COMMUNICATION: "{} communication"}
_NUMBER_BITS = 38  # of a thread, a stream or an axis, from -1
_LANE_BITS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Tracks, and where slices are.

    Attributes:
        tracks: rank, place (of a track among those of its rank, from 0), name; in the order of ranks and places.
        track: [slices] the row of `tracks`.
    """

    tracks: pl.DataFrame
    track: Ints


def place_slices(slices: pl.DataFrame, axes: Sequence[str]) -> Placed:
    """Give slices of some ranks their tracks; those of a track do not overlap.

    Args:
        slices: rank, order (THREAD, ...), number (of the thread or stream, or the place of its axis in `axes`),
            start_ns, end_ns.
        axes: names of axes.
    """
    rank, order, number, start_ns, end_ns = (
        slices[name].cast(pl.Int64).to_numpy() for name in ("rank", "order", "number", "start_ns", "end_ns")
    )
    known, track = number_values(((rank << 2) + order << _NUMBER_BITS) + number + 1)
    lane = _find_lanes(track, len(known), start_ns, end_ns)
    if not lane.any():
        return Placed(tracks=_name(known, np.zeros(len(known), np.int64), axes), track=track)
    split, track = number_values((track << _LANE_BITS) + lane)
    return Placed(tracks=_name(known[split >> _LANE_BITS], split & (1 << _LANE_BITS) - 1, axes), track=track)


def _name(keys: Ints, lanes: Ints, axes: Sequence[str]) -> pl.DataFrame:
    names = []
    numbers = (keys & (1 << _NUMBER_BITS) - 1) - 1
    orders = keys >> _NUMBER_BITS & 3
    for order, number, lane in zip(orders.tolist(), numbers.tolist(), lanes.tolist(), strict=True):
        name = _NAMES[order].format(axes[number] if order == COMMUNICATION else number)
        names.append(f"{name} ({lane + 1})" if lane else name)
    rank = keys >> _NUMBER_BITS + 2
    return pl.DataFrame({"rank": rank, "name": names}, schema={"rank": pl.Int64, "name": pl.String}).select(
        "rank", pl.int_range(pl.len()).over("rank").alias("place"), "name"
    )


def _find_lanes(track: Ints, num_tracks: int, start_ns: Ints, end_ns: Ints) -> Ints:
    """Return the lane of each slice: 0 but for what begins on its track before what is on the lanes below has ended."""
    lanes = np.zeros(len(track), np.int64)
    order, begins = sort_places(track, num_tracks)
    # Most tracks lie in the order of time already.
    for place in _disordered(track[order], start_ns[order], end_ns[order]):
        own = order[begins[place] : begins[place + 1]]
        order[begins[place] : begins[place + 1]] = own[np.lexsort((end_ns[own], start_ns[own]))]
    for place in _overlapping(track[order], start_ns[order], end_ns[order]):
        own = order[begins[place] : begins[place + 1]]
        lanes[own] = _split(start_ns[own], end_ns[own])
    return lanes


def _disordered(track: Ints, start_ns: Ints, end_ns: Ints) -> NDArray[np.int64]:
    """Return tracks whose slices are not in the order of their starts and ends."""
    before, after = slice(None, -1), slice(1, None)
    is_later = start_ns[before] > start_ns[after]
    is_later |= (start_ns[before] == start_ns[after]) & (end_ns[before] > end_ns[after])
    return np.unique(track[after][is_later & (track[before] == track[after])])


def _overlapping(track: Ints, start_ns: Ints, end_ns: Ints) -> NDArray[np.int64]:
    """Return tracks on which a slice begins before an earlier one has ended; slices are in the order of time."""
    if not len(track):
        return track
    base = int(start_ns.min())
    stretch = int(end_ns.max()) - base + 1
    shift = track * stretch - base  # one track after the other
    reach = np.maximum.accumulate(end_ns + shift)
    return np.unique(track[1:][(start_ns + shift)[1:] < reach[:-1]])


def _split(start_ns: Ints, end_ns: Ints) -> list[int]:
    """Return the lowest lane that is free at each start."""
    lanes: list[int] = []
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    for start, end in zip(start_ns.tolist(), end_ns.tolist(), strict=True):
        while busy and busy[0][0] <= start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (end, lane))
        lanes.append(lane)
    return lanes
