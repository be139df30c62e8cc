"""An audit as a review for people: the verdict first, then what is wrong, what passed, what could not be checked."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.findings import SEVERITIES, Audit, Finding, write_count

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_HEADS = {"error": "Errors", "warning": "Warnings", "note": "Notes"}
_SHOWN_UNREAD = 12
_CHAPTERS = {
    "structure": "The graph",
    "strategy": "Who runs what",
    "communication": "Communications",
    "model": "The model",
    "dimension": "Shapes",
    "honesty": "What is hidden",
    "claim": "What is declared",
    "balance": "Balance",
}


def verdict(audit: Audit) -> str:
    """Return one sentence that says how it stands."""
    counts = Counter(finding.severity for finding in audit.findings if finding.follows is None)
    checks = len({finding.check for finding in audit.faults})
    following = sum(finding.follows is not None for finding in audit.faults)
    if not audit.faults:
        if not audit.passed:
            return "Nothing could be checked."
        rest = f", {len(audit.unchecked)} could not be made" if audit.unchecked else ""
        return f"Right, as far as it was checked: {len(audit.passed)} checks passed{rest}."
    told = " and ".join(
        f"{counts[severity]} {severity}{'s' if counts[severity] > 1 else ''}"
        for severity in ("error", "warning")
        if counts[severity]
    )
    rest = f"; {following} more {'follows' if following == 1 else 'follow'} from that" if following else ""
    return f"Wrong: {told} in {checks} of {checks + len(audit.passed)} checks{rest}."


def write_markdown(audit: Audit) -> str:
    """Return the report as Markdown."""
    lines = [f"# Audit of {_plain(audit.subject)}", "", f"**{verdict(audit)}**", ""]
    lines += [f"Compared with {_plain(audit.against)}.", ""]
    lines += [f"- {_plain(fact)}" for fact in audit.facts]
    lines += _summary(audit)
    told = list(enumerate(audit.findings, 1))
    for severity in SEVERITIES:
        findings = [(number, one) for number, one in told if one.severity == severity and one.follows is None]
        if not findings:
            continue
        lines += ["", f"## {_HEADS[severity]}"]
        for chapter, members in itertools.groupby(findings, key=lambda numbered: _chapter(numbered[1])):
            lines += ["", f"### {_CHAPTERS[chapter]}"]
            for number, finding in members:
                following = [(place, one) for place, one in told if one.follows == number]
                lines += _write_finding(number, finding, following)
    if audit.passed:
        lines += ["", "## Checked and passed", ""]
        lines += [
            f"- {CHECKS[passed.check].title} (`{passed.check}`): {_plain(passed.what)}" for passed in audit.passed
        ]
    if audit.unchecked:
        lines += ["", "## Not checked", ""]
        lines += [f"- {what}: {_plain(why)}" for what, why in _gather(audit)]
    if audit.not_understood:
        shown = audit.not_understood[:_SHOWN_UNREAD]
        lines += [
            "",
            "## Not understood",
            "",
            f"{write_count(len(audit.not_understood), 'part')} told nothing that could be read:",
            "",
        ]
        lines += [f"- {_plain(label)}" for label in shown]
        if len(audit.not_understood) > len(shown):
            lines.append(f"- and {len(audit.not_understood) - len(shown)} more")
    return "\n".join(lines) + "\n"


def _summary(audit: Audit) -> list[str]:
    """Return a table of the chapters, where something is wrong: what each looked at, and how it stands."""
    if not audit.findings:
        return []
    rows = []
    for chapter, title in _CHAPTERS.items():
        counts = Counter(finding.severity for finding in audit.findings if _chapter(finding) == chapter)
        passed = sum(one.check.startswith(f"{chapter}.") for one in audit.passed)
        unchecked = sum(one.check.split(".")[0] == chapter for one in audit.unchecked)
        if counts or passed or unchecked:
            told = [*(str(counts[severity] or "") for severity in SEVERITIES), str(passed or ""), str(unchecked or "")]
            rows.append(f"| {title} | {' | '.join(told)} |")
    heads = [*(_HEADS[severity] for severity in SEVERITIES), "Checks passed", "Not checked"]
    return ["", f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads), *rows]


def _write_finding(number: int, finding: Finding, following: Sequence[tuple[int, Finding]]) -> list[str]:
    margin = " " * len(f"{number}. ")
    told = {"expected": finding.expected, "found": finding.found, "where": finding.place, "required": finding.fix}
    lines = [
        "",
        f"{number}. **{_plain(finding.title)}** `{finding.check}`",
        "",
        *(f"{margin}- {name}: {_plain(text)}" for name, text in told.items() if text),
    ]
    if following:
        lines += [f"{margin}- {_write_following(len(following))}"]
    for place, one in following:
        told = {"expected": one.expected, "found": one.found, "where": one.place}
        text = "; ".join(f"{name}: {_plain(text)}" for name, text in told.items() if text)
        lines.append(f"{margin}  - finding {place}: **{_plain(one.title)}** `{one.check}`; {text}")
    return lines


def _write_following(number: int) -> str:
    return f"{write_count(number, 'finding')} {'follows' if number == 1 else 'follow'} from it:"


def _chapter(finding: Finding) -> str:
    return finding.check.split(".")[0]


def print_audit(audit: Audit, *, width: int | None) -> None:
    """Print the report on stdout, as wide as the terminal where no width is given."""
    Console(highlight=False, width=width).print(render(audit))


def render(audit: Audit) -> RenderableType:
    """Lay the report out for a terminal: the verdict, the findings, and one line for the rest."""
    parts: list[RenderableType] = [Text(f"Audit of {audit.subject}", style="bold")]
    parts.append(Text(verdict(audit), style="bold green" if not audit.faults else "bold red"))
    parts.append(Text(f"Compared with {audit.against}."))
    parts += [Text(fact) for fact in audit.facts]
    counts = Counter(finding.follows for finding in audit.findings)
    for number, finding in enumerate(audit.findings, 1):
        if finding.follows is not None:
            parts.append(_follower(number, finding))
            continue
        parts.append(_paragraph(number, finding))
        if counts[number]:
            parts.append(Text(f"     {_write_following(counts[number])}"))
    parts.append(Text(""))
    if audit.passed:
        chapters = Counter(passed.check.split(".")[0] for passed in audit.passed)
        told = ", ".join(f"{name} {count}" for name, count in chapters.items())
        parts.append(Text(f"Passed: {len(audit.passed)} checks ({told})."))
    for what, why in _gather(audit):
        parts.append(Text(f"Not checked: {what}: {why}."))
    if audit.not_understood:
        shown = "; ".join(audit.not_understood[:3])
        parts.append(Text(f"Not understood: {write_count(len(audit.not_understood), 'part')}: {shown}."))
    return Group(*parts)


def _paragraph(number: int, finding: Finding) -> Text:
    text = Text(f"\n{number:>3}. ")
    text.append(finding.title, style="bold")
    text.append(f"\n     {finding.severity}", style=_STYLES[finding.severity])
    text.append(f" {finding.check}", style="dim")
    text.append(f" · expected {finding.expected} · found {finding.found}")
    if finding.nodes:
        text.append(f"\n     nodes {finding.shown_nodes}")
    text.append(f"\n     > {finding.fix}")
    return text


def _follower(number: int, finding: Finding) -> Text:
    text = Text(f"     {number}. {finding.title}\n        ")
    text.append(finding.severity, style=_STYLES[finding.severity])
    text.append(f" {finding.check}", style="dim")
    text.append(f" · expected {finding.expected} · found {finding.found}")
    if finding.nodes:
        text.append(f" · nodes {finding.shown_nodes}")
    return text


def _gather(audit: Audit) -> list[tuple[str, str]]:
    """Return what could not be checked, by reason."""
    by_reason: dict[str, list[str]] = {}
    for unchecked in audit.unchecked:
        by_reason.setdefault(unchecked.why, []).append(unchecked.check)
    return [(", ".join(checks), why) for why, checks in by_reason.items()]


def to_json(audit: Audit) -> Mapping[str, Any]:
    """Return the audit as plain data."""
    return {
        "subject": audit.subject,
        "against": audit.against,
        "verdict": verdict(audit),
        "faults": len(audit.faults),
        "facts": audit.facts,
        "findings": [
            {
                "check": finding.check,
                "severity": finding.severity,
                "title": finding.title,
                "expected": finding.expected,
                "found": finding.found,
                "fix": finding.fix,
                "nodes": list(finding.nodes),
                "num_nodes": finding.num_nodes,
                "ranks": list(finding.ranks),
                "layers": list(finding.layers),
                "follows": finding.follows,
            }
            for finding in audit.findings
        ],
        "passed": [{"check": passed.check, "what": passed.what} for passed in audit.passed],
        "unchecked": [{"check": unchecked.check, "why": unchecked.why} for unchecked in audit.unchecked],
        "not_understood": audit.not_understood,
    }


def _plain(text: str) -> str:
    """Keep a subject's own words from being taken for Markdown or HTML, and on one line."""
    flat = " ".join(text.split())
    for sign in ("\\", "`", "*", "<", ">", "|", "[", "]", "_"):
        flat = flat.replace(sign, f"\\{sign}")
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in flat)
