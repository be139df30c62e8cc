"""The critical path for a person in front of a terminal, and for a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import polars as pl
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from truedag.tracer.analysis.critical_path import CriticalPath
from truedag.tracer.analysis.dependencies import KINDS
from truedag.tracer.analysis.quantities import write_time

_BAR = 30
_SIGNS = {"compute": ("█", "blue"), "transfer": ("▓", "green"), "waiting": ("▒", "yellow"), "host": ("░", "magenta")}
_SAID = {
    "compute": "an operator ran",
    "transfer": "data moved: all had arrived at a communication",
    "waiting": "for a turn in the backend, or what is not in the graph",
    "host": "between operators: Python, the framework, the system",
}
_NOTE = (
    "The path leads back from the last end of the step: each moment belongs to what the next one had to wait for. "
    "Who waited for another rank is not on it; what that rank was at is. Time of the host is with what came after it."
)


def render_critical_path(path: CriticalPath, *, title: str, top: int) -> RenderableType:
    """Lay the path out for a terminal of 100 columns.

    Args:
        path: what is shown.
        title: what ran.
        top: how many rows of each table.
    """
    error = "unknown clock error" if path.error_ns is None else f"clock error ±{write_time(path.error_ns)}"
    if path.is_estimated:
        error = "estimated: on one clock, and how far off nobody knows"
    step = "" if path.step is None else f" · step {path.step}"
    name = f"{title}{step} · critical path".lstrip(" ·")
    head = Text(f"{name} {write_time(path.length_ns)} ({error})", style="bold")
    parts: list[RenderableType] = [head]
    if path.is_estimated:
        parts.append(Text("ESTIMATED: times of this graph are estimates, not measurements", style="bold red"))
    if path.is_of_classes:
        parts.append(Text("Each rank stands for all of its class, which run at the same times"))
    if path.num_untimed:
        parts.append(Text(f"{path.num_untimed:,} operators or communications without a time are not in it"))
    parts += [Text(_NOTE), _kinds(path)]
    for column, name in (("rank", "Rank"), ("phase", "Phase"), ("layer", "Layer"), ("op", "Operator")):
        parts.append(_totals(path, column, name, top))
    parts.append(_longest(path, top))
    if not path.stragglers.is_empty():
        parts += [_latecomers(path, top), _holders(path, top)]
    return Group(*parts)


def write_html(path: CriticalPath, *, top: int = 10) -> str:
    """Write the path as HTML for a notebook: what the terminal shows, in the notebook's own colours."""
    console = Console(record=True, width=110, file=StringIO(), force_terminal=True)
    console.print(render_critical_path(path, title="", top=top))
    style = "font-family: monospace; line-height: 1.2; color: inherit; background: none; overflow-x: auto"
    return console.export_html(inline_styles=True, code_format=f'<pre style="{style}">{{code}}</pre>')


def summarise(path: CriticalPath, *, top: int) -> dict[str, Any]:
    """Return the path for `--json`: totals in ns, the longest pieces, the communications most waited in."""
    return {
        "step": path.step,
        "start_ns": path.start_ns,
        "end_ns": path.end_ns,
        "length_ns": path.length_ns,
        "error_ns": path.error_ns,
        "is_estimated": path.is_estimated,
        "is_of_classes": path.is_of_classes,
        "num_untimed": path.num_untimed,
        "num_pieces": len(path.pieces),
        "total": path.total().to_dicts()[0],
        "by_rank": path.total("rank").to_dicts(),
        "by_phase": path.total("phase").to_dicts(),
        "by_layer": path.total("layer").to_dicts(),
        "by_op": path.total("op").to_dicts(),
        "longest": _by_length(path).head(top).to_dicts(),
        "stragglers": path.stragglers.head(top).to_dicts(),
    }


def _kinds(path: CriticalPath) -> Table:
    table = _table("What the time was spent on", ("", "time", "share", "", ""), right=(1, 2))
    total = path.total().row(0, named=True)
    for kind in KINDS:
        time = int(total[f"{kind}_ns"])
        sign, style = _SIGNS[kind]
        share = time / path.length_ns if path.length_ns else 0.0
        table.add_row(
            kind, write_time(time), f"{100 * share:.1f} %", Text(sign * round(_BAR * share), style=style), _SAID[kind]
        )
    return table


