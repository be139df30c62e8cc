"""How times, bytes and lists of numbers are written for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

# So many runs at one distance are written with a step.
_FEWEST_ALIKE = 5
_UNITS = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"))


def write_time(nanoseconds: float | None) -> str:
    """Write a duration with three digits: 1.24 ms; unknown if it is."""
    if nanoseconds is None:
        return "unknown"
    for size, unit in _UNITS:
        if nanoseconds >= 0.9995 * size:
            value = nanoseconds / size
            return (
                f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"
            )
    return f"{nanoseconds:.0f} ns"


def write_bytes(count: float | None) -> str:
    """Write a number of bytes in binary units; unknown if it is."""
    if count is None:
        return "unknown"
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            value = count / (1 << power)
            return f"{value:.{0 if value >= 100 else 1}f} {unit}"
    return f"{count:.0f} B"


def write_runs(numbers: Iterable[int], *, pair: str = ",") -> str:
    """Write numbers as runs: 0-3,8; many at one distance as 0-1016 step 8, or 0-3 to 992-995 step 32.

    `pair` stands between two numbers that follow each other.

    `truedag.tracer.audit.drawing.numbers.read_numbers` reads it back.
    """
    runs = _find_runs(numbers)
    text: list[str] = []
    begin = 0
    while begin < len(runs):
        number = _count_alike(runs, begin)
        number = number if number >= _FEWEST_ALIKE else 1
        text.append(_write_alike(runs[begin : begin + number], pair))
        begin += number
    size = _find_repetition(runs)
    if size < len(text):
        text = [_write_alike(runs[turn::size], pair) for turn in range(size)]
    return ",".join(text)


def _find_runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the first and the last number of each run, in ascending order."""
    there = set(numbers)
    begins = sorted(number for number in there if number - 1 not in there)
    ends = sorted(number for number in there if number + 1 not in there)
    return list(zip(begins, ends, strict=True))


def _count_alike(runs: Sequence[tuple[int, int]], begin: int) -> int:
    """Return how many runs from one on are as long as it, each as far from the one before as the second from it."""
    (low, high), number = runs[begin], 1
    for place in range(begin + 1, len(runs)):
        distance = runs[begin + 1][0] - low
        if runs[place] != (low + number * distance, high + number * distance):
            break
        number += 1
    return number


def _find_repetition(runs: Sequence[tuple[int, int]]) -> int:
    """Return of how many runs the beginning is that makes all, often enough, when it is repeated at one distance."""
    for size in range(1, len(runs) // _FEWEST_ALIKE + 1):
        distance = runs[size][0] - runs[0][0]
        if len(runs) % size == 0 and all(
            (low + distance, high + distance) == runs[place + size]
            for place, (low, high) in enumerate(runs[: len(runs) - size])
        ):
            return size
    return len(runs)


def _write_alike(runs: Sequence[tuple[int, int]], pair: str) -> str:
    (low, high), (last, end) = runs[0], runs[-1]
    if len(runs) > 1:
        return (f"{low}-{last}" if low == high else f"{low}-{high} to {last}-{end}") + f" step {runs[1][0] - low}"
    if low == high:
        return str(low)
    return f"{low}{pair}{high}" if high == low + 1 else f"{low}-{high}"


def write_rate(bytes_per_s: float | None) -> str:
    """Write bytes a second in decimal units, as nccl-tests does; unknown if it is."""
    if bytes_per_s is None:
        return "unknown"
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if bytes_per_s >= 0.9995 * size:
            return f"{write_digits(bytes_per_s / size)} {prefix}B/s"
    return f"{write_digits(bytes_per_s)} B/s"


def write_digits(number: float) -> str:
    """Write three digits of a number, and all of its whole part."""
    return f"{number:.3g}" if abs(number) < 999.5 else f"{number:,.0f}"


def write_shares(parts: Sequence[float]) -> list[str]:
    """Write parts of one in tenths of a percent that add up to 100 %, what is nearest to the next tenth rounded up."""
    tenths = [math.floor(1000 * part) for part in parts]
    nearest = sorted(range(len(parts)), key=lambda place: tenths[place] - 1000 * parts[place])
    for place in nearest[: max(0, 1000 - sum(tenths))]:
        tenths[place] += 1
    return [f"{tenth / 10:.1f} %" for tenth in tenths]
