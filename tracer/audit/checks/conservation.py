"""Checks of both ends of what ranks exchange: each send has its receive, and what all gave is what all got.

Where a rank is missing altogether, its peers keep halves: they are told apart from all others and name that rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import polars as pl

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.checks.strategy import absent_ranks
from truedag.tracer.audit.findings import Finding
from truedag.tracer.audit.plan import Plan
from truedag.tracer.audit.subject import Subject, read_members


def unmatched_halves(subject: Subject, plan: Plan) -> Iterator[Finding]:
    """Yield sends without a receive, receives without a send, and what the graph's own maker could not join."""
    met = subject.edges.filter(pl.col("kind") == "p2p") if subject.messages is None else subject.messages
    peers = _absent_peers(plan, "pp", absent_ranks(subject, plan))
    for kind, end, other in (("send", "src", "receive"), ("recv", "dst", "send")):
        ends = subject.expand(subject.nodes.filter(pl.col("kind") == kind)["node"]).to_frame("node")
        alone = ends.join(met.select(node=end), on="node", how="anti")
        word = "send" if kind == "send" else "receive"
        beside = subject.where_of(alone["node"]).filter(pl.col("rank").is_in(list(peers)))["node"]
        lost = alone["node"].is_in(beside.implode())
        for is_lost in (False, True):
            nodes = alone["node"].filter(lost == is_lost)
            if nodes.is_empty():
                continue
            ranks = {*subject.ranks_of(nodes)}
            gone = {rank for one in ranks for rank in peers.get(one, ())} if is_lost else set[int]()
            yield Finding(
                check="communication.unmatched", title=f"{len(nodes)} {word}{'s' if len(nodes) > 1 else ''} without "
                f"{'their' if len(nodes) > 1 else 'its'} {other}"
                + (f" on {_write_ranks(gone)}, which {'is' if len(gone) == 1 else 'are'} missing" if gone else ""),
                expected=f"a {other} for each {word}",
                found=f"{len(nodes)} without", fix=CHECKS["communication.unmatched"].fix, severity="error",
                nodes=subject.name_nodes(nodes), num_nodes=len(nodes), ranks=tuple(sorted(ranks | gone)),
            )  # fmt: skip
    if subject.unmatched:
        yield Finding(
            check="communication.unmatched", title=f"{len(subject.unmatched)} communications that could not be joined "
            "when the graph was built", expected="all joined", found=subject.unmatched[0],
            fix=CHECKS["communication.unmatched"].fix, severity="error",
        )  # fmt: skip


def _absent_peers(plan: Plan, axis: str, gone: Sequence[int]) -> dict[int, set[int]]:
    """Return the absent ranks of a rank's group on an axis, for the ranks that have such."""
    absent = set(gone)
    groups = plan.expectation.groups.get(axis, ()) if absent else ()
    return {rank: absent & {*group} for group in groups if absent & {*group} for rank in group}


def _write_ranks(ranks: Iterable[int]) -> str:
    told = sorted(ranks)
    return f"rank{'' if len(told) == 1 else 's'} {write_runs(told)}"


def uneven_exchanges(subject: Subject, plan: Plan) -> Iterator[Finding]:
    """Yield collectives where what all gave is not what all got, by their kind."""
    whole = subject.communications.filter((pl.col("weight") == 1) & (pl.col("kind") != "message"))
    parts = subject.parts.filter(pl.col("send_bytes").is_not_null() & pl.col("recv_bytes").is_not_null())
    sums = parts.group_by("node").agg(
        size=pl.len(), gave=pl.col("send_bytes").sum(), got=pl.col("recv_bytes").sum(),
        least=(pl.col("recv_bytes") - pl.col("send_bytes")).min(),
        most=(pl.col("recv_bytes") - pl.col("send_bytes")).max(),
        give=pl.col("send_bytes"), get=pl.col("recv_bytes"),
    )  # fmt: skip
    rows = whole.join(sums, on="node").sort("node")
    ratio = (
        pl.when(pl.col("kind") == "all-gather")
        .then(pl.col("got") == pl.col("gave") * pl.col("size"))
        .when(pl.col("kind") == "reduce-scatter")
        .then(pl.col("gave") == pl.col("got") * pl.col("size"))
        .when(pl.col("kind") == "all-to-all")
        .then(pl.col("gave") == pl.col("got"))
        .when(pl.col("kind") == "all-reduce")
        .then((pl.col("least") == 0) & (pl.col("most") == 0) & (pl.col("give").list.n_unique() == 1))
        .otherwise(pl.lit(True))
    )
    gone = absent_ranks(subject, plan)
    peers = {axis: _absent_peers(plan, axis, gone) for axis in plan.expectation.groups} if gone else {}
    lost = [
        sorted({one for rank in read_members(members or "") for one in peers.get(axis, {}).get(rank, ())})
        for axis, members in rows.select("axis", "members").iter_rows()
    ]
    rows = rows.with_columns(lost=pl.Series(lost, dtype=pl.List(pl.Int64)))
    uneven = rows.filter(~ratio).with_columns(is_lost=pl.col("lost").list.len() > 0)
    for _, wrong in uneven.group_by("kind", "is_lost", maintain_order=True):
        first = wrong.row(0, named=True)
        without = sorted(wrong["lost"].explode(empty_as_null=False, keep_nulls=False).unique())
        yield Finding(
            check="communication.bytes",
            title=f"{len(wrong)} {first['kind']}{'' if len(wrong) == 1 else 's'} where what all gave is not what all "
            "got: "
            f"{first['gave']:,} bytes given, {first['got']:,} got, by {first['size']} rank"
            + ("" if first["size"] == 1 else "s") + (f", without {_write_ranks(without)}" if without else ""),
            expected=_RULES[first["kind"]], found=f"{first['gave']:,} given, {first['got']:,} got",
            fix=CHECKS["communication.bytes"].fix, severity="error", nodes=subject.name_nodes(wrong["node"]),
            num_nodes=len(wrong), ranks=tuple(sorted({*read_members(first["members"] or ""), *without})),
            layers=tuple(sorted(layer for layer in wrong["layer"].unique() if layer >= 0)),
        )  # fmt: skip


_RULES = {
    "all-gather": "each rank gets what all give",
    "reduce-scatter": "each rank gets its part of what each gives",
    "all-to-all": "all get together what all give",
    "all-reduce": "each rank gets as much as it gives, and all as much",
}
