"""Checks of how evenly work is spread: layers over stages, experts over ranks, tokens over experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import polars as pl

from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.checks.strategy import absent_ranks, placed_experts, placed_layers
from truedag.tracer.audit.findings import Audit, Finding, write_count
from truedag.tracer.audit.plan import Plan
from truedag.tracer.audit.subject import Subject


def check_balance(subject: Subject, plan: Plan, audit: Audit) -> None:
    """Check how evenly work is spread."""
    if placed_layers(subject).is_empty():
        audit.skip("balance.layers", "no node says on which rank a layer is")
    else:
        audit.judge("balance.layers", _layers(subject, plan), write_count(plan.expectation.num_stages, "stage"))
    if not plan.expectation.num_experts:
        return
    if placed_experts(subject).is_empty():
        audit.skip("balance.experts", "no node says on which rank an expert is")
    else:
        audit.judge("balance.experts", _experts(subject), "experts of each rank")
    if subject.form == "dataset" and plan.expectation.tokens_per_pass is not None:
        rows = _rows_of_experts(subject)
        if rows.is_empty():
            audit.skip("balance.tokens", "experts run together in one operator, which does not say which they are")
        else:
            spread = f"an expert of a rank got {rows['rows'].min()!s} to {rows['rows'].max()!s} rows of a pass"
            audit.judge(
                "balance.tokens",
                _tokens(rows, plan, absent_ranks(subject, plan)),
                f"every layer of experts in every pass; {spread}",
            )


def _finding(check: str, title: str, expected: str, found: str, **where: tuple[int, ...]) -> Finding:
    return Finding(
        check=check, title=title, expected=expected, found=found, fix=CHECKS[check].fix,
        severity=CHECKS[check].severity, ranks=where.get("ranks", ()), layers=where.get("layers", ()),
    )  # fmt: skip


def _layers(subject: Subject, plan: Plan) -> Iterator[Finding]:
    stages = [place["pp"] for place in plan.expectation.coordinates]
    placed = placed_layers(subject).filter(pl.col("rank") < len(stages))
    stage_of = pl.DataFrame({"rank": range(len(stages)), "stage": stages}, schema_overrides={"rank": pl.Int32})
    counts = placed.join(stage_of, on="rank").group_by("stage").agg(pl.col("layer").n_unique()).sort("stage")
    if counts["layer"].n_unique() > 1:
        told = ", ".join(f"stage {stage}: {number}" for stage, number in counts.iter_rows())
        even = len(plan.expectation.stage_of_layer) / plan.expectation.num_stages
        yield _finding("balance.layers", f"Stages do not hold as many layers: {told}", f"{even:g} each", told)


def _experts(subject: Subject) -> Iterator[Finding]:
    counts = placed_experts(subject).group_by("layer", "rank").len()
    if counts["len"].n_unique() > 1:
        usual = counts["len"].mode().sort()[-1]
        odd = counts.filter(pl.col("len") != usual)
        row = odd.sort("layer", "rank").row(0, named=True)
        yield _finding(
            "balance.experts",
            f"{len(odd)} of {len(counts)} (layer, rank) pairs do not hold {usual} experts: rank {row['rank']} holds "
            f"{row['len']} of layer {row['layer']}",
            f"{usual} each", f"{counts['len'].min()!s} to {counts['len'].max()!s}",
            ranks=tuple(sorted(odd["rank"].unique())), layers=tuple(sorted(odd["layer"].unique())),
        )  # fmt: skip


def _rows_of_experts(subject: Subject) -> pl.DataFrame:
    """Return layer, microbatch, expert, rows of each first layer of an expert in the forward pass."""
    of_one = (pl.col("role") == "expert first layer") & (pl.col("expert") >= 0)
    first = subject.placed(of_one & (pl.col("phase") == "forward"))
    # Each of its ranks gives a row where rows stand for many; else it is on one rank.
    inputs = subject.nodes.select("node", "inputs")
    return first.join(inputs, on="node").select(
        "layer", "microbatch", "expert", rows=pl.col("inputs").str.extract(r"\[(\d+)").cast(pl.Int64)
    )


def _tokens(rows: pl.DataFrame, plan: Plan, absent: Sequence[int]) -> Iterator[Finding]:
    wanted = plan.expectation.tokens_per_pass
    sums = rows.group_by("layer", "microbatch").agg(pl.col("rows").sum(), experts=pl.col("expert").n_unique())
    wrong = sums.filter((pl.col("rows") != wanted) & (pl.col("experts") == plan.expectation.num_experts))
    # A missing rank's rows are missing in all layers of its stage.
    gone = {plan.expectation.coordinates[rank]["pp"] for rank in absent}
    of_gone = [plan.expectation.stage_of_layer[layer] in gone for layer in wrong["layer"]]
    for is_gone in (False, True):
        mine = wrong.filter(pl.Series(of_gone, dtype=pl.Boolean) == is_gone)
        if mine.is_empty():
            continue
        row = mine.sort("layer", "microbatch").row(0, named=True)
        yield _finding(
            "balance.tokens",
            f"In {len(mine)} passes of layers of experts, tokens are lost or doubled: {row['rows']} rows in layer "
            f"{row['layer']}, microbatch {row['microbatch']}, not {wanted}"
            + ("; ranks of its stage are missing" if is_gone else ""),
            f"{wanted} rows", f"{row['rows']}", layers=tuple(sorted(mine["layer"].unique())),
            ranks=tuple(absent) if is_gone else (),
        )  # fmt: skip
