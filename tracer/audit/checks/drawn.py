"""Checks of a drawing that tells little: what is nowhere, what is in some layers only, what is on some ranks only.

A drawing that tells layer, rank, phase and microbatch of everything is checked like a dataset. Any other is compared
with the expectation as far as it goes: passes are laid over each other, and a role or purpose is covered where some
node says so.
"""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.checks.drawn_communication import check_exchanges
from truedag.tracer.audit.checks.drawn_decode import check_decode
from truedag.tracer.audit.checks.drawn_places import check_places
from truedag.tracer.audit.checks.finding import finding_of
from truedag.tracer.audit.checks.model import CHECK_OF_ROLE, single_residuals
from truedag.tracer.audit.findings import Audit, Finding
from truedag.tracer.audit.plan import Plan
from truedag.tracer.audit.roles import ATTENTION_CORE, FUSED_ATTENTION
from truedag.tracer.audit.subject import Subject

_AHEAD = ("forward", "prefill", "decode")
_SYNONYMS = {
    "QKV projection": ("Q projection", "K projection", "V projection"),
    FUSED_ATTENTION: ATTENTION_CORE,
}


def tells_everything(subject: Subject) -> bool:
    """Return whether a drawing says of its operators where each stands, so that it can be checked like a dataset."""
    told = subject.covers
    if told.is_empty() or subject.where.is_empty():
        return False
    placed = told.join(subject.where, on="node", how="semi")["node"].n_unique() / told["node"].n_unique()
    in_pass = float((told["phase"].is_not_null() & (told["microbatch"] >= 0)).mean() or 0.0)  # type: ignore[arg-type]
    return placed > 0.9 and in_pass > 0.9


def check_drawn(subject: Subject, plan: Plan, audit: Audit) -> None:
    """Check a drawing's axes, parts and communications against what the deployment has."""
    audit.judge(
        "strategy.axis", _axes(subject, plan), f"{sum(size > 1 for size in plan.expectation.sizes.values())} axes"
    )
    if plan.expectation.num_experts:
        what = f"{plan.expectation.num_experts} experts in {len(plan.expectation.expert_layers)} layers"
        audit.judge("strategy.experts", _experts(subject, plan), what)
    _judge_roles(subject, plan, audit)
    check_exchanges(subject, plan, audit)
    if plan.expectation.kind == "train":
        audit.judge("model.backward", _backward(subject), "whether there is one")
    else:
        audit.judge("model.phases", _phases(subject), "whether there are prefill and decode")
        check_decode(subject, plan, audit)


def _axes(subject: Subject, plan: Plan) -> Iterator[Finding]:
    """An axis is shown by ranks at each of its places; one that no label and no communication names is said so."""
    expectation = plan.expectation
    shown = [rank for rank in sorted(set(subject.where["rank"])) if rank < expectation.world_size]
    met = set(subject.communications["axis"].drop_nulls())
    for axis, size in expectation.sizes.items():
        if size == 1 or (axis == "etp" and size == expectation.sizes["tp"]):
            continue
        places = sorted(
            {expectation.coordinates[rank][axis] for rank in shown if axis in expectation.coordinates[rank]}
        )
        name = axis.upper()
        number = len(expectation.groups[axis])
        if len(places) == size:
            continue
        silent = "" if axis in met else f", and no communication over {name} is"
        title = f"{len(places)} of {size} {name} ranks of a group are shown{silent}"
        if len(places) <= 1:
            title = f"No {name} parallelism is shown: {len(places)} of {size} places of {name}{size}{silent}"
        yield finding_of(
            "strategy.axis", title, f"{name}{size}: {number} groups of {size}",
            f"places {write_runs(places)} of 0-{size - 1}" if places else "none", ranks=shown[:64],
        )  # fmt: skip


