"""What a notebook shows of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from truedag.tracer.graph.graph import Graph

# Colours of the notebook's own theme where it has some, else by the system's: nothing is painted behind the text.
_STYLE = """
.truedag-card { font-family: system-ui, sans-serif; font-size: 13px; line-height: 1.45; }
.truedag-card h4 { margin: 0 0 .15em; font-size: 15px; }
.truedag-card .quiet { opacity: .7; }
.truedag-card table { border-collapse: collapse; margin: .6em 2.2em 0 0; display: inline-table; vertical-align: top;
  color: inherit; font: inherit; }
.truedag-card caption { text-align: left; font-weight: 600; padding-bottom: .15em; }
.truedag-card th, .truedag-card td { padding: .1em .9em .1em 0; text-align: left; font-weight: 400;
  border-top: 1px solid color-mix(in srgb, currentColor 18%, transparent); background: none; color: inherit; }
.truedag-card td.number { text-align: right; font-variant-numeric: tabular-nums; }
"""
_MANY = 12


def write_card(graph: Graph, *, is_part: bool) -> str:
    """Say in HTML what is in a graph: counts by kind, ranks, layers, phases, time, and where it was cut."""
    kinds = graph.nodes.group_by("kind", "timing").len().collect()
    ties = graph.edges.group_by("kind").agg(pl.len(), pl.col("bytes").sum()).sort("len", descending=True).collect()
    span = graph.nodes.select(
        ranks=pl.col("rank").filter(pl.col("rank") >= 0).unique().sort().implode(),
        layers=pl.col("layer").filter(pl.col("layer") >= 0).unique().sort().implode(),
        phases=pl.col("phase").drop_nulls().unique(maintain_order=True).implode(),
        steps=pl.col("step").filter(pl.col("step") >= 0).unique().sort().implode(),
        start=pl.col("start_ns").min(),
        end=pl.col("end_ns").max(),
    ).collect()
    ranks, layers, phases, steps, start, end = span.row(0)
    title = str(graph.meta.get("deployment") or "recorded program")
    facts = [
        ("ranks", _runs(ranks)),
        ("layers", _runs(layers)),
        ("phases", ", ".join(phases) or "none told"),
        ("steps", _runs(steps)),
        ("time", "unknown" if start is None or end is None else f"{(end - start) / 1e6:,.2f} ms"),
    ]
    if is_part:
        cut = dict(graph.border.group_by("direction").len().collect().iter_rows())
        facts.append(("cut edges", f"{cut.get('in', 0):,} lead in, {cut.get('out', 0):,} lead out (.border)"))
    unmatched = int(graph.meta.get("num_unmatched") or 0)
    if unmatched:
        facts.append(("unmatched", f"{unmatched:,} communications of the whole could not be joined"))
    timings = dict(kinds.group_by("timing").agg(pl.col("len").sum()).iter_rows())
    if timings.get("estimated"):
        facts.append(("estimated", f"the times of {timings['estimated']:,} nodes are estimates"))
    counts = kinds.group_by("kind").agg(pl.col("len").sum()).sort("len", descending=True)
    tables = [
        _table(f"{counts['len'].sum():,} nodes", [(kind, f"{number:,}") for kind, number in counts.iter_rows()]),
        _table(
            f"{ties['len'].sum():,} edges",
            [(kind, f"{number:,}", _bytes(size)) for kind, number, size in ties.iter_rows()],
        ),
        _table("what it spans", facts, numbers=False),
    ]
    strategy = " · ".join(str(part) for part in (graph.meta.get("strategy"), graph.path) if part)
    part = ' <span class="quiet">(a part)</span>' if is_part else ""
    return (
        f'<div class="truedag-card"><style>{_STYLE}</style><h4>{escape(title)}{part}</h4>'
        f'<div class="quiet">{escape(strategy)}</div>{"".join(tables)}</div>'
    )


def _table(caption: str, rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    kind = ' class="number"' if numbers else ""
    lines = [
        f"<tr><th>{escape(head)}</th>{''.join(f'<td{kind}>{escape(cell)}</td>' for cell in cells)}</tr>"
        for head, *cells in rows
    ]
    return f"<table><caption>{escape(caption)}</caption>{''.join(lines)}</table>"


def _runs(numbers: Sequence[int]) -> str:
    """Write numbers as runs, 0-3, 8; only the first of very many runs."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    told = [str(low) if low == high else f"{low}-{high}" for low, high in runs[:_MANY]]
    rest = f" and {len(runs) - _MANY:,} runs more" if len(runs) > _MANY else ""
    return ", ".join(told) + rest if told else "none told"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
