"""Clocks fitted to pings and to cause and effect, in worlds whose true clocks are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from clock_worlds import SECOND_NS, Way, WrongClock, make_trace, measure, ping
from hypothesis import given, settings
from hypothesis import strategies as st

from truedag.tracer.merge.align import Clock, align_clocks, find_violations
from truedag.tracer.merge.facts import Facts
from truedag.tracer.record.trace import Trace

QUIET = Way(least_ns=20_000, jitter_ns=1_000)


def draw_clock(random: np.random.Generator) -> WrongClock:
    return WrongClock(offset_ns=int(random.uniform(-1e10, 1e10)), drift=random.uniform(-2e-4, 2e-4))


def draw_way(random: np.random.Generator) -> Way:
    return Way(least_ns=int(random.uniform(5e3, 2e5)), jitter_ns=random.uniform(1e3, 1e5), stall_ns=1e6)


def error_of(clock: Clock, wrong: WrongClock, reference: WrongClock, span_ns: tuple[int, int]) -> int:
    """The largest error of corrected times in a span of true time."""
    moments = np.linspace(*span_ns, 50).astype(np.int64).tolist()
    shown = np.array([wrong(moment) for moment in moments])
    wanted = np.array([reference(moment) for moment in moments])
    return int(np.abs(clock.correct(shown) - wanted).max())


def two_hosts(
    clocks: tuple[WrongClock, WrongClock],
    ways: tuple[Way, Way],
    random: np.random.Generator,
    *,
    begin_ns: int,
    duration_s: float,
) -> tuple[list[Trace], tuple[int, int]]:
    samples = measure(
        clocks[1], clocks[0], *ways, random, begin_ns=begin_ns, duration_s=duration_s, names=("host1", "host0")
    )
    span = (begin_ns - 10_000_000, begin_ns + int(duration_s * SECOND_NS) + 10_000_000)
    traces = [
        make_trace(rank, 2, clocks[rank], f"host{rank}", samples if rank else [], span_ns=span) for rank in range(2)
    ]
    return traces, span


def test_the_stated_error_covers_the_truth() -> None:
    random = np.random.default_rng(5)
    num_wrong = 0
    for _ in range(1000):
        clocks = draw_clock(random), draw_clock(random)
        traces, span = two_hosts(
            clocks,
            (draw_way(random), draw_way(random)),
            random,
            begin_ns=int(random.uniform(1e9, 1e12)),
            duration_s=float(10 ** random.uniform(-1.5, 1.5)),
        )
        clock = align_clocks(traces)[1]
        assert clock.error_ns is not None
        num_wrong += error_of(clock, clocks[1], clocks[0], span) > clock.error_ns
    assert num_wrong <= 10


@pytest.mark.parametrize(("out_us", "back_us"), [(20, 20), (500, 20), (20, 5000), (1, 3)])
def test_the_offset_is_off_by_half_the_asymmetry_at_most(out_us: int, back_us: int) -> None:
    random = np.random.default_rng(6)
    clocks = WrongClock(offset_ns=3 * SECOND_NS, drift=-1e-4), WrongClock(offset_ns=-7 * SECOND_NS, drift=2e-4)
    ways = Way(least_ns=1000 * out_us, jitter_ns=300), Way(least_ns=1000 * back_us, jitter_ns=300)
    traces, span = two_hosts(clocks, ways, random, begin_ns=10**9, duration_s=3.0)
    clock = align_clocks(traces)[1]
    assert error_of(clock, clocks[1], clocks[0], span) <= 500 * abs(out_us - back_us) + 10_000
    assert clock.drift_ppm == pytest.approx(-300.0, abs=5.0)


def test_a_clock_that_changes_its_rate_stays_within_its_error_where_it_was_compared() -> None:
    random = np.random.default_rng(7)
    right, early, late = WrongClock(), WrongClock(drift=1e-4), WrongClock(drift=-1e-4, offset_ns=200_000)
    middle_ns = SECOND_NS  # both show the same there
    first = measure(early, right, QUIET, QUIET, random, begin_ns=10**6, duration_s=0.99, names=("b", "a"))
    second = measure(late, right, QUIET, QUIET, random, begin_ns=middle_ns + 10**6, duration_s=1.0, names=("b", "a"))
    span = (0, 2 * SECOND_NS + 2 * 10**6)
    traces = [make_trace(0, 2, right, "a", [], span_ns=span), make_trace(1, 2, late, "b", [*first, *second], span)]
    clock = align_clocks(traces)[1]
    assert clock.error_ns is not None
    for moment in (10**6, middle_ns, 2 * middle_ns):
        shown = (early if moment < middle_ns else late)(moment)
        assert abs(clock.at(shown) - moment) <= clock.error_ns


def test_hosts_compared_with_one_that_left_no_trace_are_compared_with_each_other() -> None:
    random = np.random.default_rng(8)
    clocks = [draw_clock(random) for _ in range(3)]
    begin, span = 10**9, (10**9, 10**9 + 2 * SECOND_NS)
    traces = [
        make_trace(
            rank,
            3,
            clocks[rank],
            f"host{rank}",
            measure(
                clocks[rank],
                clocks[0],
                QUIET,
                QUIET,
                random,
                begin_ns=begin,
                duration_s=2.0,
                names=(f"host{rank}", "host0"),
            ),
            span,
        )
        for rank in (1, 2)
    ]
    found = align_clocks(traces)
    assert found[1] == Clock(offset_ns=0, error_ns=0)
    assert found[2].error_ns is not None
    assert error_of(found[2], clocks[2], clocks[1], span) <= found[2].error_ns


def communicate(
    clocks: Sequence[WrongClock], random: np.random.Generator, span_ns: tuple[int, int], *, num: int, least_ns: int
) -> Facts:
    """Messages between any two hosts, every rank being a host: none is faster than `least_ns`."""
    rows = []
    for _ in range(num):
        source, destination = random.choice(len(clocks), 2, replace=False).tolist()
        sent = int(random.uniform(*span_ns))
        received = sent + least_ns + int(random.exponential(2 * least_ns))
        rows.append((source, clocks[source](sent), destination, clocks[destination](received), 0))
    return Facts.of(rows)


def test_communications_alone_bound_a_clock() -> None:
    random = np.random.default_rng(9)
    clocks = [draw_clock(random) for _ in range(4)]
    span = (10**9, 10**9 + 5 * SECOND_NS)
    traces = [make_trace(rank, 4, clocks[rank], f"host{rank}", [], span_ns=span) for rank in range(4)]
    assert [clock.error_ns for clock in align_clocks(traces).values()] == [0, None, None, None]
    order = communicate(clocks, random, span, num=2000, least_ns=50_000)
    found = align_clocks(traces, order)
    for rank in range(1, 4):
        error = found[rank].error_ns
        assert error is not None
        assert error_of(found[rank], clocks[rank], clocks[0], span) <= error
    assert len(find_violations(order, found)) == 0


def test_one_way_alone_says_nothing_of_a_clock() -> None:
    span = (10**9, 10**9 + SECOND_NS)
    traces = [make_trace(rank, 2, WrongClock(), f"host{rank}", [], span_ns=span) for rank in range(2)]
    order = Facts.of([(0, 10**9 + 100, 1, 10**9 + 200, 0)])
    assert align_clocks(traces, order)[1].error_ns is None


@pytest.mark.parametrize("seed", range(20))
def test_no_effect_is_left_before_its_cause(seed: int) -> None:
    """Pings go by slow, uneven ways; the program's messages are faster than the errors that are left."""
    random = np.random.default_rng(seed)
    clocks = [draw_clock(random) for _ in range(5)]
    begin, duration_s = 10**10, 4.0
    span = (begin, begin + int(duration_s * SECOND_NS))
    traces = []
    for rank in range(5):
        ways = Way(least_ns=int(random.uniform(1e5, 1e6)), jitter_ns=1e4), Way(least_ns=10**5, jitter_ns=1e4)
        names = (f"host{rank}", "host0")
        samples = measure(clocks[rank], clocks[0], *ways, random, begin_ns=begin, duration_s=duration_s, names=names)
        traces.append(make_trace(rank, 5, clocks[rank], f"host{rank}", samples if rank else [], span))
    order = communicate(clocks, random, span, num=3000, least_ns=10_000)
    before, after = align_clocks(traces), align_clocks(traces, order)
    assert len(find_violations(order, before)) > 0
    assert len(find_violations(order, after)) == 0
    for rank in range(1, 5):
        error = after[rank].error_ns
        assert error is not None
        assert error_of(after[rank], clocks[rank], clocks[0], span) <= error


