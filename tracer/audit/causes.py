"""What follows from what: a rank, a layer or an expert that is not there is one fault, however many checks see it.

A finding follows from another only where that is certain: it is about what is missing and nothing else. Checks leave a
missing rank's own work out and tell the traces that it left on others (a message without its other half, a collective
with a part less) in findings of their own, which name that rank; nothing else names a rank that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from truedag.tracer.audit.findings import SEVERITIES, Audit, Finding

_TRACES = ("communication", "model", "dimension", "balance")


def group_by_cause(audit: Audit, *, exact: bool) -> None:
    """Put findings behind the one that they follow from, and say so in `follows`; chapters that hold causes come first.

    `exact`: each operator was checked, so that a missing rank's own work is told by its being missing alone.
    """
    rules = (_is_trace_of_ranks, _is_of_lost_layers, _is_of_lost_experts) if exact else (_is_only_of_lost_layers,)
    before = audit.findings
    cause_of: dict[int, int] = {}
    for place, finding in enumerate(before):
        cause = next(_causes(finding, before, rules), None)
        if cause is not None:
            cause_of[place] = cause
    first = {(before[place].severity, _chapter(before[place])) for place in cause_of.values()}
    places = [place for place in range(len(before)) if place not in cause_of]
    places.sort(
        key=lambda place: (
            SEVERITIES.index(before[place].severity),
            (before[place].severity, _chapter(before[place])) not in first,
        )
    )
    ordered: list[Finding] = []
    for place in places:
        ordered.append(before[place])
        number = len(ordered)
        ordered += [replace(before[one], follows=number) for one, cause in cause_of.items() if cause == place]
    audit.findings = ordered


Rule = Callable[[Finding, Finding], bool]


def _causes(finding: Finding, findings: list[Finding], rules: tuple[Rule, ...]) -> Iterator[int]:
    """Yield the places of what a finding follows from; what is a cause itself follows from nothing."""
    if finding.check in ("strategy.ranks", "strategy.layers", "strategy.experts"):
        return
    for rule in rules:
        for place, cause in enumerate(findings):
            if rule(finding, cause):
                yield place


def _chapter(finding: Finding) -> str:
    return finding.check.split(".")[0]


def _is_trace_of_ranks(finding: Finding, cause: Finding) -> bool:
    return cause.check == "strategy.ranks" and _chapter(finding) in _TRACES and bool({*finding.ranks} & {*cause.ranks})


def _is_of_lost_layers(finding: Finding, cause: Finding) -> bool:
    """All its layers are missing or moved, on all its ranks if only on some; or it counts the layers of stages."""
    if cause.check != "strategy.layers":
        return False
    if finding.check == "balance.layers":
        return True
    inside = bool(finding.layers) and {*finding.layers} <= {*cause.layers}
    return inside and _chapter(finding) in _TRACES and (not cause.ranks or {*finding.ranks} <= {*cause.ranks})


def _is_only_of_lost_layers(finding: Finding, cause: Finding) -> bool:
    """The same of a drawing whose findings sum up layers and groups: it must name no ranks of its own."""
    return not finding.ranks and _is_of_lost_layers(finding, cause)


def _is_of_lost_experts(finding: Finding, cause: Finding) -> bool:
    """It counts the experts, or what they get, in layers that lack some."""
    counts = finding.check in ("balance.experts", "balance.tokens")
    return cause.check == "strategy.experts" and counts and {*finding.layers} <= {*cause.layers}
