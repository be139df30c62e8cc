"""Lists of numbers as people write them: ``0-3, 8 and 10..12``, ``E0-E7``, ``0-1016 step 8``.

A run may have a step too: ``0-3 to 992-995 step 32`` is 0-3, 32-35 and so on. A step is one only after a range that it
divides; any other ("GPU 0-3 step 2") is a step of decoding.
"""

from __future__ import annotations

import re
from functools import lru_cache

MOST_NUMBERS = 1 << 16
"""In one list; a range that is longer is cut."""

_MARK = "\ue000"
_NUMBER = rf"\d{{1,9}}(?:{_MARK}\d{{1,9}}){{0,2}}"
_BETWEEN = r"(?:->|=>|\u2192|-|\u2013|\u2014|to|through|\.\.\.?|\u2026|,|;|&|\+|/|and)"
IN_A_LINE = rf"{_NUMBER}(?:[ \t]*(?:-|\u2013|\.\.\.?|\u2026|to|,|;|&|and)[ \t]*(?:[eE]|experts?[ \t]*)?{_NUMBER})*"
"""A list that has no line break in it."""

_RANGE = re.compile(r"(\d+)[\s_]*(?:-(?!>)|\u2013|\u2014|to|through|\.\.\.?|\u2026)[\s_]*(\d+)")
# What stands before the second number of E0-E7 and of rank0-rank3.
_NAMED = re.compile(r"(?<![A-Za-z])(?:(?:gpu|rank|device|layer|block|expert|exp|stage)s?|[gerls])[ _]?(?=\d)", re.I)
_STEP = r"[ \t]+(?:step|stride)[ \t]+(\d{1,9})\b"
_STEPPED = re.compile(r"(?<![\d-])(\d{1,9})-(\d{1,9})" + _STEP)
_STEPPED_RUNS = re.compile(r"(?<![\d-])(\d{1,9})-(\d{1,9})[ \t]+to[ \t]+(\d{1,9})-(\d{1,9})" + _STEP)
# As they are marked: first and last of a run, the step, and the first of the last run.
_MARKED = re.compile(rf"(\d+)-(\d+){_MARK}(\d+){_MARK}(\d+)")


def list_of(*names: str) -> str:
    """Return the pattern of a list, as one group, whose further numbers may repeat one of some names: e0..e7."""
    named = f"(?:(?:{'|'.join(names)})[ _]?)?" if names else ""
    return rf"[\[({{]{{0,2}}\s*({_NUMBER}(?:[\s_]*{_BETWEEN}[\s_]*{named}{_NUMBER})*)"


def mark_steps(text: str) -> str:
    """Write ranges with a step in a form without blanks, so that nobody takes their step for one of decoding."""
    return _STEPPED.sub(_mark_step, _STEPPED_RUNS.sub(_mark_runs, text))


def _mark_step(match: re.Match[str]) -> str:
    low, high, step = map(int, match.groups())
    if step < 2 or high - low < 2 * step or (high - low) % step:
        return match.group()
    return f"{low}-{low}{_MARK}{step}{_MARK}{high}"


def _mark_runs(match: re.Match[str]) -> str:
    low, high, last, end, step = map(int, match.groups())
    if not low <= high < low + step or end - last != high - low or last <= low or (last - low) % step:
        return match.group()
    return f"{low}-{high}{_MARK}{step}{_MARK}{last}"


@lru_cache(maxsize=1 << 12)
def read_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a list with ranges, in ascending order; a range that is too long is cut."""
    found: set[int] = set()
    text = _NAMED.sub("", mark_steps(text))
    for low, high, step, last in (map(int, match) for match in _MARKED.findall(text)):
        for begin in range(low, last + 1 if low <= high else low, max(step, 1)):
            if len(found) > MOST_NUMBERS:
                break
            found.update(range(begin, min(begin + high - low, begin + MOST_NUMBERS) + 1))
    text = _MARKED.sub(" ", text)
    for low, high in (map(int, match) for match in _RANGE.findall(text)):
        found.update(range(low, min(high, low + MOST_NUMBERS) + 1))
        if len(found) > MOST_NUMBERS:
            break
    found.update(int(number) for number in re.findall(r"\d+", _RANGE.sub(" ", text)))
    return tuple(sorted(found)[:MOST_NUMBERS])
