"""Communications of a drawing that tells little: what is nowhere, of another kind, or over other ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import polars as pl

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.checks.communication import CHECK_OF_PURPOSE
from truedag.tracer.audit.checks.finding import finding_of
from truedag.tracer.audit.checks.regions import as_summed, summed_purposes
from truedag.tracer.audit.findings import Audit, Finding, write_count
from truedag.tracer.audit.plan import Plan
from truedag.tracer.audit.roles import UNTOLD_KIND
from truedag.tracer.audit.subject import Subject, read_members

_FINE = ("dispatch of weights", "token counts", "expert input of weights", "loss", "embedding", "head")
"""What a drawing may leave to the communication beside it."""
_SHOWN = 6


def check_exchanges(subject: Subject, plan: Plan, audit: Audit) -> None:
    """Check what ranks exchange, as far as a drawing tells it."""
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
        yield finding_of(
            "communication.kind",
            f"{purpose} is drawn as {write_count(len(nodes), kind)}{beside}; the deployment has {wanted}",
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
        yield finding_of(
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
    yield finding_of(
        check, f"{first['purpose']} {kinds} {over}: {' and '.join(parts)}", grid, "; ".join(missing),
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
        yield finding_of(
            "communication.group",
            f"{len(nodes)} {name.upper()} communication{'s' if len(nodes) > 1 else ''} over other ranks than the "
            f"{name.upper()} groups: ranks {write_runs(ranks)}, {part}",
            f"ranks {write_runs(mine)}" if mine else f"groups of {sizes[name]}", f"ranks {write_runs(ranks)}",
            ranks=sorted({*ranks, *mine}), nodes=subject.name_nodes(nodes), num_nodes=len(nodes),
        )  # fmt: skip


def _halves(sends: int, receives: int) -> Iterator[Finding]:
    if sends != receives:
        yield finding_of(
            "communication.unmatched", f"{sends} sends and {receives} receives", "a receive for each send",
            f"{abs(sends - receives)} without the other half",
        )  # fmt: skip
