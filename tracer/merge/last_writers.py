"""A map from the bytes of one piece of memory to who wrote them last.

Theory of operation. It is a list of disjoint byte runs in order, each with its writer. A tensor that is one run is
found there by bisection. A strided tensor can be millions of runs, and is listed only if the answer depends on it: it
is read as a whole where one run holds all of it, and a write of it stays pending, on top of the list, until something
else touches what lies between its first and its last byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.regions import Runs, runs, sorted_once
from truedag.tracer.record.trace import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A tensor in its storage, in bytes."""

    layout: Layout
    offset: int
    begin: int
    end: int
    num_bytes: int

    @property
    def is_dense(self) -> bool:
        """Whether it is one run."""
        return self.end - self.begin == self.num_bytes


class LastWriters:
    """Who wrote each byte last."""

    def __init__(self) -> None:
        self._begins = np.zeros(0, np.int64)
        self._ends = np.zeros(0, np.int64)
        self._writers = np.zeros(0, np.int64)
        self._pending: list[tuple[Place, int]] = []  # none reaches between the ends of another

    def write(self, place: Place, writer: int) -> None:
        """Note that all of a place was written."""
        if place.num_bytes == 0:
            return
        if self._pending:
            self._settle(place, is_covered=place.is_dense)
        if place.is_dense:
            self._write_run(place.begin, place.end, writer)
        else:
            self._pending.append((place, writer))

    def read(self, place: Place) -> tuple[dict[int, int], int]:
        """Return the bytes of a place by writer, and how many nobody wrote."""
        for pending, writer in self._pending:
            if pending == place:
                return {writer: place.num_bytes}, 0
        if self._pending:
            self._settle(place, is_covered=False)
        low, high = self._span(place.begin, place.end)
        if low == high:
            return {}, place.num_bytes
        if high == low + 1 and self._begins[low] <= place.begin and self._ends[low] >= place.end:
            return {int(self._writers[low]): place.num_bytes}, 0
        if place.is_dense:
            counts = np.minimum(self._ends[low:high], place.end) - np.maximum(self._begins[low:high], place.begin)
            owners = self._writers[low:high]
        else:
            points, owners, inside = self._cut(low, high, runs(place.layout, place.offset))
            counts, owners = np.diff(points)[inside], owners[inside]
            counts, owners = counts[owners != _NOBODY], owners[owners != _NOBODY]
        writers, inverse = np.unique(owners, return_inverse=True)
        sums = np.zeros(len(writers), np.int64)
        np.add.at(sums, inverse, counts)
        return dict(zip(writers.tolist(), sums.tolist(), strict=True)), place.num_bytes - int(sums.sum())

    def _settle(self, place: Place, *, is_covered: bool) -> None:
        """Bring into the list what is pending between the ends of a place, but for what is now overwritten whole."""
        kept = []
        for pending, writer in self._pending:
            if pending.end <= place.begin or place.end <= pending.begin:
                kept.append((pending, writer))
            elif not (is_covered and place.begin <= pending.begin and pending.end <= place.end) and pending != place:
                low, high = self._span(pending.begin, pending.end)
                points, owners, inside = self._cut(low, high, runs(pending.layout, pending.offset))
                self._replace(low, high, points, np.where(inside, writer, owners))
        self._pending = kept

    def _span(self, begin: int, end: int) -> tuple[int, int]:
        """Return the range of runs that overlap [begin, end)."""
        return int(self._ends.searchsorted(begin, "right")), int(self._begins.searchsorted(end, "left"))

    def _write_run(self, begin: int, end: int, writer: int) -> None:
        low, high = self._span(begin, end)
        if high == low + 1 and self._begins[low] == begin and self._ends[low] == end:
            self._writers[low] = writer
            return
        begins, ends, writers = [begin], [end], [writer]
        if low < high and self._begins[low] < begin:
            begins.insert(0, int(self._begins[low]))
            ends.insert(0, begin)
            writers.insert(0, int(self._writers[low]))
        if low < high and self._ends[high - 1] > end:
            begins.append(end)
            ends.append(int(self._ends[high - 1]))
            writers.append(int(self._writers[high - 1]))
        self._splice(low, high, np.array(begins), np.array(ends), np.array(writers))

    def _cut(self, low: int, high: int, region: Runs) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Cut memory wherever a run of the list or of the region begins or ends.

        Returns the cuts, and for each piece between two its writer and whether the region holds it.
        """
        begins, ends, writers = self._begins[low:high], self._ends[low:high], self._writers[low:high]
        points = sorted_once(np.concatenate((begins, ends, region[:, 0], region[:, 1])))
        pieces = points[:-1]
        run = begins.searchsorted(pieces, "right") - 1
        owned = (run >= 0) & (pieces < np.append(ends, 0)[run])
        owners = np.where(owned, np.append(writers, _NOBODY)[run], _NOBODY)
        inside = pieces < region[region[:, 0].searchsorted(pieces, "right") - 1, 1]
        inside &= pieces >= region[0, 0]
        return points, owners, inside

    def _replace(self, low: int, high: int, points: NDArray[np.int64], owners: NDArray[np.int64]) -> None:
        """Put pieces between cuts in place of runs, neighbours of one writer as one."""
        first = np.flatnonzero(np.diff(owners, prepend=_NOBODY - 1))
        begins, ends, writers = points[first], points[np.append(first[1:], len(owners))], owners[first]
        kept = writers != _NOBODY
        self._splice(low, high, begins[kept], ends[kept], writers[kept])

    def _splice(
        self,
        low: int,
        high: int,
        begins: NDArray[np.int64],
        ends: NDArray[np.int64],
        writers: NDArray[np.int64],
    ) -> None:
        self._begins = np.concatenate((self._begins[:low], begins, self._begins[high:]))
        self._ends = np.concatenate((self._ends[:low], ends, self._ends[high:]))
        self._writers = np.concatenate((self._writers[:low], writers, self._writers[high:]))


_NOBODY = np.iinfo(np.int64).min + 1
