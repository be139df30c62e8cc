"""Whether decoding, in a drawing that tells prefill and decode apart, depends on the cache and on the sampled token."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.checks.finding import finding_of
from truedag.tracer.audit.checks.reach import reach, readers_of
from truedag.tracer.audit.findings import Audit, Finding, write_count
from truedag.tracer.audit.plan import Plan
from truedag.tracer.audit.subject import Subject


def check_decode(subject: Subject, plan: Plan, audit: Audit) -> None:
    """Check what leads from prefill to decode."""
    phases = dict(subject.nodes.select("node", "phase").iter_rows())
    told = set(phases.values())
    if not {"prefill", "decode"} <= told:
        return
    following = readers_of(subject)
    findings = [*_cache(subject, plan, phases, following), *_token(subject, phases, following)]
    audit.findings += findings


def _cache(
    subject: Subject, plan: Plan, phases: dict[int, str | None], following: dict[int, list[int]]
) -> Iterator[Finding]:
    """Yield the layers whose decoding reads nothing of the same layer's prefill.

    What joins them may be an edge, or a cache without a phase of its own.
    """
    inside = (pl.col("layer") >= 0) & (pl.col("layer") < len(plan.expectation.stage_of_layer))
    layers: dict[int, set[int]] = {}
    for node, layer in subject.covers.filter(inside).select("node", "layer").unique().iter_rows():
        layers.setdefault(node, set()).add(layer)
    read: set[int] = set()
    # What prefill wrote, layer by layer, as far as it was followed; a node is passed again only for further layers.
    told: dict[int, set[int]] = {}
    frontier = [(node, mine) for node, mine in layers.items() if phases.get(node) == "prefill"]
    while frontier:
        node, written = frontier.pop()
        for other in following.get(node, ()):
            mine = written & layers.get(other, written)
            if phases.get(other) == "decode":
                read |= mine & layers.get(other, set())
            elif phases.get(other) is None and (fresh := mine - told.setdefault(other, set())):
                told[other] |= fresh
                frontier.append((other, fresh))
    drawn = {layer for node, mine in layers.items() if phases.get(node) == "decode" for layer in mine}
    lost = sorted(drawn - read)
    if lost:
        yield finding_of(
            "model.cache",
            f"Decoding reads nothing of the same layer's prefill in {write_count(len(lost), 'layer')}: "
            f"{write_runs(lost)}", "an edge from the cache that prefill wrote to each layer of decode",
            f"none in {write_count(len(lost), 'layer')}", layers=lost,
            fix=f"Lead an edge from the cache of prefill to decode in layers {write_runs(lost)}.",
        )  # fmt: skip


def _token(subject: Subject, phases: dict[int, str | None], following: dict[int, list[int]]) -> Iterator[Finding]:
    """Yield embeddings of decode that nothing of prefill leads to: the first of them reads the token it sampled."""
    entries = subject.covers.filter((pl.col("role") == "embedding") & (pl.col("phase") == "decode"))["node"].unique()
    if entries.is_empty():
        return
    reached = reach([node for node, phase in phases.items() if phase == "prefill"], following)
    lost = entries.filter(~entries.is_in(list(reached)))
    if len(lost):
        yield finding_of(
            "model.cache",
            f"{write_count(len(lost), 'embedding')} of decode do{'es' if len(lost) == 1 else ''} not depend on the "
            "token that prefill sampled", "a path from the sampled token to the embedding of decode",
            f"{len(lost)} without", nodes=subject.name_nodes(lost), num_nodes=len(lost),
            fix="Lead an edge from the sampled token to the embedding of the next step.",
        )  # fmt: skip