def _judge_roles(subject: Subject, plan: Plan, audit: Audit) -> None:
    by_role: dict[str, set[int]] = {}
    ahead = subject.covers.filter(~pl.col("phase").fill_null("").is_in(["backward", "optimizer"]))
    for role, layer in ahead.select("role", "layer").unique().iter_rows():
        by_role.setdefault(role, set()).add(layer)
    # A router that is drawn as one node chooses as well.
    by_role.setdefault("top-k choice", by_role.get("router", set()))
    for name, parts in _SYNONYMS.items():
        if all(part in by_role for part in parts):
            by_role.setdefault(name, set()).update(set.intersection(*(by_role[part] for part in parts)))
    if FUSED_ATTENTION in by_role:
        for part in ATTENTION_CORE:
            by_role.setdefault(part, set()).update(by_role[FUSED_ATTENTION])
    for check in dict.fromkeys(CHECK_OF_ROLE.values()):
        wanted = {
            row.role: row.layers for row in plan.expectation.operators
            if CHECK_OF_ROLE.get(row.role) == check and set(row.phases) & set(_AHEAD)
        }  # fmt: skip
        if wanted:
            findings = [*_roles(wanted, by_role, check), *check_places(subject, plan, [*wanted], check)]
            if check == "model.residual":
                findings += single_residuals(subject)
            audit.judge(check, findings, ", ".join(wanted))


def _roles(wanted: dict[str, tuple[int, ...]], by_role: dict[str, set[int]], check: str) -> Iterator[Finding]:
    """Yield one finding for all roles of a check that are nowhere, or in some layers only."""
    states: dict[tuple[int, int, tuple[int, ...]], list[str]] = {}
    missing: set[int] = set()
    for role, layers in wanted.items():
        there = by_role.get(role, set())
        lost = set() if there == {-1} or (layers == (-1,) and there) else set(layers) - there
        if lost:
            states.setdefault((len(layers) - len(lost), len(layers), tuple(sorted(lost))), []).append(role)
            missing |= lost - {-1}
    if not states:
        return
    parts, fixes = [], []
    for (number, of, lost_layers), roles in sorted(states.items()):
        everywhere = wanted[roles[0]] == (-1,)
        parts.append(f"{_join(roles)}: " + ("not drawn" if everywhere else f"drawn in {number} of {of} layers"))
        fixes.append(_join(roles) + ("" if everywhere else f" in layers {write_runs(lost_layers)}"))
    yield finding_of(
        check, "; ".join(parts), "; ".join(dict.fromkeys(
            "one on its stage" if layers == (-1,) else f"in layers {write_runs(layers)}" for layers in wanted.values()
        )), f"missing in layers {write_runs(missing)}" if missing else "none", layers=sorted(missing),
        fix=f"Draw {'; '.join(fixes)}.",
    )  # fmt: skip


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _experts(subject: Subject, plan: Plan) -> Iterator[Finding]:
    """Which experts of which layers are drawn, and whether those are where they belong."""
    expectation = plan.expectation
    told = subject.covers.filter(pl.col("expert") >= 0)
    there = told.select("layer", "expert").unique()
    number, layers = expectation.num_experts, expectation.expert_layers
    total = number * len(layers)
    if there.is_empty():
        yield finding_of(
            "strategy.experts", f"No expert is shown: 0 of {number} in each of {len(layers)} layers, which EP"
            f"{expectation.sizes['ep']} spreads over the ranks", f"{total:,} experts", "none", layers=layers,
        )  # fmt: skip
        return
    everywhere = there.filter(pl.col("layer") < 0)["expert"]
    wanted = plan.experts.select("layer", "expert").unique()
    lost = wanted.join(there, on=["layer", "expert"], how="anti").filter(~pl.col("expert").is_in(everywhere.implode()))
    if len(lost):
        shown = sorted(set(there["expert"]))
        yield finding_of(
            "strategy.experts", f"{total - len(lost):,} of {total:,} experts are drawn ({number} in each of "
            f"{len(layers)} layers)", f"experts 0-{number - 1} of layers {write_runs(layers)}",
            f"experts {write_runs(shown)} of layers {write_runs(layer for layer in set(there['layer']) if layer >= 0)}",
            layers=sorted(set(lost["layer"])),
        )  # fmt: skip
    yield from _misplaced_experts(subject, plan, told)


