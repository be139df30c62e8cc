"""What an audit found: faults with their evidence, what passed, and what could not be checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from truedag.tracer.analysis.quantities import write_runs

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_MOST_NODES = 200
_SHOWN_NODES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault: which check, what was expected and found, where, and what to do."""

    check: str
    """Id of the check, as in `catalogue.CHECKS`."""

    title: str
    """One sentence that says what is wrong, with its numbers."""

    expected: str
    """What the strategy, the model or the arithmetic says."""

    found: str
    """What the subject shows."""

    fix: str
    """What to change."""

    severity: Severity
    """error: the subject is wrong; warning: it is incomplete or misleading; note: worth knowing."""

    nodes: tuple[str, ...] = ()
    """Names of nodes that show it, as the subject has them; the first few of `num_nodes`."""

    num_nodes: int = 0
    """How many nodes show it."""

    ranks: tuple[int, ...] = ()
    """Ranks that it concerns."""

    layers: tuple[int, ...] = ()
    """Layers that it concerns."""

    follows: int | None = None
    """Number of the finding that it follows from, counted from 1."""

    @property
    def place(self) -> str:
        """Where it is: layers, ranks and nodes, in short."""
        parts = []
        if self.layers:
            parts.append(f"layers {write_runs(self.layers)}")
        if self.ranks:
            parts.append(f"ranks {write_runs(self.ranks)}")
        if self.nodes:
            parts.append(f"nodes {self.shown_nodes}")
        return "; ".join(parts)

    @property
    def shown_nodes(self) -> str:
        """The first few nodes, and how many more there are."""
        shown = self.nodes[:_SHOWN_NODES]
        more = self.num_nodes - len(shown)
        return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """A check that found nothing, and how much it looked at."""

    check: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unchecked:
    """A check that could not be made, and why."""

    check: str
    why: str


@dataclass(slots=True)
class Audit:
    """What came out of an audit; the checks add to it."""

    subject: str
    """What was audited."""

    against: str
    """What it was compared with."""

    findings: list[Finding] = field(default_factory=list)
    passed: list[Passed] = field(default_factory=list)
    unchecked: list[Unchecked] = field(default_factory=list)
    not_understood: list[str] = field(default_factory=list)
    """Labels of a drawing, and numbers and words of a claim, that could not be read."""

    facts: list[str] = field(default_factory=list)
    """What the subject is: how many nodes, and how sure the reading is."""

    @property
    def faults(self) -> list[Finding]:
        """The findings that make the subject wrong: errors and warnings."""
        return [finding for finding in self.findings if finding.severity != "note"]

    def found(self, check: str) -> list[Finding]:
        """Return the findings of a check."""
        return [finding for finding in self.findings if finding.check == check]

    def judge(self, check: str, findings: Iterable[Finding], what: str) -> None:
        """Add a check's findings; if there are none, that it passed over `what`."""
        before = len(self.findings)
        self.findings += findings
        if len(self.findings) == before:
            self.passed.append(Passed(check=check, what=what))

    def skip(self, check: str, why: str) -> None:
        """Say that a check could not be made."""
        self.unchecked.append(Unchecked(check=check, why=why))

    def sort(self) -> None:
        """Order the findings by severity, then by chapter, each chapter where its first check stands."""
        chapters = [*dict.fromkeys(finding.check.split(".")[0] for finding in self.findings)]
        self.findings.sort(
            key=lambda finding: (
                SEVERITIES.index(finding.severity),
                chapters.index(finding.check.split(".")[0]),
            )
        )


def write_count(number: int, noun: str) -> str:
    """Write a number of things: 1 node, 2,000 nodes."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def pick_nodes(names: Iterable[str]) -> tuple[str, ...]:
    """Return the first few names."""
    picked: list[str] = []
    for name in names:
        if len(picked) == _MOST_NODES:
            break
        picked.append(name)
    return tuple(picked)
