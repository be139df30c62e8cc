"""The report as text: Markdown for a file, tables for a terminal, HTML for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from truedag.tracer.analysis.report_sections import Section, list_facts, list_sections, write_title

if TYPE_CHECKING:
    from truedag.tracer.analysis.report import Report

_BAR = 20
# In the order of shares.PARTS; signs differ as well, for who sees no colours.
_SIGNS = (("█", "blue"), ("▓", "green"), ("▒", "yellow"), ("▚", "magenta"), ("░", "bright_black"))
_COLOURS = ("#0072b2", "#009e73", "#e69f00", "#cc79a7", "#999999")
_STYLE = """
.truedag-report { font-family: system-ui, sans-serif; font-size: 13px; line-height: 1.45; max-width: 70em; }
.truedag-report h3 { margin: 0 0 .2em; font-size: 16px; }
.truedag-report h4 { margin: 1em 0 .1em; font-size: 14px; }
.truedag-report p { margin: 0 0 .3em; opacity: .75; }
.truedag-report table { border-collapse: collapse; color: inherit; font: inherit; }
.truedag-report th, .truedag-report td { padding: .1em .9em .1em 0; text-align: left; background: none; color: inherit;
  font-weight: 400; border-top: 1px solid color-mix(in srgb, currentColor 18%, transparent); }
.truedag-report th { font-weight: 600; border: 0; }
.truedag-report .number { text-align: right; font-variant-numeric: tabular-nums; }
.truedag-report .bar { display: flex; width: 14em; height: .8em; }
"""


def render_report(report: Report) -> RenderableType:
    """Lay the report out for a terminal of 100 columns; narrower ones wrap cells."""
    parts: list[RenderableType] = [Text(write_title(report), style="bold")]
    parts += [Text(line) for line in list_facts(report)]
    for section in list_sections(report):
        # The title is a line of its own: as a part of the table it would be as narrow as that.
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for place, name in enumerate(section.columns):
            table.add_column(name, justify="right" if place in section.right else "left", overflow="fold",
                             no_wrap=bool(section.bars))  # fmt: skip
        if section.bars:
            table.add_column("")  # the one that gives way
        for place, row in enumerate(section.rows):
            table.add_row(*row, *([_Bar(section.bars[place])] if section.bars else []))
        parts += [
            Text(section.title, style="bold"),
            *([Text(section.note, style="dim")] if section.note else []),
            table,
        ]
    return Group(*parts)


def write_markdown(report: Report) -> str:
    """Write the report as Markdown."""
    lines = [f"# {write_title(report)}", "", *(f"- {line}" for line in list_facts(report)), ""]
    if report.unmatched:
        lines += ["## Unmatched communications", "", *(f"- {one}" for one in report.unmatched), ""]
    for section in list_sections(report):
        lines += [f"## {section.title}", "", *([section.note, ""] if section.note else [])]
        marks = ("---:" if place in section.right else "---" for place in range(len(section.columns)))
        lines += ["| " + " | ".join(section.columns) + " |", "|" + "|".join(marks) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in section.rows]
        lines.append("")
    return "\n".join(lines)


def write_html(report: Report) -> str:
    """Write the report as HTML, for a notebook: a part of a page, with its style."""
    facts = "<br>".join(escape(line) for line in list_facts(report))
    parts = [f'<div class="truedag-report"><style>{_STYLE}</style><h3>{escape(write_title(report))}</h3><p>{facts}</p>']
    parts += [_html_table(section) for section in list_sections(report)]
    return "".join(parts) + "</div>"


def _html_table(section: Section) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        marks = (' class="number"' if place in section.right else "" for place in range(len(row)))
        return "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for mark, cell in zip(marks, row, strict=True))

    rows = []
    for place, row in enumerate(section.rows):
        bar = "".join(
            f'<span style="width:{100 * share:.2f}%;background:{colour}"></span>'
            for share, colour in zip(section.bars[place], _COLOURS, strict=False)
        ) if section.bars else ""  # fmt: skip
        drawn = f'<td><div class="bar">{bar}</div></td>' if section.bars else ""
        rows.append(f"<tr>{cells('td', row)}{drawn}</tr>")
    note = f"<p>{escape(section.note)}</p>" if section.note else ""
    return (
        f"<h4>{escape(section.title)}</h4>{note}<table><tr>{cells('th', section.columns)}</tr>{''.join(rows)}</table>"
    )


@dataclass(frozen=True, slots=True)
class _Bar:
    """Shares that add up to one, drawn as wide as there is room."""

    shares: Sequence[float]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, min(_BAR, options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        bar = Text()
        drawn, reached = 0, 0.0
        for share, (sign, style) in zip(self.shares, _SIGNS, strict=False):
            reached += share
            end = round(min(_BAR, options.max_width) * reached)
            bar.append(sign * (end - drawn), style=style)
            drawn = end
        yield bar
