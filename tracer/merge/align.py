"""Bring all ranks' times onto one clock, and split a communication's time into waiting and transfer (DESIGN rule 5).

Theory of operation. Processes of one running kernel share CLOCK_MONOTONIC: their offset is 0, and what two cores'
readings can differ by is the error. Hosts were compared by pings while they recorded (`record.clock_measuring`), each
with one other, so from the lowest rank's host one host after the other is fitted to those that are known
(`clock_fit`). What the program's own communications say of cause and effect counts like pings; where they alone say
something of a host, they alone bound its clock. At the end clocks are moved, within their errors, until no effect comes
before its cause (`clock_repair`).

A host of which nothing is known is set by its wall clock, whose error nobody knows: it is given as unknown, and then
who arrived last is unknown too: waiting and transfer between such ranks are not told apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.clock import Clock
from truedag.tracer.merge.clock_fit import Bounds, Curve, fit_curve
from truedag.tracer.merge.clock_repair import measure_violations, repair
from truedag.tracer.merge.facts import Facts
from truedag.tracer.record.trace import Trace

__all__ = ["Clock", "ClockSource", "Span", "align_clocks", "find_violations", "split_waiting"]

# How far two readings of one kernel's CLOCK_MONOTONIC on two cores may lie apart: TSC synchronisation is checked to
# within this at boot. Source: Linux, arch/x86/kernel/tsc_sync.c (warp check); generous for others.
SAME_HOST_ERROR_NS = 1_000
_REFERENCE = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One participant's time in a communication: it arrives, from `start_ns` on data can move, it ends.

    Waiting is start - arrive, transfer is end - start.
    """

    arrive_ns: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockSource:
    """What a rank's trace tells of its clock."""

    meta: Mapping[str, Any]
    clock_samples: Sequence[Mapping[str, Any]]
    """As in `Trace`."""
    end_ns: int
    """When it had recorded everything."""

    @classmethod
    def of(cls, trace: Trace) -> ClockSource:
        """Take it from a trace; one that lost its end ends with its last operator."""
        if "clock_end" in trace.meta:
            end = int(trace.meta["clock_end"]["monotonic_ns"])
        else:
            begin = int(trace.meta["clock_begin"]["monotonic_ns"])
            end = max([begin, *(int(thread.events["end_ns"].max(initial=begin)) for thread in trace.threads)])
        return cls(meta=trace.meta, clock_samples=trace.clock_samples, end_ns=end)

    @property
    def rank(self) -> int:
        """Which rank it is."""
        return int(self.meta["rank"])

    @property
    def begin_ns(self) -> int:
        """When it began to record."""
        return int(self.meta["clock_begin"]["monotonic_ns"])


def align_clocks(traces: Sequence[Trace | ClockSource], order: Facts | None = None) -> dict[int, Clock]:
    """Return each rank's clock against the lowest rank's.

    Args:
        traces: the ranks', or what is needed of them.
        order: what their communications say of cause and effect (`causality`), by rank, where it is known already.
    """
    sources = [one if isinstance(one, ClockSource) else ClockSource.of(one) for one in traces]
    first = min(sources, key=lambda source: source.rank)
    hosts = _Hosts(sources, first)
    curves = hosts.fit(order)
    clocks = {}
    for source in sources:
        curve = curves.get(hosts.number[source.meta["boot_id"]])
        begin = np.array([source.begin_ns])
        if curve is None:
            offset = _wall_minus_monotonic(source) - _wall_minus_monotonic(first)
            clocks[source.rank] = Clock(offset_ns=offset, error_ns=None)
        elif source.meta["boot_id"] == first.meta["boot_id"]:
            clocks[source.rank] = Clock(offset_ns=0, error_ns=0 if source is first else SAME_HOST_ERROR_NS)
        else:
            clocks[source.rank] = Clock(
                offset_ns=int(curve.correct(begin)[0] - begin[0]),
                error_ns=math.ceil(curve.error_ns) + SAME_HOST_ERROR_NS,
                knots=tuple(zip(curve.knots_ns.tolist(), curve.offsets_ns.tolist(), strict=True)),
            )
    return clocks


def find_violations(order: Facts, clocks: Mapping[int, Clock]) -> NDArray[np.int64]:
    """Return by how many ns effects come before their causes where they do: empty if all is well.

    What concerns ranks of unknown clocks is left out.
    """
    known = np.array([rank for rank, clock in clocks.items() if clock.error_ns is not None], np.int64)
    is_known = np.isin(order.before, known) & np.isin(order.after, known)
    violation = -order.slack_ns
    for rank in known.tolist():
        cause, effect = order.before == rank, order.after == rank
        violation[cause] += clocks[rank].correct(order.before_ns[cause])
        violation[effect] -= clocks[rank].correct(order.after_ns[effect])
    return violation[is_known & (violation > 0)]


def split_waiting(arrivals: Mapping[int, int], ends: Mapping[int, int]) -> dict[int, Span]:
    """Split each participant's time at the arrival of the last one.

    A participant that ends before (the root of a broadcast need not wait) transferred nothing that had to wait.
    """
    last = max(arrivals.values())
    return {
        rank: Span(arrive_ns=arrive, start_ns=min(last, ends[rank]), end_ns=ends[rank])
        for rank, arrive in arrivals.items()
    }


