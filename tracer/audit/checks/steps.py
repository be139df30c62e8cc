"""Checks of decode steps in a drawing: each is drawn, or in a fold that says rightly how much it stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.drawing.folds import Fold
from truedag.tracer.audit.drawing.reading import DrawnSubject
from truedag.tracer.audit.findings import Audit, Finding, pick_nodes, write_count
from truedag.tracer.audit.plan import Plan

CHECK = "honesty.steps"


def check_steps(drawn: DrawnSubject, plan: Plan | None, audit: Audit) -> None:
    """Check decode steps; a drawing that numbers none lays them over each other, which hides no operator."""
    if plan is not None and plan.expectation.kind == "train":
        return
    told = _drawn_steps(drawn)
    if not told and not drawn.folds:
        if plan is not None:
            audit.skip(CHECK, "no node says which decode step it is of")
        return
    folded = {step for _, fold in _folds(drawn) for step in fold.steps}
    what = write_count(len(told), "decode step") + f" drawn, {len(folded)} folded"
    audit.judge(CHECK, [*_wrong_folds(drawn, told), *_lost(told | folded, plan)], what)


def _drawn_steps(drawn: DrawnSubject) -> set[int]:
    return {
        step
        for reading in drawn.readings.values()
        if reading.phase == "decode" and reading.fold is None and not reading.is_ellipsis
        for step in reading.numbers.get("decode_step", ())
    }


def _folds(drawn: DrawnSubject) -> Iterator[tuple[str, Fold]]:
    for name in drawn.folds:
        if (fold := drawn.readings[name].fold) is not None:
            yield name, fold


def _finding(title: str, expected: str, found: str, nodes: Sequence[str] = ()) -> Finding:
    return Finding(
        check=CHECK, title=title[:1].upper() + title[1:], expected=expected, found=found, fix=CHECKS[CHECK].fix,
        severity=CHECKS[CHECK].severity, nodes=pick_nodes(nodes), num_nodes=len(nodes),
    )  # fmt: skip


def _wrong_folds(drawn: DrawnSubject, told: set[int]) -> Iterator[Finding]:
    by_edges = set(drawn.by_edges)
    for name, fold in _folds(drawn):
        steps = _write_steps(fold.steps)
        if fold.like not in told or not drawn.folds[name]:
            yield _finding(
                f"{steps} {_are(fold.steps)} folded as like step {fold.like}, which is not drawn",
                f"step {fold.like} in full", f"steps {write_runs(told) or 'none'} are drawn", [name],
            )  # fmt: skip
            continue
        if both := sorted(told & set(fold.steps)):
            yield _finding(
                f"{_write_steps(both)} {_are(both)} drawn, and in a fold too",
                "each step once",
                f"in the fold of {steps}",
                [name],
            )
        # A communication that only an edge names is no node of the drawing; who counts it is right too.
        nodes = [node for node in drawn.folds[name] if node not in by_edges]
        each = sum(drawn.readings[node].num_recorded or 1 for node in nodes)
        num_named = len(drawn.folds[name]) - len(nodes)
        wanted, stated = each * len(fold.steps), drawn.readings[name].num_recorded
        if stated not in (wanted, (each + num_named) * len(fold.steps)):
            says = f"says that it stands for {stated or 0:,} nodes; it stands for {wanted:,}"
            yield _finding(
                f"the fold of {steps} " + ("does not say how many nodes it stands for" if stated is None else says),
                f"{wanted:,}: {write_count(len(fold.steps), 'step')} like step {fold.like}, which is {each:,} nodes",
                "no number" if stated is None else f"{stated:,}", [name],
            )  # fmt: skip
    yield from _partly(drawn)


def _partly(drawn: DrawnSubject) -> Iterator[Finding]:
    """Yield steps that are folded for some nodes of the step that they are like only, or for some twice."""
    of_steps: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, fold in _folds(drawn):
        of_steps.setdefault((fold.like, fold.steps), []).append(name)
    whole = Counter(
        step
        for reading in drawn.readings.values()
        if reading.phase == "decode" and reading.fold is None
        for step in reading.numbers.get("decode_step", ())
    )
    taken: dict[int, tuple[int, ...]] = {}
    for (like, steps), names in of_steps.items():
        if twice := sorted(step for step in steps if step in taken):
            yield _finding(
                f"{_write_steps(twice)} {_are(twice)} in two folds", "each step once",
                f"{_write_steps(taken[twice[0]])} and {_write_steps(steps)}", names,
            )  # fmt: skip
        taken.update(dict.fromkeys(steps, steps))
        there = [node for name in names for node in drawn.folds[name]]
        if there and len(there) != whole[like]:
            yield _finding(
                f"{_write_steps(steps)} {_are(steps)} folded as like step {like}, but for {len(set(there)):,} of its "
                f"{whole[like]:,} nodes" + (", some of them twice" if len(set(there)) < len(there) else ""),
                f"each of the {write_count(whole[like], 'node')} of step {like} once",
                f"{len(there):,}, by their ranks", names,
            )  # fmt: skip


def _lost(shown: set[int], plan: Plan | None) -> Iterator[Finding]:
    """Yield steps that are nowhere; who counts them from 1 counts them all."""
    if plan is None:
        number = max(shown, default=-1) + 1
        wanted = set(range(min(shown, default=0), number))
    else:
        wanted = {step for _, _, step in plan.expectation.places if step >= 0}
        if shown == {step + 1 for step in wanted}:
            return
    noun = f"steps {write_runs(wanted)}"
    if missing := sorted(wanted - shown):
        yield _finding(
            f"{_write_steps(missing)} {_are(missing)} neither drawn nor in a fold", noun,
            f"steps {write_runs(shown)}",
        )  # fmt: skip
    if extra := sorted(shown - wanted):
        yield _finding(
            f"{_write_steps(extra)} {_are(extra)} none of the deployment's", noun,
            f"steps {write_runs(shown)}",
        )  # fmt: skip


def _write_steps(steps: Sequence[int]) -> str:
    return f"decode step{'' if len(steps) == 1 else 's'} {write_runs(steps)}"


def _are(steps: Sequence[int]) -> str:
    return "is" if len(steps) == 1 else "are"
