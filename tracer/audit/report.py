"""An audit as a review for people: the verdict first, then what is wrong, what passed, what could not be checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from truedag.tracer.audit.findings import SEVERITIES, Audit, Finding

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_HEADS = {"error": "Errors", "warning": "Warnings", "note": "Notes"}
_SHOWN_UNREAD = 12


def verdict(audit: Audit) -> str:
    """Return one sentence that says how it stands."""
    counts = Counter(finding.severity for finding in audit.findings)
    checks = len({finding.check for finding in audit.faults})
    if not audit.faults:
        rest = f", {len(audit.unchecked)} could not be made" if audit.unchecked else ""
        return f"Right, as far as it was checked: {len(audit.passed)} checks passed{rest}."
    told = " and ".join(
        f"{counts[severity]} {severity}{'s' if counts[severity] > 1 else ''}"
        for severity in ("error", "warning")
        if counts[severity]
    )
    return f"Wrong: {told} in {checks} of {checks + len(audit.passed)} checks."


def write_markdown(audit: Audit) -> str:
    """Return the report as Markdown."""
    lines = [f"# Audit of {_plain(audit.subject)}", "", f"**{verdict(audit)}**", ""]
    lines += [f"Compared with {_plain(audit.against)}.", ""]
    lines += [f"- {_plain(fact)}" for fact in audit.facts]
    number = 0
    for severity in SEVERITIES:
        findings = [finding for finding in audit.findings if finding.severity == severity]
        if not findings:
            continue
        lines += ["", f"## {_HEADS[severity]}"]
        for finding in findings:
            number += 1
            lines += ["", f"{number}. **{_plain(finding.title)}** `{finding.check}`", ""]
            lines += [f"   - expected: {_plain(finding.expected)}", f"   - found: {_plain(finding.found)}"]
            if finding.place:
                lines.append(f"   - where: {_plain(finding.place)}")
            lines.append(f"   - required: {_plain(finding.fix)}")
    if audit.passed:
        lines += ["", "## Checked and passed", ""]
        lines += [f"- `{passed.check}`: {_plain(passed.what)}" for passed in audit.passed]
    if audit.unchecked:
        lines += ["", "## Not checked", ""]
        lines += [f"- {what}: {_plain(why)}" for what, why in _gather(audit)]
    if audit.not_understood:
        shown = audit.not_understood[:_SHOWN_UNREAD]
        lines += [
            "",
            "## Not understood",
            "",
            f"{len(audit.not_understood)} labels told nothing that could be read:",
            "",
        ]
        lines += [f"- {_plain(label)}" for label in shown]
        if len(audit.not_understood) > len(shown):
            lines.append(f"- and {len(audit.not_understood) - len(shown)} more")
    return "\n".join(lines) + "\n"


def print_audit(audit: Audit, *, width: int | None) -> None:
    """Print the report on stdout, as wide as the terminal where no width is given."""
    Console(highlight=False, width=width).print(render(audit))


def render(audit: Audit) -> RenderableType:
    """Lay the report out for a terminal: the verdict, the findings, and one line for the rest."""
    parts: list[RenderableType] = [Text(f"Audit of {audit.subject}", style="bold")]
    parts.append(Text(verdict(audit), style="bold green" if not audit.faults else "bold red"))
    parts.append(Text(f"Compared with {audit.against}."))
    parts += [Text(fact) for fact in audit.facts]
    for number, finding in enumerate(audit.findings, 1):
        parts.append(_paragraph(number, finding))
    parts.append(Text(""))
    if audit.passed:
        chapters = Counter(passed.check.split(".")[0] for passed in audit.passed)
        told = ", ".join(f"{name} {count}" for name, count in chapters.items())
        parts.append(Text(f"Passed: {len(audit.passed)} checks ({told})."))
    for what, why in _gather(audit):
        parts.append(Text(f"Not checked: {what}: {why}."))
    if audit.not_understood:
        shown = "; ".join(audit.not_understood[:3])
        parts.append(Text(f"Not understood: {len(audit.not_understood)} labels, as {shown}."))
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
