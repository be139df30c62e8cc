"""Whether what ranks have in memory at their peak is less than the device has that times were estimated for.

What is known of a rank is less than it needs: not counted are what allocators round up and keep, buffers of
communications, what operators take inside, and what the driver keeps. So a rank that does not fit does not, and one
that fits leaves that much for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truedag.tracer.analysis.held_memory import HeldMemory
from truedag.tracer.analysis.quantities import write_bytes, write_runs

NOT_COUNTED = (
    "not counted: what allocators round up and keep, buffers of communications, what operators take inside, and what "
    "the driver keeps"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The peak of some ranks, each of them, against the memory of their device.

    Attributes:
        ranks: the ranks.
        device: its name.
        peak_bytes: at most, as `HeldMemory` has it.
        memory_bytes: of the device.
        fits: whether the peak is no more; what is not counted comes on top of it.
    """

    ranks: tuple[int, ...]
    device: str
    peak_bytes: int
    memory_bytes: int
    fits: bool

    def describe(self) -> str:
        """Say it in a line, without the ranks."""
        share = f"{self.peak_bytes / self.memory_bytes:.1%} of {self.device}'s {write_bytes(self.memory_bytes)}"
        if not self.fits:
            return f"DOES NOT FIT: {share}, {write_bytes(self.peak_bytes - self.memory_bytes)} too much"
        return f"{share}, {write_bytes(self.memory_bytes - self.peak_bytes)} left"


def describe_unfit(fits: Sequence[Fit]) -> list[str]:
    """Return a line on all ranks that do not fit, which is said before all else; none where all do."""
    unfit = [one for one in fits if not one.fits]
    if not unfit:
        return []
    ranks = sorted(rank for one in unfit for rank in one.ranks)
    who = f"{'rank' if len(ranks) == 1 else 'ranks'} {write_runs(ranks)}"
    most = "" if len(unfit) == 1 else " (the most)"
    return [f"{who}: {unfit[0].describe()}{most} at the peak; {NOT_COUNTED}"]


def find_fits(memory: Sequence[HeldMemory], meta: Mapping[str, Any]) -> tuple[Fit, ...]:
    """Hold memory against the device that a dataset's times were estimated for, the largest peak first.

    Args:
        memory: of the ranks.
        meta: of the dataset; without a device nothing is returned.
    """
    told = meta.get("estimate") or {}
    memory_bytes = told.get("memory_bytes")
    if memory_bytes is None:
        return ()
    found = [
        Fit(
            ranks=one.ranks, device=str(told["device"]), peak_bytes=one.peak_bytes, memory_bytes=int(memory_bytes),
            fits=one.peak_bytes <= memory_bytes,
        )
        for one in memory
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda one: (-one.peak_bytes, one.ranks)))
