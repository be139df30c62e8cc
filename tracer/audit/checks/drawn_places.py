"""Parts that a drawing shows on some ranks of their stage only: QKV on GPU 0 and 1 of 128."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import polars as pl

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.findings import Finding, write_count
from truedag.tracer.audit.plan import Plan
from truedag.tracer.audit.subject import Subject

_SHOWN = 4


def check_places(subject: Subject, plan: Plan, roles: Sequence[str], check: str) -> Iterator[Finding]:
    """Yield the parts of a check that are on fewer ranks of their stage than the drawing shows there.

    Which ranks hold an expert is `strategy.experts`'s; a part of which some node does not say where it is may be
    everywhere.
    """
    ahead = subject.covers.filter(
        pl.col("role").is_in([role for role in roles if not role.startswith("expert ")]),
        ~pl.col("phase").fill_null("").is_in(["backward", "optimizer"]),
    ).select("node", "role", "layer").unique()  # fmt: skip
    placed = ahead.join(subject.where, on="node").select("role", "layer", "rank").unique()
    untold = ahead.join(subject.where, on="node", how="anti").select("role", "layer").unique()
    placed = placed.join(untold, on=["role", "layer"], how="anti")
    if placed.is_empty():
        return
    expectation = plan.expectation
    shown = set(subject.where["rank"])
    stages = pl.DataFrame(
        [
            (stage, rank)
            for stage in sorted(set(expectation.stage_of_layer))
            for rank in expectation.ranks_of_stage(stage)
            if rank in shown
        ],
        schema={"stage": pl.Int32, "rank": pl.Int32}, orient="row",
    )  # fmt: skip
    sizes = stages.group_by("stage").agg(there=pl.len())
    counted = placed.join(stages, on="rank").group_by("role", "layer", "stage").agg(pl.len(), pl.col("rank"))
    few = counted.join(sizes, on="stage").filter(pl.col("len") < pl.col("there"))
    alike: dict[tuple[int, tuple[int, ...]], dict[str, set[int]]] = {}
    for role, layer, stage, ranks in (
        few.sort("stage", "layer", "role").select("role", "layer", "stage", "rank").iter_rows()
    ):
        alike.setdefault((stage, tuple(sorted(ranks))), {}).setdefault(role, set()).add(layer)
    for number, ((stage, ranks), told) in enumerate(alike.items()):
        if number == _SHOWN:
            title = f"{write_count(len(alike) - _SHOWN, 'further set')} of ranks with some of these parts only"
            yield _finding(check, title, "each part on all ranks of its stage", "on some", (), ())
            return
        whole = expectation.ranks_of_stage(stage)
        layers = sorted({layer for found in told.values() for layer in found if layer >= 0})
        names = list(dict.fromkeys(told))
        what = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        inside = f" of layers {write_runs(layers)}" if layers else ""
        yield _finding(
            check, f"{what[:1].upper()}{what[1:]}{inside}: on {len(ranks)} of {len(whole)} ranks of stage {stage}",
            f"ranks {write_runs(whole)}", f"ranks {write_runs(ranks)}", ranks, layers,
        )  # fmt: skip


def _finding(check: str, title: str, expected: str, found: str, ranks: Sequence[int], layers: Sequence[int]) -> Finding:
    return Finding(
        check=check, title=title, expected=expected, found=found,
        fix="Say of each part that it is on all ranks of its stage, or draw it on those that are missing.",
        severity=CHECKS[check].severity, ranks=tuple(ranks), layers=tuple(layers),
    )  # fmt: skip
