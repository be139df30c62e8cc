"""Findings stand behind the one that they follow from, where that is certain, and none is lost."""

from __future__ import annotations

import pytest

from truedag.tracer.audit.causes import group_by_cause
from truedag.tracer.audit.findings import Audit, Finding, Severity
from truedag.tracer.audit.report import verdict, write_markdown


def found(
    check: str, *, ranks: tuple[int, ...] = (), layers: tuple[int, ...] = (), severity: Severity = "error"
) -> Finding:
    return Finding(
        check=check, title=f"{check} {ranks} {layers}", expected="x", found="y", fix="z", severity=severity,
        ranks=ranks, layers=layers,
    )  # fmt: skip


def grouped(*findings: Finding, exact: bool = True) -> list[tuple[str, int | None]]:
    audit = Audit(subject="a", against="b", findings=list(findings))
    audit.sort()
    group_by_cause(audit, exact=exact)
    assert len(audit.findings) == len(findings)
    return [(finding.check, finding.follows) for finding in audit.findings]


def test_what_names_a_missing_rank_follows_from_its_being_missing() -> None:
    assert grouped(
        found("structure.orphan", ranks=(3,)),
        found("communication.bytes", ranks=(2, 3)),
        found("communication.bytes", ranks=(2,)),
        found("strategy.ranks", ranks=(3,)),
        found("balance.tokens", ranks=(3,), layers=(0,)),
    ) == [
        ("strategy.ranks", None), ("communication.bytes", 1), ("balance.tokens", 1), ("structure.orphan", None),
        ("communication.bytes", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("exact", "ranks", "follows"), [(True, (0, 1), 1), (True, (), 1), (False, (), 1), (False, (0, 1), None)]
)
def test_what_is_of_missing_layers_alone_follows_from_them(
    exact: bool, ranks: tuple[int, ...], follows: int | None
) -> None:
    told = grouped(
        found("strategy.layers", layers=(4, 5)), found("communication.tensor", layers=(5,), ranks=ranks), exact=exact
    )
    assert told == [("strategy.layers", None), ("communication.tensor", follows)]


def test_what_is_of_other_layers_too_is_a_fault_of_its_own() -> None:
    assert grouped(found("strategy.layers", layers=(4, 5)), found("model.norm", layers=(3, 4))) == [
        ("strategy.layers", None), ("model.norm", None),
    ]  # fmt: skip
    on_one = found("strategy.layers", layers=(4,), ranks=(1,))
    assert grouped(on_one, found("model.norm", layers=(4,), ranks=(0, 1)))[1] == ("model.norm", None)


def test_counts_follow_from_the_experts_and_layers_that_are_missing() -> None:
    assert grouped(
        found("strategy.experts", layers=(1,)),
        found("balance.experts", layers=(1,)),
        found("model.experts", layers=(1,)),
    ) == [("strategy.experts", None), ("balance.experts", 1), ("model.experts", None)]
    assert grouped(found("strategy.layers", layers=(1,)), found("balance.layers", severity="warning")) == [
        ("strategy.layers", None), ("balance.layers", 1),
    ]  # fmt: skip


def test_the_verdict_counts_causes_and_the_report_tells_everything() -> None:
    audit = Audit(
        subject="a",
        against="b",
        findings=[found("strategy.ranks", ranks=(3,)), found("communication.bytes", ranks=(3,)), found("model.norm")],
    )
    group_by_cause(audit, exact=True)
    assert verdict(audit) == "Wrong: 2 errors in 3 of 3 checks; 1 more follows from that."
    text = write_markdown(audit)
    assert text.index("1. **strategy.ranks") < text.index("finding 2: **communication.bytes") < text.index("3. **model")
    assert all(text.count(finding.title.split()[0]) >= 1 for finding in audit.findings)