def _totals(path: CriticalPath, column: str, name: str, top: int) -> Table:
    totals = path.total(column)
    table = _table(name, (name.lower(), *KINDS, "on the path", "share", ""), right=(1, 2, 3, 4, 5, 6))
    for row in totals.head(top).iter_rows(named=True):
        total = int(row["total_ns"])
        cells = [write_time(row[f"{kind}_ns"]) if row[f"{kind}_ns"] else "-" for kind in KINDS]
        table.add_row(_value(column, row[column]), *cells, write_time(total), _share(path, total), _bar(path, row))
    if len(totals) > top:
        rest = int(totals["total_ns"][top:].sum())
        table.add_row(f"{len(totals) - top:,} more", *[""] * len(KINDS), write_time(rest), _share(path, rest), "")
    return table


def _longest(path: CriticalPath, top: int) -> Table:
    table = _table(
        f"The longest of its {len(path.pieces):,} pieces",
        ("at", "time", "spent", "rank", "what", "layer", "phase", "node"), right=(0, 1, 3, 5, 7),
    )  # fmt: skip
    for row in _by_length(path).head(top).iter_rows(named=True):
        what = f"before {row['label']}" if row["spent"] == "host" else row["label"]
        table.add_row(
            write_time(row["start_ns"] - path.start_ns), write_time(row["length_ns"]), row["spent"], str(row["rank"]),
            what, _value("layer", row["layer"]), row["phase"] or "-", str(row["node"]),
        )  # fmt: skip
    return table


def _latecomers(path: CriticalPath, top: int) -> Table:
    table = _table(
        "Communications that were waited in most (over all ranks), and what the last rank came late for",
        ("communication", "where", "waited", "last", "late by", "mostly for", "longest", "on", ""),
        right=(2, 3, 4, 7, 8),
    )  # fmt: skip
    for row in path.stragglers.head(top).iter_rows(named=True):
        times = {kind: int(row[f"late_{kind}_ns"] or 0) for kind in KINDS}
        most = max(KINDS, key=lambda kind: times[kind])
        share = f"{100 * times[most] / row['late_ns']:.0f} % {most}" if row["late_ns"] else "-"
        what = f"before {row['held_label']}" if row["held_spent"] == "host" else row["held_label"] or "-"
        layer = "" if row["layer"] == -1 else f" {row['layer']}"
        table.add_row(
            row["label"], f"{row['phase'] or 'none'}{layer}", write_time(row["waited_ns"]), str(row["rank"]),
            write_time(row["late_ns"]), share, what, _value("rank", row["held_rank"]), write_time(row["held_ns"]),
        )  # fmt: skip
    return table


def _holders(path: CriticalPath, top: int) -> Table:
    table = _table("Who was waited for", ("rank", "came last", "others waited", ""), right=(0, 1, 2))
    late = (
        path.stragglers.group_by("rank")
        .agg(pl.len(), pl.col("waited_ns").sum())
        .sort("waited_ns", "rank", descending=[True, False])
    )
    whole = int(late["waited_ns"].sum())
    for rank, number, waited in late.head(top).iter_rows():
        table.add_row(str(rank), f"{number:,} times", write_time(waited), Text("▒" * round(_BAR * waited / whole)))
    return table


def _by_length(path: CriticalPath) -> pl.DataFrame:
    lengths = path.pieces.with_columns(length_ns=pl.col("end_ns") - pl.col("start_ns"))
    return lengths.sort("length_ns", "start_ns", descending=[True, False])


def _bar(path: CriticalPath, row: Mapping[str, Any]) -> Text:
    """Draw a row's share of the path, by kind."""
    bar = Text()
    reached, drawn = 0, 0
    for kind in KINDS:
        reached += int(row[f"{kind}_ns"])
        end = round(_BAR * reached / path.length_ns) if path.length_ns else 0
        sign, style = _SIGNS[kind]
        bar.append(sign * (end - drawn), style=style)
        drawn = end
    return bar


def _share(path: CriticalPath, time: int) -> str:
    return f"{100 * time / path.length_ns:.1f} %" if path.length_ns else "-"


def _value(column: str, value: object) -> str:
    if value is None or (column == "layer" and value == -1):
        return "none" if column in ("layer", "phase") else "-"
    return _short(str(value)) if column == "op" else str(value)


def _short(op: str | None) -> str:
    return (op or "-").removeprefix("aten::").removeprefix("c10d::")


def _table(title: str, columns: Sequence[str], *, right: Sequence[int]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i in right else "left", no_wrap=i in right, overflow="fold")
    return table
