"""The report as text: Markdown for a file, tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from truedag.tracer.analysis.quantities import write_bytes, write_runs, write_time
from truedag.tracer.analysis.shares import RankShares

if TYPE_CHECKING:
    from truedag.tracer.analysis.report import Report

_BAR = 20
_PARTS = (
    ("compute", "█", "blue"),
    ("transfer", "▓", "green"),
    ("waiting", "▒", "yellow"),
    ("idle", "░", "bright_black"),
)
HOW_TIMES_ARE_TOLD = (
    "Step time is from the first start to the last end over all ranks. A moment of a rank counts once: as compute if "
    "an operator runs on it; else as transfer if all participants have entered a communication that it is in; else as "
    "waiting if another has not; else as idle (the host's own work is there). Sums over participants may exceed the "
    "step."
)
_COMMUNICATION_COLUMNS = ("axis", "kind", "number", "groups", "bytes", "transfer", "waiting")


def render_report(report: Report) -> RenderableType:
    """Lay the report out for a terminal of 80 columns or more."""
    parts: list[RenderableType] = [Text(_title(report), style="bold"), *(Text(line) for line in _facts(report))]
    table = _table("Communication (times summed over participants)", _COMMUNICATION_COLUMNS, right=(2, 3, 4, 5, 6))
    for row in _communication_rows(report):
        table.add_row(*row)
    if report.communications:
        parts.append(table)
    table = _table(
        "Time of each rank",
        ("rank", "stage", *(name for name, _, _ in _PARTS), "of the step"),
        right=(0, 1, 2, 3, 4, 5),
    )
    for shares in report.ranks:
        table.add_row(*_share_row(shares), _bar(shares))
    parts.append(table)
    if report.experts:
        table = _table("Experts", ("layers", "experts", "ranks"), right=())
        for place in report.experts:
            table.add_row(write_runs(place.layers), write_runs(place.experts), write_runs(place.ranks))
        parts.append(table)
    return Group(*parts)


def write_markdown(report: Report) -> str:
    """Write the report as Markdown."""
    lines = [f"# {_title(report)}", "", *(f"- {line}" for line in _facts(report)), ""]
    if report.unmatched:
        lines += ["## Unmatched communications", "", *(f"- {one}" for one in report.unmatched), ""]
    if report.communications:
        lines += [
            "## Communication",
            "",
            "Bytes are what all participants gave; times are summed over participants.",
            "",
        ]
        lines += _markdown_table(_COMMUNICATION_COLUMNS, _communication_rows(report))
    lines += ["## Time of each rank", "", HOW_TIMES_ARE_TOLD, ""]
    head = ("rank", "stage", *(name for name, _, _ in _PARTS), "transfer hidden by compute")
    rows = [[*_share_row(shares), write_time(shares.overlap_ns)] for shares in report.ranks]
    lines += _markdown_table(head, rows)
    if report.experts:
        lines += ["## Experts", ""]
        lines += _markdown_table(
            ("layers", "experts", "ranks"),
            [[write_runs(one.layers), write_runs(one.experts), write_runs(one.ranks)] for one in report.experts],
        )
    return "\n".join(lines)


def _title(report: Report) -> str:
    parts = (report.deployment or "recorded program", report.strategy, f"{report.world_size} ranks")
    return " · ".join(part for part in parts if part)


def _facts(report: Report) -> list[str]:
    steps = ", ".join(f"{number}: {write_time(span)}" for number, span in report.steps_ns.items()) or "unknown"
    missing = report.world_size - report.num_ranks
    return [
        f"{sum(report.nodes.values()):,} nodes: {_counts(report.nodes)}; {report.num_views_dropped:,} views dropped",
        f"{sum(report.edges.values()):,} edges: {_counts(report.edges)}",
        f"unmatched communications: {report.num_unmatched:,}"
        + (f"; {missing} ranks recorded nothing" if missing else ""),
        *(["ESTIMATED: times of this graph are estimates, not measurements"] if report.is_estimated else []),
        f"time of step {steps}",
    ]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {kind}" for kind, number in counts.items())


def _communication_rows(report: Report) -> list[list[str]]:
    return [
        [
            one.axis or "unknown",
            one.kind,
            f"{one.num:,}",
            f"{one.num_groups:,}",
            write_bytes(one.num_bytes),
            write_time(one.transfer_ns),
            write_time(one.wait_ns),
        ]
        for one in report.communications
    ]


def _share_row(shares: RankShares) -> list[str]:
    times = _times(shares)
    total = None if times is None else sum(times)
    told = ["unknown"] * 4 if times is None or not total else [f"{100 * time / total:.1f} %" for time in times]
    return [str(shares.rank), "-" if shares.stage is None else str(shares.stage), *told]


def _times(shares: RankShares) -> list[int] | None:
    times = [shares.compute_ns, shares.transfer_ns, shares.waiting_ns, shares.idle_ns]
    return [time for time in times if time is not None] if None not in times else None


def _bar(shares: RankShares) -> Text:
    """Draw the shares as a bar."""
    times = _times(shares)
    if times is None or sum(times) == 0:
        return Text("")
    bar = Text()
    drawn = reached = 0
    for time, (_, sign, style) in zip(times, _PARTS, strict=True):
        reached += time
        end = round(_BAR * reached / sum(times))
        bar.append(sign * (end - drawn), style=style)
        drawn = end
    return bar


def _table(title: str, columns: Sequence[str], *, right: Sequence[int]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i in right else "left")
    return table


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]