def test_facts_that_contradict_each_other_are_left_and_told() -> None:
    span = (10**9, 10**9 + SECOND_NS)
    traces = [make_trace(rank, 2, WrongClock(), f"host{rank}", [], span_ns=span) for rank in range(2)]
    order = Facts.of([(0, 1_500_000_000, 1, 1_500_000_100, 0), (1, 1_500_001_000, 0, 1_500_000_200, 0)])
    clocks = align_clocks(traces, order)
    left = find_violations(order, clocks)
    assert len(left) > 0
    assert left.max() <= 900
    assert clocks[1].error_ns is not None


@settings(max_examples=100, deadline=None)
@given(
    knots=st.lists(
        st.tuples(st.integers(0, 10**6).map(lambda second: second * 10**9), st.integers(-(10**9), 10**9)),
        min_size=1,
        max_size=6,
        unique_by=lambda k: k[0],
    ),
    times=st.lists(st.integers(0, 10**15), min_size=2, max_size=20),
)
def test_corrected_times_are_the_same_one_by_one_and_all_at_once(
    knots: list[tuple[int, int]], times: list[int]
) -> None:
    clock = Clock(offset_ns=0, error_ns=1, knots=tuple(sorted(knots)))
    if len(knots) == 1:
        clock = Clock(offset_ns=knots[0][1], error_ns=1, knots=tuple(knots))
    assert [clock.at(time) for time in times] == clock.correct(np.array(times, np.int64)).tolist()


def test_the_order_of_a_rank_s_times_is_kept() -> None:
    random = np.random.default_rng(10)
    clocks = draw_clock(random), draw_clock(random)
    traces, span = two_hosts(clocks, (QUIET, QUIET), random, begin_ns=10**9, duration_s=20.0)
    clock = align_clocks(traces)[1]
    times = np.sort(random.integers(clocks[1](span[0]), clocks[1](span[1]), 100_000))
    assert (np.diff(clock.correct(times)) >= 0).all()


def test_every_ping_bounds_the_difference_of_the_clocks() -> None:
    random = np.random.default_rng(11)
    here, there = draw_clock(random), draw_clock(random)
    (sent, arrived, left, returned), over_ns = ping(10**9, here, there, draw_way(random), draw_way(random), random)
    difference = there(10**9) - here(10**9)
    drifted = 5e-4 * (over_ns - 10**9)
    assert left - returned - drifted <= difference <= arrived - sent + drifted
