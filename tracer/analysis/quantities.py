"""How times, bytes and lists of numbers are written for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

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


def write_runs(numbers: Iterable[int]) -> str:
    """Write numbers as runs: 0-3,8."""
    text: list[str] = []
    ordered = sorted(set(numbers))
    begin = 0
    for i, number in enumerate(ordered):
        if i + 1 == len(ordered) or ordered[i + 1] != number + 1:
            low = ordered[begin]
            text.append(str(low) if low == number else f"{low},{number}" if number == low + 1 else f"{low}-{number}")
            begin = i + 1
    return ",".join(text)


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
