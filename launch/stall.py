"""Says which communication hung and which ranks are missing from it, from how far each rank has come.

Theory of operation: the n-th collective of a group is the same one on all its ranks. A rank is in it that has begun it
and not ended it; a rank is missing that has not begun it. So each waiting rank waits for others, and what is reported
is where those chains begin: communications that wait for a rank which itself waits for nobody. Where there is no such
rank, ranks wait for each other in a circle, and each of its communications is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from truedag.launch.progress import GroupProgress, Progress

_NUM_SHOWN = 4
_NUM_RANKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What a rank said when it was asked."""

    phase: str
    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """A communication that does not end."""

    title: str
    present: tuple[int, ...]
    """The ranks that are in it."""

    missing: tuple[int, ...]
    """The ranks they wait for."""

    mismatch: bool = False
    """Whether its ranks do different things in one place of the sequence."""


def describe_stalls(reports: Mapping[int, RankReport], world_size: int) -> str:
    """Name the communications that hang, the ranks in them, the ranks missing, and where those are; "" if none hangs.

    Args:
        reports: what the ranks said; one that is absent did not answer.
        world_size: ranks of the run.
    """
    stalls = find_stalls(reports)
    if not stalls:
        return ""
    chosen = _find_causes(stalls, reports)
    lines = [stall.title for stall in chosen[:_NUM_SHOWN]]
    if len(chosen) > _NUM_SHOWN:
        lines.append(f"and {len(chosen) - _NUM_SHOWN} more communications like these.")
    in_circle = _is_circle(chosen, reports)
    if in_circle:
        lines.insert(0, "Ranks wait for each other, each in another communication:")
    shown = [rank for stall in chosen[:_NUM_SHOWN] for rank in _choose_ranks(stall)]
    lines += [f"  rank {rank}: {_locate(reports.get(rank))}" for rank in dict.fromkeys(shown)]
    silent = [rank for rank in range(world_size) if rank not in reports and rank not in shown]
    if silent:
        lines.append(f"  {list_ranks(silent)} did not answer.")
    return "\n".join(lines)


def _choose_ranks(stall: Stall) -> tuple[int, ...]:
    """Whose place is shown."""
    if stall.mismatch:
        return stall.present[:_NUM_RANKS]
    return (*stall.missing[:_NUM_RANKS], *stall.present[:1])


def find_stalls(reports: Mapping[int, RankReport]) -> list[Stall]:
    """List the communications that some rank is in and that lack another."""
    return [*_find_collectives(reports), *_find_messages(reports)]


def _find_collectives(reports: Mapping[int, RankReport]) -> list[Stall]:
    groups: dict[tuple[str, tuple[int, ...]], dict[int, GroupProgress]] = {}
    for rank, report in reports.items():
        for group in report.progress.groups:
            groups.setdefault((group.name, group.ranks), {})[rank] = group
    stalls = []
    for (_, members), told in groups.items():
        waiting = {rank: group.ended + 1 for rank, group in told.items() if group.ended < group.begun}
        for number in sorted(set(waiting.values())):
            present = tuple(rank for rank, at in waiting.items() if at == number)
            # A silent rank may be in it or not; it is what the others wait for either way.
            missing = tuple(rank for rank in members if rank not in told or told[rank].begun < number)
            names = {rank: _name_at(told[rank], number) for rank in members if rank in told and rank not in missing}
            label = f"of group {_label(told[present[0]])} ({list_ranks(members)})"
            if len({name for name in names.values() if name}) > 1:
                title = (
                    f"collective number {number} {label} is not the same one on its ranks: "
                    f"{', '.join(f'{name} on rank {rank}' for rank, name in sorted(names.items())[:_NUM_RANKS])}."
                )
                stalls.append(Stall(title=title, present=present, missing=missing, mismatch=True))
            elif missing:
                name = _call_name(reports[present[0]], told[present[0]], number)
                title = f"{name} number {number} {label} hangs: {_count(present)} in it, {_count(missing)} missing."
                stalls.append(Stall(title=title, present=present, missing=missing))
    return stalls


def _find_messages(reports: Mapping[int, RankReport]) -> list[Stall]:
    stalls = []
    for rank, report in reports.items():
        call = report.progress.call
        if call is None or call.peer is None:
            continue
        group = next((group for group in report.progress.groups if group.name == call.group), None)
        label = f" on group {_label(group)}" if group is not None else ""
        if call.name == "receive":
            title = f"the message from rank {call.peer} to rank {rank}{label} has not come: rank {rank} waits for it."
        else:
            title = f"the message from rank {rank} to rank {call.peer}{label} is not taken: rank {rank} waits to send."
        stalls.append(Stall(title=title, present=(rank,), missing=(call.peer,)))
    return stalls


def _find_causes(stalls: Sequence[Stall], reports: Mapping[int, RankReport]) -> list[Stall]:
    """Those that the others wait for."""
    mismatches = [stall for stall in stalls if stall.mismatch]
    if mismatches:
        return mismatches
    waiting = _waiting(stalls, reports)
    causes = [stall for stall in stalls if any(rank not in waiting for rank in stall.missing)]
    return causes or list(stalls)


def _is_circle(stalls: Sequence[Stall], reports: Mapping[int, RankReport]) -> bool:
    waiting = _waiting(stalls, reports)
    return len(stalls) > 1 and all(rank in waiting for stall in stalls for rank in stall.missing)


def _waiting(stalls: Sequence[Stall], reports: Mapping[int, RankReport]) -> set[int]:
    """Ranks that stand still because of another; one that began a collective and went on to something else does not."""
    return {rank for stall in stalls for rank in stall.present if reports[rank].progress.waits}


def _name_at(group: GroupProgress, number: int) -> str:
    return next((operation.name for operation in group.last if operation.number == number), "")


def _call_name(report: RankReport, group: GroupProgress, number: int) -> str:
    call = report.progress.call
    if call is not None and call.group == group.name and call.peer is None:
        return call.name
    return _name_at(group, number) or "collective"


def _label(group: GroupProgress) -> str:
    return group.axis or repr(group.name)


def _locate(report: RankReport | None) -> str:
    if report is None:
        return "does not answer: its process is stopped or gone, or its machine is."
    call = report.progress.call
    doing = f"in {call.name}, " if call is not None else ""
    return f"{report.phase}, {doing}at {report.progress.place}"


def _count(ranks: Sequence[int]) -> str:
    return f"{list_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'}"


def list_ranks(ranks: Sequence[int]) -> str:
    """Name ranks for a person: consecutive ones as a range, and no more than a few."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = [f"{low}" if low == high else f"{low}-{high}" for low, high in spans[:_NUM_RANKS]]
    more = sum(high - low + 1 for low, high in spans[_NUM_RANKS:])
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(shown)}" + (f" and {more} more" if more else "")
