"""What is told of a check."""

from __future__ import annotations

from dataclasses import dataclass

from truedag.tracer.audit.findings import Severity


@dataclass(frozen=True, slots=True)
class Check:
    """One kind of fault."""

    id: str
    """As in reports and in ``--explain``; the first word is its chapter."""

    title: str
    """What it looks at, in a few words."""

    meaning: str
    """Why it matters."""

    decision: str
    """How it decides, so that a finding can be checked by hand."""

    severity: Severity
    """Of its findings, unless one says otherwise."""

    fix: str
    """What to do, unless a finding says it more exactly."""