class _Hosts:
    """The clocks of the hosts, by number; the first trace's is `_REFERENCE`."""

    def __init__(self, sources: Sequence[ClockSource], first: ClockSource) -> None:
        names = dict.fromkeys([str(first.meta["boot_id"]), *(str(source.meta["boot_id"]) for source in sources)])
        told = [sample for source in sources for sample in source.clock_samples]
        names |= dict.fromkeys(name for sample in told for name in (sample["clock"], sample["peer_clock"]))
        self.number = {name: number for number, name in enumerate(names)}
        self._of_rank = {source.rank: self.number[source.meta["boot_id"]] for source in sources}
        rows = [
            row
            for sample in told
            for sent, arrived, left, returned in sample["pings"]
            for row in (
                (self.number[sample["clock"]], sent, self.number[sample["peer_clock"]], arrived, 0),
                (self.number[sample["peer_clock"]], left, self.number[sample["clock"]], returned, 0),
            )
        ]
        self._pings = Facts.of(rows)
        self._spans: dict[int, tuple[int, int]] = {}
        for source in sources:
            host, begin, end = self._of_rank[source.rank], source.begin_ns, source.end_ns
            known = self._spans.get(host, (begin, end))
            self._spans[host] = (min(begin, known[0]), max(end, known[1]))

    def fit(self, order: Facts | None) -> dict[int, Curve]:
        """Return the curves of the clocks of which something is known."""
        curves = {_REFERENCE: Curve.zero()}
        if len(self.number) == 1:
            return curves
        self._attach(curves, self._pings, self._pings)
        if order is None:
            return curves
        facts = Facts.join(self._pings, self._plausible(self._by_host(order), curves))
        curves = {_REFERENCE: Curve.zero()}
        self._attach(curves, self._pings, facts)  # the tree of pings first: nothing bounds a clock better
        self._attach(curves, facts, facts)
        known = np.array(sorted(curves), np.int64)
        return repair(facts.take(np.isin(facts.before, known) & np.isin(facts.after, known)), curves, _REFERENCE)

    def _plausible(self, facts: Facts, curves: Mapping[int, Curve]) -> Facts:
        """Leave out what contradicts the pings by more than the clocks' errors: a backend told a time wrongly."""
        known = np.array(sorted(curves), np.int64)
        errors = np.array([curves[clock].error_ns if clock in curves else 0.0 for clock in range(len(self.number))])
        is_known = np.isin(facts.before, known) & np.isin(facts.after, known)
        violation = np.zeros(len(facts.before), np.int64)
        violation[is_known] = measure_violations(facts.take(is_known), curves)
        return facts.take(violation <= errors[facts.before] + errors[facts.after])

    def _by_host(self, order: Facts) -> Facts:
        ranks = np.array(sorted(self._of_rank), np.int64)
        hosts = np.array([self._of_rank[rank] for rank in ranks.tolist()], np.int64)
        before = hosts[np.searchsorted(ranks, order.before)]
        after = hosts[np.searchsorted(ranks, order.after)]
        rows = np.column_stack([before, order.before_ns, after, order.after_ns, order.slack_ns])
        return Facts.of(rows[before != after])

    def _attach(self, curves: dict[int, Curve], links: Facts, facts: Facts) -> None:
        """Fit the clocks that `links` join to known ones, by all facts between them, until there are no more."""
        while True:
            known = np.array(sorted(curves), np.int64)
            before, after = np.isin(links.before, known), np.isin(links.after, known)
            near = set(links.after[before & ~after].tolist()) & set(links.before[after & ~before].tolist())
            found = {clock: self._fit_one(clock, curves, facts) for clock in sorted(near)}
            fitted = {clock: curve for clock, curve in found.items() if curve is not None}
            if not fitted:
                return
            curves |= fitted

    def _fit_one(self, clock: int, curves: Mapping[int, Curve], facts: Facts) -> Curve | None:
        known = np.array(sorted(curves), np.int64)
        above = facts.take((facts.before == clock) & np.isin(facts.after, known))
        below = facts.take((facts.after == clock) & np.isin(facts.before, known))
        upper = Bounds(
            times_ns=above.before_ns,
            offsets_ns=_corrected(curves, above.after, above.after_ns, 1) - above.before_ns + above.slack_ns,
        )
        lower = Bounds(
            times_ns=below.after_ns,
            offsets_ns=_corrected(curves, below.before, below.before_ns, -1) - below.after_ns - below.slack_ns,
        )
        pings = [
            self._pings.before_ns[self._pings.before == clock],
            self._pings.after_ns[self._pings.after == clock],
        ]
        bursts = np.concatenate(pings)
        times = np.concatenate([upper.times_ns, lower.times_ns])
        span = self._spans.get(clock, (int(times.min(initial=0)), int(times.max(initial=0))))
        return fit_curve(upper, lower, bursts, span)


def _corrected(
    curves: Mapping[int, Curve], clocks: NDArray[np.int64], times_ns: NDArray[np.int64], sign: int
) -> NDArray[np.int64]:
    """Times of several known clocks on the reference's, moved to the side on which they certainly lie."""
    corrected = times_ns.copy()
    for clock in np.unique(clocks).tolist():
        mine = clocks == clock
        corrected[mine] = curves[clock].correct(times_ns[mine]) + sign * math.ceil(curves[clock].error_ns)
    return corrected


def _wall_minus_monotonic(source: ClockSource) -> int:
    sample = source.meta["clock_begin"]
    return int(sample["realtime_ns"]) - int(sample["monotonic_ns"])
