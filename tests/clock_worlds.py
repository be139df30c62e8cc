"""Clocks that go wrong as told, and what pings between them would have measured: worlds whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from truedag.tracer.record.clock_measuring import FIRST_PINGS, INTERVALS_S, LATER_PINGS
from truedag.tracer.record.clock_pings import Ping, keep_quickest
from truedag.tracer.record.trace import Trace

SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongClock:
    """A clock that shows `offset_ns` more than the truth at time 0, and gains `drift` of what passes."""

    offset_ns: int = 0
    drift: float = 0.0

    def __call__(self, time_ns: int) -> int:
        """Return what it shows at a true time."""
        return time_ns + self.offset_ns + round(self.drift * time_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What a message needs from one host to another: never less than `least_ns`, more by chance."""

    least_ns: int
    jitter_ns: float
    stall_ns: float = 0.0
    """One message in ten is held up by as much more, or less."""

    def delay(self, random: np.random.Generator) -> int:
        """Draw one."""
        delay = self.least_ns + random.exponential(self.jitter_ns)
        if self.stall_ns and random.random() < 0.1:
            delay += random.exponential(self.stall_ns)
        return int(delay)


def ping(
    time_ns: int, here: WrongClock, there: WrongClock, out: Way, back: Way, random: np.random.Generator
) -> tuple[Ping, int]:
    """Ping at a true time; return the ping, and when it was over."""
    arrived = time_ns + out.delay(random)
    left = arrived + int(random.exponential(5_000))
    returned = left + back.delay(random)
    return (here(time_ns), there(arrived), there(left), here(returned)), returned


def measure(
    here: WrongClock,
    there: WrongClock,
    out: Way,
    back: Way,
    random: np.random.Generator,
    *,
    begin_ns: int,
    duration_s: float,
    names: tuple[str, str],
) -> list[dict[str, object]]:
    """Return the CLOCK entries of a recording: pings when the recorder would have sent them."""
    end_ns = begin_ns + int(duration_s * SECOND_NS)
    moments = [begin_ns]
    for turn in range(10_000):
        following = moments[-1] + int(INTERVALS_S[min(turn, len(INTERVALS_S) - 1)] * SECOND_NS)
        if following >= end_ns:
            break
        moments.append(following)
    samples: list[dict[str, object]] = []
    for moment, count in zip([*moments, end_ns], [FIRST_PINGS, *[LATER_PINGS] * len(moments)], strict=True):
        pings, time_ns = [], moment
        for _ in range(count):
            one, time_ns = ping(time_ns, here, there, out, back, random)
            pings.append(one)
        kept = [list(one) for one in keep_quickest(pings)]
        samples.append({"clock": names[0], "peer_clock": names[1], "num_pings": count, "pings": kept})
    return samples


def make_trace(
    rank: int,
    world_size: int,
    clock: WrongClock,
    name: str,
    samples: Sequence[dict[str, object]],
    span_ns: tuple[int, int],
) -> Trace:
    """Make a trace of a rank that ran nothing in a span of true time."""

    def sample(time_ns: int) -> dict[str, int]:
        return {"monotonic_ns": clock(time_ns), "realtime_ns": time_ns, "spread_ns": 100}

    return Trace(
        path=Path(f"rank-{rank:05d}.trace"),
        closed=True,
        truncated="",
        meta={
            "rank": rank,
            "world_size": world_size,
            "boot_id": name,
            "clock_begin": sample(span_ns[0]),
            "clock_end": sample(span_ns[1]),
        },
        threads=[],
        ops={},
        layouts={},
        storage_records=np.zeros(0),
        groups={},
        group_ranks={},
        labels={},
        contexts={},
        lanes=[],
        clock_samples=list(samples),
        named_tensors=[],
    )
