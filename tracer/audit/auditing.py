"""The audit of a subject: all checks, in the order in which a report tells them."""

from __future__ import annotations

from collections.abc import Mapping

from truedag.tracer.audit.causes import group_by_cause
from truedag.tracer.audit.checks.balance import check_balance
from truedag.tracer.audit.checks.claims import check_claim
from truedag.tracer.audit.checks.communication import check_communication
from truedag.tracer.audit.checks.dimensions import check_dimensions
from truedag.tracer.audit.checks.drawn import check_drawn, tells_everything
from truedag.tracer.audit.checks.drawn_communication import told_passes
from truedag.tracer.audit.checks.drawn_extra import check_extra
from truedag.tracer.audit.checks.drawn_order import check_order
from truedag.tracer.audit.checks.drawn_shapes import check_drawn_shapes
from truedag.tracer.audit.checks.honesty import check_honesty
from truedag.tracer.audit.checks.model import check_model
from truedag.tracer.audit.checks.regions import summed_purposes
from truedag.tracer.audit.checks.steps import check_steps
from truedag.tracer.audit.checks.strategy import check_strategy
from truedag.tracer.audit.checks.structure import check_structure
from truedag.tracer.audit.claim import Claim, claim_of_text
from truedag.tracer.audit.drawing.reading import DrawnSubject
from truedag.tracer.audit.findings import Audit, write_count
from truedag.tracer.audit.plan import Plan
from truedag.tracer.audit.subject import Subject


def audit_dataset(subject: Subject, plan: Plan | None) -> Audit:
    """Check a dataset; without a plan only what needs no deployment."""
    against = (
        "nothing but itself: no deployment is known"
        if plan is None
        else f"{plan.expectation.name}, {plan.expectation.strategy}"
    )
    audit = Audit(subject=subject.name, against=against)
    told = ""
    if subject.copies is not None:
        told = (
            f": {len(subject.nodes):,} nodes and {len(subject.edges):,} edges of one rank of each class stand for them"
        )
    audit.facts.append(f"{subject.num_nodes:,} nodes, {subject.num_edges:,} edges, all recorded{told}.")
    check_structure(subject, plan, audit)
    if plan is not None:
        check_strategy(subject, plan, audit)
        check_communication(subject, plan, audit)
        check_model(subject, plan, audit)
    check_dimensions(subject, plan, audit)
    if plan is not None:
        check_balance(subject, plan, audit)
    audit.sort()
    group_by_cause(audit, exact=True)
    return audit


def audit_drawing(drawn: DrawnSubject, plan: Plan | None) -> Audit:
    """Check a drawing: like a dataset if it tells everything, else as far as it goes."""
    subject = drawn.subject
    against = _against(plan, "nothing but itself: --deployment names what it should show")
    audit = Audit(subject=subject.name, against=against, not_understood=list(drawn.not_understood))
    number = len(drawn.document.nodes)
    told = ", ".join(f"{count:,} {name}" for name, count in drawn.certainty.items() if count)
    audit.facts.append(
        f"{write_count(number, 'node')}, {write_count(len(drawn.document.edges), 'edge')}; labels read: {told}."
    )
    if drawn.by_edges:
        named = write_count(len(drawn.by_edges), "communication")
        audit.facts.append(f"{named} drawn as labels of edges; each was taken for a node between its ends.")
    if drawn.overflow:
        audit.facts.append(
            f"{write_count(len(drawn.overflow), 'node')} claim to stand for more than there can be, and were left out: "
            f"{', '.join(drawn.overflow[:3])}" + (", ..." if len(drawn.overflow) > 3 else ".")
        )
    if not drawn.document.is_directed:
        audit.facts.append("It is undirected: each edge was read from the end that is named first.")
    if plan is not None and summed_purposes(subject):
        audit.facts.append(
            "All-reduces were taken for the reduce-scatters and all-gathers of sequence parallelism: equal in bytes."
        )
    check_structure(subject, plan, audit)
    check_order(subject, audit)
    exact = tells_everything(subject)
    if plan is not None:
        audit.facts.append(
            "Every operator says its layer, rank and pass: each was checked." if exact else _write_passes(subject)
        )
        check_strategy(subject, plan, audit, whole=exact, num_unread=len(drawn.unread))
        if exact:
            check_communication(subject, plan, audit)
            check_model(subject, plan, audit)
        else:
            check_drawn(subject, plan, audit)
            check_extra(subject, plan, audit)
    if exact:
        check_dimensions(subject, plan, audit)
    else:
        check_drawn_shapes(subject, plan, audit)
    check_honesty(drawn, plan, audit)
    check_steps(drawn, plan, audit)
    if plan is not None and (not audit.found("strategy.layers") and not audit.found("strategy.experts")):
        check_balance(subject, plan, audit)
    if (claim := claim_of_text(drawn.document.title, name="title")) is not None:
        check_claim(claim, None if plan is None else plan.expectation, audit, {})
    audit.sort()
    group_by_cause(audit, exact=exact)
    return audit


def _write_passes(subject: Subject) -> str:
    told = told_passes(subject)
    if not told:
        return "Passes are not told apart: what is drawn once was taken for all of them."
    if told == ("forward",):
        return "Forward is told apart from backward, and was checked by itself; microbatches were laid over each other."
    return "Prefill and decode are told apart, and each was checked by itself."


def audit_claim(claim: Claim, plan: Plan | None, measured: Mapping[str, float]) -> Audit:
    """Check a claim that comes without any graph; `measured`: what a run has, by the names of `claim.MEASURED`."""
    audit = Audit(
        subject=claim.name, against=_against(plan, "its own arithmetic"), not_understood=list(claim.not_understood)
    )
    audit.facts.append(f"A claim of {write_count(len(claim.numbers), 'number')}, without a graph.")
    check_claim(claim, None if plan is None else plan.expectation, audit, measured)
    for chapter in ("structure", "communication", "model", "dimension"):
        audit.skip(chapter, "a claim has no nodes")
    audit.sort()
    return audit


def _against(plan: Plan | None, otherwise: str) -> str:
    return otherwise if plan is None else f"{plan.expectation.name}, {plan.expectation.strategy}"
