"""Checks of who runs what: ranks, coordinates, groups, layers on stages, experts on ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import polars as pl

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.expectation import Group
from truedag.tracer.audit.findings import Audit, Finding, write_count
from truedag.tracer.audit.plan import Plan
from truedag.tracer.audit.subject import Subject, read_members

_SHOWN_GROUPS = 6


def check_strategy(subject: Subject, plan: Plan, audit: Audit, *, whole: bool = True, num_unread: int = 0) -> None:
    """Check who runs what; not `whole`: a drawing tells so little that what it lacks is said elsewhere, in sum.

    `num_unread`: nodes of a drawing whose ranks were too many to be kept; which ranks are there is not known then.
    """
    expectation = plan.expectation
    world = expectation.world_size
    if num_unread:
        audit.skip("strategy.ranks", f"the ranks of {write_count(num_unread, 'node')} are more than can be")
    elif not subject.present():
        audit.findings.append(_no_ranks(plan))
    else:
        audit.judge("strategy.ranks", _ranks(subject, plan), f"{world} ranks")
    if subject.form == "dataset":
        placed = subject.ranks.filter(pl.any_horizontal(pl.exclude("rank") >= 0))
        if placed.is_empty():
            audit.skip("strategy.coordinates", "no rank says where it stands on any axis")
        else:
            audit.judge("strategy.coordinates", _coordinates(subject, plan), f"coordinates of {len(placed)} ranks")
        told = [axis for axis, size in expectation.sizes.items() if size > 1 and axis in set(subject.groups["axis"])]
        if told:
            audit.judge("strategy.groups", _groups(subject, plan), f"groups of {', '.join(told)}")
        else:
            audit.skip("strategy.groups", "the dataset tells of no group that is one of the strategy's")
    if subject.tells("layer"):
        number = len(expectation.stage_of_layer)
        audit.judge(
            "strategy.layers",
            _layers(subject, plan, whole=whole),
            f"{number} layers on {expectation.num_stages} stages",
        )
    else:
        audit.skip("strategy.layers", "no node says which layer it belongs to")
    if expectation.num_experts and whole:
        _judge_experts(subject, plan, audit)


def absent_ranks(subject: Subject, plan: Plan) -> list[int]:
    """Return the ranks that no node is on."""
    present = subject.present()
    return [rank for rank in range(plan.expectation.world_size) if rank not in present]


def placed_layers(subject: Subject) -> pl.DataFrame:
    """Return layer, rank: which ranks run a part of which layer."""
    told = subject.covers.filter(pl.col("layer") >= 0).select("node", "layer")
    return subject.told_of_ranks(told)


def placed_experts(subject: Subject) -> pl.DataFrame:
    """Return layer, expert, rank."""
    told = subject.placed(pl.col("expert") >= 0, pl.col("layer") >= 0)
    return told.select("layer", "expert", "rank").unique()


def _finding(check: str, title: str, expected: str, found: str, **where: tuple[int, ...]) -> Finding:
    return Finding(
        check=check, title=title, expected=expected, found=found, fix=CHECKS[check].fix,
        severity=CHECKS[check].severity, ranks=where.get("ranks", ()), layers=where.get("layers", ()),
    )  # fmt: skip


def _no_ranks(plan: Plan) -> Finding:
    world = plan.expectation.world_size
    return _finding(
        "strategy.ranks", f"No node says which of the {world} ranks it runs on", f"ranks 0-{world - 1}", "none"
    )


def _ranks(subject: Subject, plan: Plan) -> Iterator[Finding]:
    world = plan.expectation.world_size
    present = subject.present()
    missing = absent_ranks(subject, plan)
    extra = sorted(present - set(range(world)))
    if missing:
        yield _finding(
            "strategy.ranks",
            f"{len(missing)} of {world} ranks {'is' if len(missing) == 1 else 'are'} missing: {write_runs(missing)}",
            f"ranks 0-{world - 1}", f"{world - len(missing)} of them", ranks=tuple(missing),
        )  # fmt: skip
    if extra:
        yield _finding(
            "strategy.ranks", f"{write_count(len(extra), 'rank')} that the strategy does not have: {write_runs(extra)}",
            f"ranks 0-{world - 1}", f"up to rank {max(extra)}", ranks=tuple(extra),
        )  # fmt: skip


def _coordinates(subject: Subject, plan: Plan) -> Iterator[Finding]:
    wrong: dict[str, list[tuple[int, int, int]]] = {}
    world = plan.expectation.world_size
    for row in subject.ranks.iter_rows(named=True):
        if not 0 <= row["rank"] < world:
            continue
        for axis, place in plan.expectation.coordinates[row["rank"]].items():
            if row.get(axis, -1) not in (-1, None, place):
                wrong.setdefault(axis, []).append((row["rank"], place, row[axis]))
    for axis, rows in wrong.items():
        rank, place, found = rows[0]
        yield _finding(
            "strategy.coordinates",
            f"{len(rows)} of {world} ranks stand elsewhere on {axis}: rank {rank} at {found}, not at {place}",
            "; ".join(f"rank {rank}: {axis} {place}" for rank, place, _ in rows[:_SHOWN_GROUPS]),
            "; ".join(f"rank {rank}: {axis} {found}" for rank, _, found in rows[:_SHOWN_GROUPS]),
            ranks=tuple(rank for rank, _, _ in rows),
        )


def _groups(subject: Subject, plan: Plan) -> Iterator[Finding]:
    told = subject.groups.filter(pl.col("axis").is_not_null())
    for axis, size in plan.expectation.sizes.items():
        if size == 1:
            continue
        members = set(told.filter(pl.col("axis") == axis)["members"])
        if not members:
            continue
        wanted = {",".join(map(str, sorted(group))): group for group in plan.expectation.groups[axis]}
        missing = [group for text, group in wanted.items() if text not in members]
        home = {rank: group for group in wanted.values() for rank in group}
        others = [read_members(text) for text in sorted(members - set(wanted))]
        strange = [tuple(sorted(ranks)) for ranks in others if _divides(ranks, home)]
        if missing or strange:
            concerned = sorted({rank for group in [*missing, *strange] for rank in group})
            yield _finding(
                "strategy.groups",
                f"{len(missing)} of the {len(wanted)} {axis} groups are not there"
                + (f", and {len(strange)} others are" if strange else ""),
                f"{len(wanted)} groups of {size}: " + _write_groups(missing),
                _write_groups(strange) if strange else f"{len(members)} groups, without these",
                ranks=tuple(concerned),
            )


def _divides(ranks: Iterable[int], home: Mapping[int, Group]) -> bool:
    """Return whether some ranks are part of a group, and others not, without holding it whole; `home`: by rank."""
    members = set(ranks)
    met = Counter(home[rank] for rank in members if rank in home)
    return any(num not in (len(members), len(group)) for group, num in met.items())


def _write_groups(groups: list[tuple[int, ...]]) -> str:
    shown = ", ".join(f"[{write_runs(group)}]" for group in groups[:_SHOWN_GROUPS])
    return shown + (f" and {len(groups) - _SHOWN_GROUPS} more" if len(groups) > _SHOWN_GROUPS else "")


def _layers(subject: Subject, plan: Plan, *, whole: bool) -> Iterator[Finding]:
    placed = placed_layers(subject)
    number = len(plan.expectation.stage_of_layer)
    missing = sorted(set(range(number)) - set(placed["layer"]))
    extra = sorted(layer for layer in set(placed["layer"]) if layer >= number)
    if missing:
        yield _finding(
            "strategy.layers",
            f"{len(missing)} of {number} layers {'is' if len(missing) == 1 else 'are'} missing: {write_runs(missing)}",
            f"layers 0-{number - 1}", f"{number - len(missing)} of them", layers=tuple(missing),
        )  # fmt: skip
    if extra:
        yield _finding(
            "strategy.layers", f"{write_count(len(extra), 'layer')} that the model does not have: {write_runs(extra)}",
            f"layers 0-{number - 1}", f"up to layer {max(extra)}", layers=tuple(extra),
        )  # fmt: skip
    absent = absent_ranks(subject, plan)
    wanted = plan.layers.filter(~pl.col("rank").is_in(absent) & ~pl.col("layer").is_in(missing))
    lost = wanted.join(placed, on=["layer", "rank"], how="anti")
    strange = placed.filter(pl.col("layer") < number).join(plan.layers, on=["layer", "rank"], how="anti")
    if not whole:
        lost = lost.clear()
    if not subject.present() or (lost.is_empty() and strange.is_empty()):
        return
    # Layers of a stage that are wrong in the same way are told together.
    alike: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for layer in sorted({*lost["layer"], *strange["layer"]}):
        away = tuple(sorted(lost.filter(pl.col("layer") == layer)["rank"]))
        there = tuple(sorted(strange.filter(pl.col("layer") == layer)["rank"]))
        alike.setdefault((plan.expectation.stage_of_layer[layer], away, there), []).append(layer)
    for (stage, away, there), layers in itertools.islice(alike.items(), _SHOWN_GROUPS):
        yield _misplaced(plan, stage, away, there, layers)
    rest = sorted(layer for layers in itertools.islice(alike.values(), _SHOWN_GROUPS, None) for layer in layers)
    if rest:
        yield _finding(
            "strategy.layers", f"{write_count(len(rest), 'further layer')} on wrong ranks: {write_runs(rest)}",
            "each layer on the ranks of its stage", f"layers {write_runs(rest)} elsewhere", layers=tuple(rest),
        )  # fmt: skip


def _misplaced(plan: Plan, stage: int, away: tuple[int, ...], there: tuple[int, ...], layers: Sequence[int]) -> Finding:
    several = len(layers) > 1
    subject = f"Layer{'s' if several else ''} {write_runs(layers)}"
    if there:
        title = (
            f"{subject} {'run' if several else 'runs'} on ranks {write_runs(there)}, which are not of "
            f"{'their' if several else 'its'} stage {stage}"
        )
    else:
        title = (
            f"{subject} {'are' if several else 'is'} missing on ranks {write_runs(away)} of "
            f"{'their' if several else 'its'} stage {stage}"
        )
    found = f"not on ranks {write_runs(away)}" if away else "there as well"
    return _finding(
        "strategy.layers", title, f"stage {stage}, ranks {write_runs(plan.expectation.ranks_of_stage(stage))}",
        found + (f"; on ranks {write_runs(there)}" if there else ""), ranks=tuple(sorted({*away, *there})),
        layers=tuple(layers),
    )  # fmt: skip


def _judge_experts(subject: Subject, plan: Plan, audit: Audit) -> None:
    expectation = plan.expectation
    what = f"{expectation.num_experts} experts in each of {len(expectation.expert_layers)} layers"
    if subject.tells("expert"):
        audit.judge("strategy.experts", _experts(subject, plan), what)
    elif (subject.covers["role"] == "expert first layer").any() or subject.form == "dataset":
        audit.skip("strategy.experts", "experts run together in one operator, which does not say which they are")
    else:
        audit.findings.append(
            _finding("strategy.experts", f"No expert is shown, of {what}", what, "none",
                     layers=expectation.expert_layers)
        )  # fmt: skip


def _experts(subject: Subject, plan: Plan) -> Iterator[Finding]:
    placed = placed_experts(subject)
    number, layers = plan.expectation.num_experts, plan.expectation.expert_layers
    unknown = sorted(expert for expert in set(placed["expert"]) if expert >= number)
    if unknown:
        yield _finding(
            "strategy.experts", f"Experts {write_runs(unknown)}, of which the model has {number}",
            f"experts 0-{number - 1}", write_runs(unknown),
        )  # fmt: skip
    absent = absent_ranks(subject, plan)
    held = placed_layers(subject)
    keys = ["layer", "expert", "rank"]
    wanted = plan.experts.filter(~pl.col("rank").is_in(absent)).join(held, on=["layer", "rank"], how="semi")
    lost = wanted.join(placed, on=keys, how="anti")
    strange = placed.join(plan.experts, on=keys, how="anti").filter(pl.col("expert") < number)
    strange = strange.join(plan.layers, on=["layer", "rank"], how="semi")
    for rows, absent_everywhere in ((lost, True), (strange, False)):
        if rows.is_empty():
            continue
        pairs = rows.select("layer", "expert").unique()
        shown = pairs["expert"].unique().sort().to_list()
        where = pairs["layer"].unique().sort().to_list()
        ranks = rows["rank"].unique().sort().to_list()
        first = rows.sort(keys).row(0, named=True)
        home = plan.expectation.ranks_of_expert[plan.expectation.stage_of_layer[first["layer"]]][first["expert"]]
        verb = "missing from" if absent_everywhere else "on"
        yield _finding(
            "strategy.experts",
            f"{len(pairs)} of {number * len(layers)} (layer, expert) pairs are {verb} "
            + ("ranks that hold them" if absent_everywhere else "ranks that do not hold them")
            + f": experts {write_runs(shown)} of layers {write_runs(where)}",
            f"expert {first['expert']} of layer {first['layer']} on ranks {write_runs(home)}",
            ("not" if absent_everywhere else "also") + f" on rank {first['rank']}",
            ranks=tuple(ranks), layers=tuple(where),
        )  # fmt: skip
