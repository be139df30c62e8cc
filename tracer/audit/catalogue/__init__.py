"""Every check by its id: what it means, how it decides, how grave a finding is, and what mends it."""

from __future__ import annotations

from truedag.tracer.audit.catalogue import (
    balance,
    claim,
    communication,
    dimension,
    honesty,
    model,
    strategy,
    structure,
)
from truedag.tracer.audit.catalogue.check import Check

__all__ = ["CHECKS", "Check", "explain"]

CHECKS = {
    check.id: check
    for family in (structure, strategy, communication, model, dimension, honesty, claim, balance)
    for check in family.CHECKS
}


def explain(check: Check) -> str:
    """Return what a check means and how it decides, as text."""
    return (
        f"{check.id}: {check.title}\n\n{check.meaning}\n\nHow it decides: {check.decision}\n"
        f"Severity: {check.severity}\nWhat to do: {check.fix}\n"
    )
