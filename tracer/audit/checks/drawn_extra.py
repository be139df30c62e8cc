"""Communications of a drawing that nobody needs: of a purpose that the deployment has not, or one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import polars as pl

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.findings import Audit, Finding, write_count
from truedag.tracer.audit.plan import Plan
from truedag.tracer.audit.subject import Subject

_KNOWN = (
    "attention input", "attention output", "feed-forward input", "feed-forward output", "expert input", "expert output",
    "dispatch", "combine", "keys and values", "dense gradients", "expert gradients", "dense parameters",
    "expert parameters", "sampled tokens", "activations", "activation gradients",
)  # fmt: skip
"""What a label or its neighbours say for sure."""
_GATHERED = ("dense parameters", "expert parameters")
_SUMMED = ("dense gradients", "expert gradients")
_BUCKETS = (*_GATHERED, *_SUMMED)
_PLACE = ["purpose", "kind", "layer", "phase", "microbatch", "decode_step", "members"]
_FARTHEST = 2_000
_ENOUGH = 2


def check_extra(subject: Subject, plan: Plan, audit: Audit) -> None:
    """Check that nothing is communicated that nobody needs, and that no gradient is summed twice."""
    told = subject.communications.filter(pl.col("purpose").is_in(_KNOWN))
    needed = pl.concat([plan.exact, plan.totals], how="diagonal_relaxed")
    if told.is_empty():
        audit.skip("communication.extra", "no communication says what it is for")
        return
    again = _again(subject, needed, told)
    twice = again.filter(pl.col("purpose").is_in(_SUMMED))
    others = again.filter(~pl.col("purpose").is_in(_SUMMED))
    what = write_count(told["node"].n_unique(), "communication")
    audit.judge("communication.extra", [*_unneeded(subject, plan, needed, told), *_repeated(subject, others)], what)
    reductions = told.filter(pl.col("purpose").is_in(_SUMMED))["node"].n_unique()
    if reductions:
        what = write_count(reductions, "gradient reduction")
        audit.judge("communication.gradient-twice", _summed_twice(subject, twice), what)


def _unneeded(subject: Subject, plan: Plan, needed: pl.DataFrame, told: pl.DataFrame) -> Iterator[Finding]:
    """Yield communications of a purpose that the strategy does not have."""
    there = set(needed["purpose"]) | set(plan.expectation.optional)
    for (purpose,), rows in told.group_by("purpose", maintain_order=True):
        if purpose in there:
            continue
        nodes = rows["node"].unique(maintain_order=True)
        kinds = "/".join(rows["kind"].unique().sort())
        yield _finding(
            subject, "communication.extra", f"{len(nodes)} {purpose} {kinds}, which {plan.expectation.strategy} "
            "does not need", f"no {purpose} {kinds}", f"{len(nodes)}", nodes, rows["layer"].to_list(),
        )  # fmt: skip


def _again(subject: Subject, needed: pl.DataFrame, told: pl.DataFrame) -> pl.DataFrame:
    """Return communications of one place that come one after the other, more often than they are needed there."""
    sure = told.filter(pl.col("members").is_not_null() & ((pl.col("layer") >= 0) | pl.col("purpose").is_in(_SUMMED)))
    # Of the backward pass only a label can say what a communication in a layer is for.
    sure = sure.filter((pl.col("phase").fill_null("") != "backward") | pl.col("purpose").is_in(_BUCKETS))
    gathered = pl.col("purpose").is_in(_GATHERED)
    sure = sure.with_columns(phase=pl.when(gathered).then(None).otherwise("phase"))
    counts = needed.group_by("purpose", "layer", "phase", "microbatch", "decode_step", "members").agg(
        pl.col("num").sum()
    )
    most = {
        purpose: max(1.0, most) for purpose, most in counts.group_by("purpose").agg(pl.col("num").max()).iter_rows()
    }
    following: dict[int, list[int]] = {}
    for source, target in subject.edges.select("src", "dst").iter_rows():
        following.setdefault(source, []).append(target)
    rows = []
    for key, group in sure.group_by(_PLACE, maintain_order=True):
        purpose, kind, layer, members = str(key[0]), str(key[1]), key[2], str(key[6])
        nodes = group["node"].unique(maintain_order=True).to_list()
        allowed = 1.0 if purpose in _BUCKETS else most.get(purpose, 1.0)
        if len(nodes) > allowed and float(group["weight"].sum()) > allowed and _follow(following, nodes):
            rows += [(purpose, kind, layer, members, node, len(nodes)) for node in nodes]
    return pl.DataFrame(
        rows, orient="row", schema={"purpose": pl.String, "kind": pl.String, "layer": pl.Int32, "members": pl.String,
                                    "node": pl.Int64, "num": pl.Int64},
    )  # fmt: skip


def _follow(following: dict[int, list[int]], nodes: Sequence[int]) -> bool:
    """Return whether one of some nodes leads to another of them; buckets stand beside each other.

    All are followed at once: of the nodes that lead to a place any two are enough to tell whether another one does.
    """
    wanted = set(nodes)
    leading: dict[int, list[int]] = {}
    frontier = deque((node, node) for node in nodes)
    while frontier and len(leading) < _FARTHEST * len(nodes):
        node, source = frontier.popleft()
        for one in following.get(node, ()):
            if one in wanted and one != source:
                return True
            sources = leading.setdefault(one, [])
            if len(sources) < _ENOUGH and source not in sources:
                sources.append(source)
                frontier.append((one, source))
    return False


def _repeated(subject: Subject, again: pl.DataFrame) -> Iterator[Finding]:
    for (purpose, kind, num), rows in again.group_by("purpose", "kind", "num", maintain_order=True):
        nodes = rows["node"].unique(maintain_order=True)
        layers = sorted(set(rows["layer"]))
        yield _finding(
            subject, "communication.extra", f"{purpose} {kind} {num} times in {write_count(len(layers), 'layer')}: "
            f"{write_runs(layers)}", "once in each", f"{num} times, one after the other", nodes, layers,
        )  # fmt: skip


def _summed_twice(subject: Subject, twice: pl.DataFrame) -> Iterator[Finding]:
    for (purpose, num), rows in twice.group_by("purpose", "num", maintain_order=True):
        nodes = rows["node"].unique(maintain_order=True)
        yield _finding(
            subject, "communication.gradient-twice", f"{purpose} are reduced {num} times, one after the other",
            "once", f"{num} times", nodes, rows["layer"].to_list(),
        )  # fmt: skip


def _finding(
    subject: Subject, check: str, title: str, expected: str, found: str, nodes: pl.Series, layers: Sequence[int]
) -> Finding:
    ranks = subject.where.filter(pl.col("node").is_in(nodes.implode()))["rank"].unique().sort()
    return Finding(
        check=check, title=title[:1].upper() + title[1:], expected=expected, found=found, fix=CHECKS[check].fix,
        severity=CHECKS[check].severity, nodes=subject.name_nodes(nodes), num_nodes=len(nodes), ranks=tuple(ranks),
        layers=tuple(sorted({layer for layer in layers if layer >= 0})),
    )  # fmt: skip
