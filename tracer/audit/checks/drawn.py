"""Checks of a drawing that tells little: what is nowhere, what is in some layers only, what is on some ranks only.

A drawing that tells layer, rank, phase and microbatch of everything is checked like a dataset. Any other is compared
with the expectation as far as it goes: passes are laid over each other, and a role or purpose is covered where some
node says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import polars as pl

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.checks.communication import CHECK_OF_PURPOSE
from truedag.tracer.audit.checks.drawn_decode import check_decode
from truedag.tracer.audit.checks.drawn_places import check_places
from truedag.tracer.audit.checks.model import CHECK_OF_ROLE, single_residuals
from truedag.tracer.audit.checks.regions import as_summed, summed_purposes
from truedag.tracer.audit.findings import Audit, Finding, write_count
from truedag.tracer.audit.plan import Plan
from truedag.tracer.audit.roles import ATTENTION_CORE, FUSED_ATTENTION, UNTOLD_KIND
from truedag.tracer.audit.subject import Subject, read_members

_AHEAD = ("forward", "prefill", "decode")
_SYNONYMS = {
    "QKV projection": ("Q projection", "K projection", "V projection"),
    FUSED_ATTENTION: ATTENTION_CORE,
}
_FINE = ("dispatch of weights", "token counts", "expert input of weights", "loss", "embedding", "head")
"""What a drawing may leave to the communication beside it."""
_SHOWN = 6


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
    _judge_purposes(subject, plan, audit)
    told = _grouped(subject, plan)
    if told.is_empty():
        audit.skip("communication.group", "no communication says its axis and its ranks")
    else:
        what = write_count(told["node"].n_unique(), "communication")
        audit.judge("communication.group", _groups(subject, plan, told), what)
    sends, receives = (int((subject.nodes["kind"] == kind).sum()) for kind in ("send", "recv"))
    if sends and receives:
        what = f"{write_count(sends, 'send')}, {write_count(receives, 'receive')}"
        audit.judge("communication.unmatched", _halves(sends, receives), what)
    else:
        audit.skip("communication.unmatched", "sends and receives are not drawn as nodes of their own")
    if plan.expectation.kind == "train":
        audit.judge("model.backward", _backward(subject), "whether there is one")
    else:
        audit.judge("model.phases", _phases(subject), "whether there are prefill and decode")
        check_decode(subject, plan, audit)


def _finding(
    check: str, title: str, expected: str, found: str, *, ranks: Sequence[int] = (), layers: Sequence[int] = (),
    nodes: tuple[str, ...] = (), num_nodes: int = 0, fix: str | None = None,
) -> Finding:  # fmt: skip
    return Finding(
        check=check, title=title, expected=expected, found=found, fix=fix or CHECKS[check].fix,
        severity=CHECKS[check].severity, ranks=tuple(ranks), layers=tuple(layers), nodes=nodes, num_nodes=num_nodes,
    )  # fmt: skip


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
        yield _finding(
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
    yield _finding(
        check, _capital("; ".join(parts)), "; ".join(dict.fromkeys(
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
        yield _finding(
            "strategy.experts", f"No expert is shown: 0 of {number} in each of {len(layers)} layers, which EP"
            f"{expectation.sizes['ep']} spreads over the ranks", f"{total:,} experts", "none", layers=layers,
        )  # fmt: skip
        return
    everywhere = there.filter(pl.col("layer") < 0)["expert"]
    wanted = plan.experts.select("layer", "expert").unique()
    lost = wanted.join(there, on=["layer", "expert"], how="anti").filter(~pl.col("expert").is_in(everywhere.implode()))
    if len(lost):
        shown = sorted(set(there["expert"]))
        yield _finding(
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
        yield _finding(
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
    return _finding(
        "strategy.experts", f"{pairs:,} of {total:,} experts are drawn on ranks that do not hold them: expert "
        f"{row['expert']} of layer {row['layer']} on {where}",
        f"ranks {write_runs(home)}" if home else f"experts 0-{expectation.num_experts - 1}", where,
        ranks=sorted(set(strange["rank"])), layers=sorted(set(strange["layer"])),
    )  # fmt: skip


def _judge_purposes(subject: Subject, plan: Plan, audit: Audit) -> None:
    needed = pl.concat([plan.exact, plan.totals], how="diagonal_relaxed")
    summed = summed_purposes(subject)
    # What is summed in a region need not be all of it: logits may be gathered either way.
    kinds = pl.concat([rows.select("purpose", "kind") for rows in (needed, as_summed(needed, summed))]).unique()
    needed = as_summed(needed, summed)
    found = subject.communications.filter(pl.col("purpose").is_not_null())
    # Where a summed region is entered only the backward pass exchanges something; model.backward asks for that.
    silent = {*_FINE, *({name for name in summed if " input" in name} - set(found["purpose"]))}
    for check in dict.fromkeys(CHECK_OF_PURPOSE.values()):
        purposes = [
            purpose for purpose, chapter in CHECK_OF_PURPOSE.items()
            if chapter == check and purpose not in silent and (needed["purpose"] == purpose).any()
        ]  # fmt: skip
        if not purposes:
            continue
        findings = [
            finding
            for purpose in purposes
            for finding in _in_each_pass(
                needed.filter(pl.col("purpose") == purpose), found.filter(pl.col("purpose") == purpose), check,
                told_passes(subject),
            )
        ]  # fmt: skip
        audit.judge(check, findings, ", ".join(purposes))
    told = found.filter((pl.col("kind") != UNTOLD_KIND) & pl.col("purpose").is_in(kinds["purpose"].unique().implode()))
    if len(told):
        what = write_count(told["node"].n_unique(), "communication")
        audit.judge("communication.kind", _kinds(subject, kinds, told), what)
    else:
        audit.skip("communication.kind", "no communication says what it is for, and how it is made")


def _kinds(subject: Subject, kinds: pl.DataFrame, told: pl.DataFrame) -> Iterator[Finding]:
    """Yield communications of a kind that the deployment has nowhere for what they are for."""
    wrong = told.join(kinds, on=["purpose", "kind"], how="anti")
    for rows in [] if wrong.is_empty() else wrong.partition_by("purpose", "kind", maintain_order=True):
        purpose, kind = rows.row(0, named=True)["purpose"], rows.row(0, named=True)["kind"]
        mine = told.filter(pl.col("purpose") == purpose)
        wanted = " and ".join(f"{one}s" for one in kinds.filter(pl.col("purpose") == purpose)["kind"].unique().sort())
        rest = mine.join(rows, on="node", how="anti")
        beside = "".join(
            f", beside {write_count(part['node'].n_unique(), str(name[0]))}"
            for name, part in rest.group_by("kind", maintain_order=True)
        )
        nodes = rows["node"].unique(maintain_order=True)
        yield _finding(
            "communication.kind",
            f"{_capital(purpose)} is drawn as {write_count(len(nodes), kind)}{beside}; the deployment has {wanted}",
            wanted, f"{kind}s", layers=sorted(layer for layer in rows["layer"].unique() if layer >= 0),
            nodes=subject.name_nodes(nodes), num_nodes=len(nodes),
        )  # fmt: skip


def told_passes(subject: Subject) -> tuple[str, ...]:
    """Return the passes that a drawing tells apart; what says none is then of the forward pass, or of each."""
    told = set(subject.nodes["phase"].drop_nulls())
    if "backward" in told:
        return ("forward",)
    return ("prefill", "decode") if told >= {"prefill", "decode"} else ()


def _in_each_pass(needed: pl.DataFrame, found: pl.DataFrame, check: str, passes: tuple[str, ...]) -> Iterator[Finding]:
    """Yield what a purpose lacks: in each pass that is told apart, where it is needed in several."""
    told = [one for one in passes if (needed["phase"] == one).any()]
    if not told:
        yield from _purpose(needed, found, check)
        return
    for one in told:
        mine = found.filter(pl.col("phase").is_null() | (pl.col("phase") == one))
        for finding in _purpose(needed.filter(pl.col("phase") == one), mine, check):
            during = f"in the {one} pass" if one == "forward" else f"in {one}"
            yield replace(finding, title=f"{finding.title}, {during}")


def _purpose(needed: pl.DataFrame, found: pl.DataFrame, check: str) -> Iterator[Finding]:
    pairs = needed.select("layer", "members").unique()
    first = needed.row(0, named=True)
    kinds = "/".join(needed["kind"].unique().sort())
    layers = sorted(layer for layer in pairs["layer"].unique() if layer >= 0)
    groups = pairs["members"].n_unique()
    over = f"over {str(first['axis']).upper()}" if first["kind"] != "message" else "between stages"
    noun = "messages" if first["kind"] == "message" else "groups"
    grid = (f"{len(layers)} layers, " if layers else "") + f"{groups:,} {noun}"
    members = sorted(set(pairs["members"]), key=read_members)
    inside = f" in layers {write_runs(layers)}" if layers else ""
    if found.is_empty():
        yield _finding(
            check, f"No {first['purpose']} {kinds} {over} is drawn: 0 of {len(pairs):,}", f"{grid}", "none",
            layers=layers, fix=f"Draw {first['purpose']} {kinds} {over}{inside}: {_write_lost(members)}.",
        )  # fmt: skip
        return
    told = found.select("layer", "members").unique()
    wide = (told["layer"] < 0).any() or not layers
    lost_layers = [] if wide else sorted(set(layers) - set(told["layer"]))
    silent = told["members"].is_null().any()
    lost = [] if silent else sorted(set(pairs["members"]) - set(told["members"]), key=read_members)
    if not lost_layers and not lost:
        return
    parts = [f"in {len(layers) - len(lost_layers)} of {len(layers)} layers"] if lost_layers else []
    parts += [f"on {groups - len(lost):,} of {groups:,} {noun}"] if lost else []
    missing = [f"not in layers {write_runs(lost_layers)}"] if lost_layers else []
    if lost:
        missing.append("not on " + _write_lost(lost))
    yield _finding(
        check, f"{_capital(first['purpose'])} {kinds} {over}: {' and '.join(parts)}", grid, "; ".join(missing),
        ranks=sorted({rank for members in lost for rank in read_members(members)}), layers=lost_layers,
    )  # fmt: skip


def _write_lost(lost: Sequence[str]) -> str:
    """Write groups and messages in few words."""
    shown = [members if ">" in members else write_runs(read_members(members)) for members in lost[:_SHOWN]]
    more = f" and {len(lost) - _SHOWN:,} more" if len(lost) > _SHOWN else ""
    return "; ".join(name.replace(">", " to ") for name in shown) + more


def _grouped(subject: Subject, plan: Plan) -> pl.DataFrame:
    """Return the communications that say over which ranks of which axis they are."""
    return subject.communications.filter(
        pl.col("members").is_not_null() & pl.col("axis").is_in(list(plan.expectation.sizes)),
        pl.col("kind") != "message",
        ~pl.col("purpose").fill_null("").is_in(["token counts", "score corrections"]),  # over several axes at once
    )


def _groups(subject: Subject, plan: Plan, told: pl.DataFrame) -> Iterator[Finding]:
    """Communications whose ranks are no group of their axis."""
    sizes, groups = plan.expectation.sizes, plan.expectation.groups
    for axis, rows in told.group_by("axis", maintain_order=True):
        name = str(axis[0])
        whole = {tuple(group) for group in groups[name]}
        wrong = {
            members for members in rows["members"].unique() if tuple(read_members(members)) not in whole
        }  # fmt: skip
        if not wrong:
            continue
        shown = sorted(wrong, key=read_members)
        ranks = read_members(shown[0])
        mine = next((group for group in groups[name] if ranks and ranks[0] in group), ())
        nodes = rows.filter(pl.col("members").is_in(shown))["node"]
        part = f"{len(set(ranks) & set(mine))} of {sizes[name]} members" if mine else f"{len(ranks)} ranks"
        yield _finding(
            "communication.group",
            f"{len(nodes)} {name.upper()} communication{'s' if len(nodes) > 1 else ''} over other ranks than the "
            f"{name.upper()} groups: ranks {write_runs(ranks)}, {part}",
            f"ranks {write_runs(mine)}" if mine else f"groups of {sizes[name]}", f"ranks {write_runs(ranks)}",
            ranks=sorted({*ranks, *mine}), nodes=subject.name_nodes(nodes), num_nodes=len(nodes),
        )  # fmt: skip


def _halves(sends: int, receives: int) -> Iterator[Finding]:
    if sends != receives:
        yield _finding(
            "communication.unmatched", f"{sends} sends and {receives} receives", "a receive for each send",
            f"{abs(sends - receives)} without the other half",
        )  # fmt: skip


def _backward(subject: Subject) -> Iterator[Finding]:
    phases = {*subject.nodes["phase"].drop_nulls(), *subject.communications["phase"].drop_nulls()}
    if "backward" not in phases:
        yield _finding(
            "model.backward", "No backward pass is drawn, and the deployment trains",
            "a backward pass through every layer",
            f"phases: {', '.join(sorted(phases)) or 'none told'}",
        )  # fmt: skip


def _phases(subject: Subject) -> Iterator[Finding]:
    phases = set(subject.covers["phase"].drop_nulls())
    for phase in ("prefill", "decode"):
        if phase not in phases:
            yield _finding(
                "model.phases",
                f"No node belongs to {phase}",
                "prefill and decode",
                ", ".join(sorted(phases)) or "none told",
            )


def _capital(text: object) -> str:
    return str(text)[:1].upper() + str(text)[1:]
