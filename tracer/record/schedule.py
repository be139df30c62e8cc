"""Which steps of a program are recorded.

A step has a number, from 0. Steps that are recorded together, one after the other, are a window; a window is named by
its first step. A schedule says of each step which window it is in. It looks at nothing but the number, so all ranks
that count alike record the same windows without talking to each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TypeAlias

from truedag.tracer.errors import RecordError

_RANGE = re.compile(r"(\d+)(?:(-)(\d+)?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycle:
    """After `skip_first` steps again and again: `wait` steps that are not recorded, `active` ones that are.

    Every cycle is a window of its own, also where nothing lies between two of them.
    """

    skip_first: int = 0
    wait: int = 0
    active: int = 1
    repeat: int = 0
    """How many cycles there are; 0: no end."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name == "active" else 0
            if value < least:
                raise RecordError(f"schedule: {field.name}={value}: a number from {least} on")

    def window(self, step: int) -> int | None:
        """Return the first step of the window that a step is in; None: it is not recorded."""
        cycle, place = divmod(step - self.skip_first, self.wait + self.active)
        if cycle < 0 or place < self.wait or (self.repeat and cycle >= self.repeat):
            return None
        return self.skip_first + cycle * (self.wait + self.active) + self.wait

    def is_over(self, step: int) -> bool:
        """Whether no step from this one on is recorded."""
        return bool(self.repeat) and step >= self.skip_first + self.repeat * (self.wait + self.active)

    @property
    def is_single(self) -> bool:
        """Whether there is one window at most."""
        return self.repeat == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The steps of some ranges, each of which is a window."""

    ranges: tuple[tuple[int, int | None], ...]
    """First step and the one after the last, None: no end; in order, and apart from each other."""

    @classmethod
    def of(cls, steps: Iterable[int]) -> Steps:
        """Return the schedule of a set of steps; those that follow each other are one window.

        Raises:
            RecordError: a step is negative, or there are none.
        """
        return cls.over((step, step + 1) for step in steps)

    @classmethod
    def over(cls, ranges: Iterable[tuple[int, int | None]]) -> Steps:
        """Return the schedule of ranges in any order; those that touch or overlap become one.

        Raises:
            RecordError: a range is empty or begins below 0, or there are none.
        """
        joined: list[tuple[int, int | None]] = []
        for first, end in sorted(ranges, key=lambda one: one[0]):
            if first < 0 or (end is not None and end <= first):
                raise RecordError(f"schedule: there is no step in {first} to {end}: steps are numbers from 0 on")
            if joined and (joined[-1][1] is None or joined[-1][1] >= first):
                before, last = joined.pop()
                joined.append((before, None if last is None or end is None else max(last, end)))
            else:
                joined.append((first, end))
        if not joined:
            raise RecordError("schedule: there are no steps in it: name some, or leave it out to record everything")
        return cls(ranges=tuple(joined))

    def window(self, step: int) -> int | None:
        """Return the first step of the window that a step is in; None: it is not recorded."""
        return next((first for first, end in self.ranges if first <= step and (end is None or step < end)), None)

    def is_over(self, step: int) -> bool:
        """Whether no step from this one on is recorded."""
        end = self.ranges[-1][1]
        return end is not None and step >= end

    @property
    def is_single(self) -> bool:
        """Whether there is one window at most."""
        return len(self.ranges) == 1


Schedule: TypeAlias = Cycle | Steps


def parse_schedule(text: str) -> Schedule:
    """Read a schedule: `3`, `0,5-7,100-` (from 100 to the end), or `skip_first=2,wait=97,active=3,repeat=5`.

    Raises:
        RecordError: it is none.
    """
    words = [word.strip() for word in text.split(",")]
    if "=" in text:
        return _parse_cycle(text, words)
    ranges: list[tuple[int, int | None]] = []
    for word in words:
        found = _RANGE.fullmatch(word)
        if found is None:
            raise RecordError(f"steps {text!r}: {word!r} is no step: write 3, or 0,5-7,100-, or wait=97,active=3")
        first, to, last = found.groups()
        end = int(first if to is None else last) + 1 if to is None or last is not None else None
        if end is not None and end <= int(first):
            raise RecordError(f"steps {text!r}: {word!r} ends before it begins")
        ranges.append((int(first), end))
    return Steps.over(ranges)


def _parse_cycle(text: str, words: list[str]) -> Cycle:
    names = [field.name for field in fields(Cycle)]
    values: dict[str, int] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in names or not value.isdecimal():
            raise RecordError(f"steps {text!r}: {word!r}: write one of {', '.join(names)}, = and a number")
        values[name] = int(value)
    return Cycle(**values)


def parse_ranks(text: str) -> frozenset[int]:
    """Read a set of ranks: `0`, `0,8-15`.

    Raises:
        RecordError: it is none.
    """
    ranks: set[int] = set()
    for word in text.split(","):
        found = _RANGE.fullmatch(word.strip())
        if found is None or (found[2] is not None and found[3] is None):
            raise RecordError(f"ranks {text!r}: {word!r} is no rank: write 0 or 0,8-15")
        ranks.update(range(int(found[1]), int(found[3] or found[1]) + 1))
    return frozenset(ranks)
