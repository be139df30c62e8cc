"""Which steps are recorded, and how people write that down."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truedag.tracer.errors import RecordError
from truedag.tracer.record.schedule import Cycle, Schedule, Steps, parse_ranks, parse_schedule


def windows(schedule: Schedule, num_steps: int) -> list[int | None]:
    return [schedule.window(step) for step in range(num_steps)]


def test_a_cycle_waits_and_records_in_turns() -> None:
    cycle = Cycle(skip_first=1, wait=2, active=2, repeat=2)
    assert windows(cycle, 12) == [None, None, None, 3, 3, None, None, 7, 7, None, None, None]
    assert [cycle.is_over(step) for step in (8, 9)] == [False, True]


def test_a_cycle_without_a_wait_begins_a_window_each_time() -> None:
    assert windows(Cycle(active=2), 5) == [0, 0, 2, 2, 4]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", [None, None, None, 3, None, None, None]),
        ("0,2-3, 5-", [0, None, 2, 2, None, 5, 5]),
        ("4,3,0-0", [0, None, None, 3, 3, None, None]),
        ("2-4,3-5", [None, None, 2, 2, 2, 2, None]),
        ("5-,6", [None, None, None, None, None, 5, 5]),
        ("wait=2,active=1", [None, None, 2, None, None, 5, None]),
        ("skip_first=3,repeat=1", [None, None, None, 3, None, None, None]),
    ],
)
def test_a_schedule_is_read_as_written(text: str, expected: list[int | None]) -> None:
    assert windows(parse_schedule(text), 7) == expected


@pytest.mark.parametrize(
    "text", ["", "a", "-1", "3-2", "1,,2", "1.5", "wait", "wait=-1", "waiting=1", "active=0", "1=2"]
)
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(RecordError, match=r"steps|schedule"):
        parse_schedule(text)


def test_a_set_without_steps_is_refused() -> None:
    with pytest.raises(RecordError, match="no steps"):
        Steps.of([])
    with pytest.raises(RecordError, match="from 0 on"):
        Steps.of([-1])


def test_only_a_schedule_of_one_window_is_single() -> None:
    told = {
        text: parse_schedule(text).is_single for text in ("3", "3-9", "3,5", "3,4", "repeat=1", "repeat=2", "wait=1")
    }
    assert told == {
        "3": True,
        "3-9": True,
        "3,5": False,
        "3,4": True,
        "repeat=1": True,
        "repeat=2": False,
        "wait=1": False,
    }


@given(st.sets(st.integers(0, 60), min_size=1))
def test_a_set_of_steps_is_recorded_and_nothing_else(steps: set[int]) -> None:
    schedule = Steps.of(steps)
    for step in range(65):
        first = schedule.window(step)
        assert (first is not None) == (step in steps)
        if first is not None:  # a window is in one piece, and begins where nothing comes before it
            assert set(range(first, step + 1)) <= steps
            assert first - 1 not in steps
        assert schedule.is_over(step) == (step > max(steps))


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9), st.integers(0, 4), st.integers(0, 200))
def test_a_cycle_is_over_when_nothing_comes_any_more(skip: int, wait: int, active: int, repeat: int, step: int) -> None:
    cycle = Cycle(skip_first=skip, wait=wait, active=active, repeat=repeat)
    coming = any(cycle.window(later) is not None for later in range(step, step + skip + wait + active + 1))
    assert cycle.is_over(step) == (not coming)


def test_ranks_are_read_as_written() -> None:
    assert parse_ranks("0") == {0}
    assert parse_ranks("0, 8-10") == {0, 8, 9, 10}
    for text in ("", "a", "1-", "-1"):
        with pytest.raises(RecordError, match="rank"):
            parse_ranks(text)