def _misplaced_experts(subject: Subject, plan: Plan, told: pl.DataFrame) -> Iterator[Finding]:
    """Experts on ranks that do not hold them, and, where an expert is drawn by itself, ranks on which it is not.

    A node of several experts on several ranks is a fold: each of its ranks must hold one of them, and each of them be
    on one of its ranks.
    """
    expectation = plan.expectation
    total = expectation.num_experts * len(expectation.expert_layers)
    inside = pl.col("layer") >= 0
    placed = told.filter(inside).select("node", "layer", "expert").unique().join(subject.where, on="node")
    there = placed.join(plan.experts, on=["layer", "expert", "rank"], how="semi")
    strays = placed.join(there.select("node", "layer", "rank").unique(), on=["node", "layer", "rank"], how="anti")
    homeless = placed.join(there.select("node", "layer", "expert").unique(), on=["node", "layer", "expert"], how="anti")
    strange = pl.concat([strays, homeless]).select("layer", "expert", "rank").unique()
    if len(strange):
        yield _moved(plan, strange, total)
    single = told.filter(inside).select("node", "layer", "expert").unique()
    single = single.filter(pl.len().over("node", "layer") == 1)
    shown = single.join(subject.where, on="node").select("layer", "expert", "rank").unique()
    folded = placed.join(single, on=["node", "layer", "expert"], how="anti").select("layer", "expert").unique()
    known = shown.select("layer", "expert").unique().join(folded, on=["layer", "expert"], how="anti")
    lost = plan.experts.join(known, on=["layer", "expert"], how="semi").join(
        shown, on=["layer", "expert", "rank"], how="anti"
    )
    lost = lost.join(strange, on=["layer", "expert"], how="anti")
    if len(lost):
        row = lost.sort("layer", "expert", "rank").row(0, named=True)
        home = expectation.ranks_of_expert[expectation.stage_of_layer[row["layer"]]][row["expert"]]
        on = sorted(set(shown.filter(layer=row["layer"], expert=row["expert"])["rank"]))
        yield finding_of(
            "strategy.experts", f"{lost.select('layer', 'expert').n_unique():,} of {total:,} experts are drawn on some "
            f"of their ranks only: expert {row['expert']} of layer {row['layer']} on {len(on)} of {len(home)}",
            f"ranks {write_runs(home)}", f"ranks {write_runs(on)}", ranks=sorted(set(lost["rank"])),
            layers=sorted(set(lost["layer"])),
        )  # fmt: skip


def _moved(plan: Plan, strange: pl.DataFrame, total: int) -> Finding:
    expectation = plan.expectation
    pairs = strange.select("layer", "expert").n_unique()
    row = strange.sort("layer", "expert", "rank").row(0, named=True)
    stage = expectation.stage_of_layer[row["layer"]] if row["layer"] < len(expectation.stage_of_layer) else 0
    homes = expectation.ranks_of_expert[stage]
    home = homes[row["expert"]] if row["expert"] < len(homes) else ()
    on = sorted(set(strange.filter(layer=row["layer"], expert=row["expert"])["rank"]))
    where = f"rank{'s' if len(on) > 1 else ''} {write_runs(on)}"
    return finding_of(
        "strategy.experts", f"{pairs:,} of {total:,} experts are drawn on ranks that do not hold them: expert "
        f"{row['expert']} of layer {row['layer']} on {where}",
        f"ranks {write_runs(home)}" if home else f"experts 0-{expectation.num_experts - 1}", where,
        ranks=sorted(set(strange["rank"])), layers=sorted(set(strange["layer"])),
    )  # fmt: skip


def _backward(subject: Subject) -> Iterator[Finding]:
    phases = {*subject.nodes["phase"].drop_nulls(), *subject.communications["phase"].drop_nulls()}
    if "backward" not in phases:
        yield finding_of(
            "model.backward", "No backward pass is drawn, and the deployment trains",
            "a backward pass through every layer",
            f"phases: {', '.join(sorted(phases)) or 'none told'}",
        )  # fmt: skip


def _phases(subject: Subject) -> Iterator[Finding]:
    phases = set(subject.covers["phase"].drop_nulls())
    for phase in ("prefill", "decode"):
        if phase not in phases:
            yield finding_of(
                "model.phases",
                f"No node belongs to {phase}",
                "prefill and decode",
                ", ".join(sorted(phases)) or "none told",
            )
