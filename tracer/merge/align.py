"""Bring all ranks' times onto one clock, and split a communication's time into waiting and transfer (DESIGN rule 5).

Processes of one running kernel share CLOCK_MONOTONIC: their offset is 0, and what two cores' readings can differ by is
the error. Ranks of different hosts are set by their wall clocks, whose error nobody knows: it is given as unknown, and
then who arrived last is unknown too: waiting and transfer between such ranks are not told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from truedag.tracer.record.trace import Trace

# How far two readings of one kernel's CLOCK_MONOTONIC on two cores may lie apart: TSC synchronisation is checked to
# within this at boot. Source: Linux, arch/x86/kernel/tsc_sync.c (warp check); generous for others.
SAME_HOST_ERROR_NS = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """What to add to a rank's times, and how wrong that may be (None: unknown)."""

    offset_ns: int
    error_ns: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One participant's time in a communication: it arrives, from `start_ns` on data can move, it ends.

    Waiting is start - arrive, transfer is end - start.
    """

    arrive_ns: int
    start_ns: int
    end_ns: int


def align_clocks(traces: Sequence[Trace]) -> dict[int, Clock]:
    """Return each rank's clock against the lowest rank's."""
    first = min(traces, key=lambda trace: trace.rank)
    clocks = {}
    for trace in traces:
        if trace.meta["boot_id"] == first.meta["boot_id"]:
            error = 0 if trace is first else SAME_HOST_ERROR_NS
            clocks[trace.rank] = Clock(offset_ns=0, error_ns=error)
        else:
            offset = _wall_minus_monotonic(trace) - _wall_minus_monotonic(first)
            clocks[trace.rank] = Clock(offset_ns=offset, error_ns=None)
    return clocks


def split_waiting(arrivals: Mapping[int, int], ends: Mapping[int, int]) -> dict[int, Span]:
    """Split each participant's time at the arrival of the last one.

    A participant that ends before (the root of a broadcast need not wait) transferred nothing that had to wait.
    """
    last = max(arrivals.values())
    return {
        rank: Span(arrive_ns=arrive, start_ns=min(last, ends[rank]), end_ns=ends[rank])
        for rank, arrive in arrivals.items()
    }


def _wall_minus_monotonic(trace: Trace) -> int:
    sample = trace.meta["clock_begin"]
    return int(sample["realtime_ns"]) - int(sample["monotonic_ns"])
