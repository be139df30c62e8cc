"""Who makes the others wait, and with what.

Two looks at it. From the critical path: who came last to communications, how long the others waited there, and what
led to the late arrivals (`critical_path.py`). And by comparison: ranks of one pipeline stage have like work, so a rank
whose operators take longer than the median of its stage is slow, or has more to do; the operators with the largest
excess say which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from truedag.tracer.analysis.critical_path import CriticalPath
from truedag.tracer.analysis.dependencies import KINDS

_NUM_OPERATORS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowOperator:
    """Operators of one name and module kind on a rank: what they took beyond the median of the ranks of its stage."""

    op: str
    num: int
    excess_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """How a rank held others up; the times are over all recorded steps.

    Attributes:
        rank: the rank.
        num_last: communications that it came last to while another waited; None is unknown.
        waited_ns: how long the others waited in them, summed; None is unknown.
        late_for: what it was at while the last but one waited: compute, transfer, waiting or host; None is unknown.
        compute_ns: what its operators took, summed; None is unknown.
        excess_ns: how much more that is than the median of its stage (less, if it is negative).
        slow: the operators with the largest excess, the largest first.
    """

    rank: int
    num_last: int | None
    waited_ns: int | None
    late_for: str | None
    compute_ns: int | None
    excess_ns: int | None
    slow: tuple[SlowOperator, ...]


def find_stragglers(
    operators: pl.DataFrame, ranks: pl.DataFrame, paths: Sequence[CriticalPath] | None
) -> list[Straggler]:
    """Compare the ranks, whom the others waited for most first; ranks with unknown times have unknown figures.

    Args:
        operators: rank, op, start_ns, end_ns of operators; an unknown time is null.
        ranks: rank and pp.
        paths: of the recorded steps; None where there is none.
    """
    late: dict[int, tuple[int, int, str | None]] = {}
    if paths is not None:
        came = pl.concat([path.stragglers for path in paths])
        spent = [f"late_{kind}_ns" for kind in KINDS]
        totals = came.group_by("rank").agg(pl.len(), pl.col("waited_ns").sum(), *(pl.col(name).sum() for name in spent))
        for row in totals.iter_rows(named=True):
            most = max(KINDS, key=lambda kind: row[f"late_{kind}_ns"] or 0)
            late[row["rank"]] = (row["len"], row["waited_ns"], most if row[f"late_{most}_ns"] else None)
    stages = ranks.select("rank", "pp").sort("rank")
    unknown = operators.filter(pl.col("end_ns").is_null())["rank"].unique().to_list()
    took = pl.col("end_ns") - pl.col("start_ns")
    by_op = operators.join(stages, on="rank").group_by("pp", "rank", "op").agg(took.sum().alias("took"), num=pl.len())
    peers = by_op.select("pp", "rank").unique().join(by_op.select("pp", "op").unique(), on="pp")
    whole = peers.join(by_op, on=["pp", "rank", "op"], how="left").with_columns(pl.col("took", "num").fill_null(0))
    excess = whole.with_columns(excess=pl.col("took") - pl.col("took").median().over("pp", "op"))
    computed = excess.group_by("pp", "rank").agg(pl.col("took").sum())
    computed = computed.with_columns(excess=pl.col("took") - pl.col("took").median().over("pp"))
    told = {rank: (took, more) for rank, took, more in computed.select("rank", "took", "excess").iter_rows()}
    largest = excess.filter(pl.col("excess") > 0).sort("excess", "op", descending=[True, False])
    slow = largest.group_by("rank", maintain_order=True).head(_NUM_OPERATORS).partition_by("rank", as_dict=True)
    stragglers = []
    for rank in stages["rank"]:
        number, waited, cause = late.get(rank, (0, 0, None)) if paths is not None else (None, None, None)
        is_known = rank in told and rank not in unknown
        rows = slow[(rank,)].select("op", "num", "excess").iter_rows() if (rank,) in slow and is_known else ()
        stragglers.append(
            Straggler(
                rank=rank,
                num_last=number,
                waited_ns=waited,
                late_for=cause,
                compute_ns=told[rank][0] if is_known else None,
                excess_ns=round(told[rank][1]) if is_known else None,
                slow=tuple(SlowOperator(op=op, num=num, excess_ns=round(more)) for op, num, more in rows),
            )
        )
    return sorted(stragglers, key=lambda one: (-(one.waited_ns or 0), one.rank))
