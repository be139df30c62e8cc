"""Checks of what ranks exchange: each needed communication, on its groups, as often and as large as it must be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import polars as pl

from truedag.tracer.analysis.quantities import write_bytes, write_runs
from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.checks.conservation import uneven_exchanges, unmatched_halves
from truedag.tracer.audit.checks.regions import as_summed, summed_purposes
from truedag.tracer.audit.checks.strategy import absent_ranks
from truedag.tracer.audit.findings import Audit, Finding
from truedag.tracer.audit.plan import KEY, Plan
from truedag.tracer.audit.subject import Subject, read_members, tell_members

CHECK_OF_PURPOSE = {
    **dict.fromkeys(
        (
            "attention input", "attention output", "feed-forward input", "feed-forward output", "shared expert input",
            "shared expert output", "embedding", "head", "loss",
        ),
        "communication.tensor",
    ),
    **dict.fromkeys(("dispatch", "dispatch of weights", "token counts"), "communication.dispatch"),
    "combine": "communication.combine",
    "keys and values": "communication.context",
    **dict.fromkeys(
        ("expert input", "expert input of weights", "expert output"), "communication.expert-tensor"
    ),
    **dict.fromkeys(("activations", "activation gradients", "sampled tokens"), "communication.pipeline"),
    **dict.fromkeys(
        ("dense gradients", "expert gradients", "sequence gradients", "embedding gradients"), "communication.gradient"
    ),
    **dict.fromkeys(("dense parameters", "expert parameters"), "communication.optimizer"),
}  # fmt: skip
_CHAPTERS = (*dict.fromkeys(CHECK_OF_PURPOSE.values()),)
_PLACE = ("phase", "microbatch", "decode_step")
_ROUNDING = 0.01
# What surrounds an exchange tells dispatch from combine; over the wrong ranks it may tell the other.
_FAMILY = pl.col("purpose").replace({"combine": "dispatch"})


def check_communication(subject: Subject, plan: Plan, audit: Audit) -> None:
    """Check what ranks exchange, one communication at a time; for datasets, which tell all of it."""
    audit.judge("communication.unmatched", unmatched_halves(subject, plan), "every send and every receive")
    compared = _Compared(subject, plan)
    compared.pair("kind")
    compared.pair("members")
    for check, found in (("communication.kind", compared.kinds()), ("communication.group", compared.groups())):
        if compared.num_found:
            audit.judge(check, found, f"{compared.num_found:,} communications")
        else:
            audit.skip(check, "no communication is there")
    missing = [*compared.missing()]
    for chapter in _CHAPTERS:
        number = compared.num_required(chapter)
        if number:
            mine = (finding for finding in missing if finding.check == chapter)
            audit.judge(chapter, mine, f"{number:,} communications")
    sized = subject.communications.join(subject.parts, on="node", how="semi")
    if compared.num_required("communication.gradient"):
        reductions = sized.filter(pl.col("purpose").str.ends_with("gradients"))
        what = f"{len(reductions):,} gradient reductions"
        _judge_sizes(audit, "communication.gradient-twice", compared.twice(), reductions, what)
    audit.judge("communication.extra", compared.extra(), f"{len(subject.communications):,} communications")
    sizes = [*compared.sizes(), *uneven_exchanges(subject, plan)]
    _judge_sizes(audit, "communication.bytes", sizes, sized, f"{len(subject.parts):,} participants")


def _judge_sizes(audit: Audit, check: str, findings: Iterable[Finding], sized: pl.DataFrame, what: str) -> None:
    """Judge what needs bytes; a drawing need not tell them."""
    if sized.is_empty():
        audit.skip(check, "no communication tells its bytes")
    else:
        audit.judge(check, findings, what)


class _Compared:
    """Needed against found, key by key; what is paired is taken from both sides."""

    def __init__(self, subject: Subject, plan: Plan) -> None:
        self._subject = subject
        self._plan = plan
        gone = absent_ranks(subject, plan)
        found = subject.communications.filter(
            pl.col("purpose").is_null() | ~pl.col("purpose").is_in(list(plan.expectation.optional)),
            pl.col("members").fill_null("").str.contains("[,>]"),  # one rank alone exchanges nothing
        )
        summed = summed_purposes(subject)
        self._needed = _without(as_summed(plan.exact, summed), gone)
        self._summed = _without(as_summed(plan.totals, summed), gone)
        self._found = _touching(found, gone)
        self.num_found = len(self._found)
        keys = [pl.col(name) for name in KEY]
        grouped = self._found.group_by(keys).agg(weight=pl.col("weight").sum(), nodes=pl.col("node"))
        in_buckets = self._summed["purpose"].unique().implode()
        counted = grouped.filter(~pl.col("purpose").is_in(in_buckets) | pl.col("purpose").is_null())
        both = self._needed.join(counted, on=list(KEY), how="full", coalesce=True, nulls_equal=True).with_columns(
            pl.col("num").fill_null(0), pl.col("weight").fill_null(0)
        )
        self._equal = both.filter((pl.col("num") - pl.col("weight")).abs() <= _ROUNDING)
        self._less = both.filter(pl.col("weight") < pl.col("num") - _ROUNDING)
        self._more = both.filter(pl.col("weight") > pl.col("num") + _ROUNDING)
        self._totals = self._compare_totals()
        self._paired: dict[str, pl.DataFrame] = {}

    def _compare_totals(self) -> pl.DataFrame:
        """Sum up what each group reduced of a purpose; a head's gathers have a place, gradients have none."""
        found = self._found.filter(pl.col("purpose").is_in(self._summed["purpose"].unique().implode()))
        sent = self._subject.parts.group_by("node").agg(bytes=pl.col("send_bytes").max())
        found = found.join(sent, on="node", how="left")
        placed = self._summed.filter(pl.col("microbatch") >= 0)
        free = self._summed.filter(pl.col("microbatch") < 0)
        # Where one of them does not tell its bytes, their sum is not known.
        whole = pl.when(pl.col("bytes").is_not_null().all()).then(pl.col("bytes").sum())
        sums = (pl.col("weight").sum(), whole.alias("bytes"), pl.col("node").alias("nodes"))
        parts = []
        for rows in (placed, free):
            mine = found.filter(pl.col("purpose").is_in(rows["purpose"].unique().implode()))
            if rows is free:  # whenever it was reduced, it counts where its purpose is needed
                mine = mine.drop(_PLACE).join(free.select("purpose", *_PLACE).unique("purpose"), on="purpose")
            counted = mine.group_by(KEY).agg(*sums)
            joined = rows.join(counted, on=list(KEY), how="full", coalesce=True, nulls_equal=True)
            parts.append(joined.with_columns(pl.col("num", "weight").fill_null(0)))
        rows = pl.concat(parts, how="diagonal_relaxed")
        less = rows.filter(pl.col("weight") < pl.col("num"))
        strange = rows.filter(pl.col("num") == 0)
        self._less = pl.concat([self._less, less], how="diagonal_relaxed")
        self._more = pl.concat([self._more, strange], how="diagonal_relaxed")
        return rows.filter((pl.col("weight") >= pl.col("num")) & (pl.col("num") > 0))

    def num_required(self, check: str) -> int:
        """Return how many communications a check needs."""
        purposes = [purpose for purpose, chapter in CHECK_OF_PURPOSE.items() if chapter == check]
        return sum(
            int(rows.filter(pl.col("purpose").is_in(purposes))["num"].sum()) for rows in (self._needed, self._summed)
        )

    def pair(self, column: str) -> None:
        """Take out what is missing and there at once, but for one column."""
        on = ["family", *(name for name in KEY if name not in (column, "purpose"))]
        if self._less.is_empty() or self._more.is_empty():
            self._paired[column] = pl.DataFrame()
            return
        # In order, so that the same graph is told in the same words each time.
        less, more = (
            rows.sort(KEY, nulls_last=True)
            .with_columns(family=_FAMILY)
            .with_columns(turn=pl.int_range(pl.len()).over(on))
            for rows in (self._less, self._more)
        )
        pairs = less.join(
            more.select(*on, "turn", there=column, there_nodes="nodes"), on=[*on, "turn"], how="inner", nulls_equal=True
        )
        self._less = less.join(pairs, on=[*KEY], how="anti", nulls_equal=True).drop("turn", "family")
        self._more = more.join(
            pairs.select(*on, "turn", **{column: pl.col("there")}),
            on=[*on, column, "turn"],
            how="anti",
            nulls_equal=True,
        ).drop("turn", "family")
        self._paired[column] = pairs

    def kinds(self) -> Iterator[Finding]:
        """Yield what is of another kind."""
        for rows in _split(self._paired["kind"], ["purpose", "kind", "there", "phase"]):
            first = rows.row(0, named=True)
            yield self._finding(
                "communication.kind",
                f"{len(rows)} {first['purpose']} communications{_during(first)} are {first['there']}, "
                f"not {first['kind']}",
                f"{first['kind']} over {first['axis']}", first["there"], rows, rows["there_nodes"],
            )  # fmt: skip

    def groups(self) -> Iterator[Finding]:
        """Yield what is on other ranks."""
        for rows in _split(self._paired["members"], ["purpose", "kind", "phase"]):
            first = rows.row(0, named=True)
            there, wanted = tell_members(first["there"]), tell_members(first["members"])
            yield self._finding(
                "communication.group",
                f"{len(rows)} {first['purpose']} {_plural(first['kind'], len(rows))}{_during(first)} "
                f"{'is' if len(rows) == 1 else 'are'} over the wrong ranks: {there}, not {wanted}",
                f"{first['axis']} group {wanted}", there, rows, rows["there_nodes"],
            )  # fmt: skip

    def missing(self) -> Iterator[Finding]:
        """Yield what is not there."""
        for rows in _split(self._less, ["purpose", "kind", "phase"]):
            first = rows.row(0, named=True)
            number = round(float((rows["num"] - rows["weight"]).sum()), 2)
            of = self._needed if first["purpose"] in set(self._needed["purpose"]) else self._summed
            same = of.filter(pl.all_horizontal(pl.col(name) == first[name] for name in ("purpose", "kind", "phase")))
            needed = int(same["num"].sum())
            yield self._finding(
                CHECK_OF_PURPOSE[first["purpose"]],
                f"{number:g} of {needed:,} {first['purpose']} {_plural(first['kind'], needed)}{_during(first)} "
                f"over {first['axis']} {'is' if number == 1 else 'are'} missing{_among(rows)}",
                f"{needed:,}: " + _write_grid(same), f"{needed - number:g}", rows, rows["nodes"],
            )  # fmt: skip

    def twice(self) -> Iterator[Finding]:
        """Yield gradients of which more is reduced than there is."""
        more = self._totals.filter(pl.col("bytes") > pl.col("most"))
        more = more.filter(pl.col("purpose").str.ends_with("gradients"))
        repeated = more.filter(pl.col("bytes") >= 2 * pl.col("least"))
        for rows in _split(repeated, ["purpose", "kind"]):
            first = rows.row(0, named=True)
            yield self._finding(
                "communication.gradient-twice",
                f"{first['purpose'].capitalize()} are reduced {first['bytes'] / first['least']:.3g} times over "
                f"{first['axis']} in {len(rows)} groups",
                f"once, {write_bytes(first['least'])} a rank", write_bytes(first["bytes"]), rows, rows["nodes"],
            )  # fmt: skip

    def extra(self) -> Iterator[Finding]:
        """Yield what nobody needs."""
        for rows in _split(self._more, ["purpose", "kind", "phase"]):
            first = rows.row(0, named=True)
            number = round(float((rows["weight"] - rows["num"]).sum()), 2)
            kind = first["kind"]
            yield self._finding(
                "communication.extra",
                f"{number:g} {first['purpose'] or 'unexplained'} {_plural(kind, number)}{_during(first)} more than the "
                f"strategy needs{_among(rows)}",
                f"{int(rows['num'].sum())}", f"{float(rows['weight'].sum()):g}", rows, rows["nodes"],
            )  # fmt: skip

    def sizes(self) -> Iterator[Finding]:
        """Yield communications whose participants gave or got other bytes than they must."""
        rows = self._equal.filter(pl.col("send_bytes").is_not_null() | pl.col("recv_bytes").is_not_null())
        rows = rows.explode("nodes").rename({"nodes": "node"})
        parts = self._subject.parts.rename({"send_bytes": "gave", "recv_bytes": "got"})
        joined = rows.join(parts, on="node")
        wrong = joined.filter((pl.col("send_bytes") != pl.col("gave")) | (pl.col("recv_bytes") != pl.col("got")))
        for found in _split(wrong, ["purpose", "kind", "phase"]):
            first = found.row(0, named=True)
            sends = first["send_bytes"] is not None and first["send_bytes"] != first["gave"]
            wanted, got = (first["send_bytes"], first["gave"]) if sends else (first["recv_bytes"], first["got"])
            number = found["node"].n_unique()
            yield self._finding(
                "communication.bytes",
                f"{number} {first['purpose']} {_plural(first['kind'], number)}{_during(first)} "
                f"{'has' if number == 1 else 'have'} the wrong size: rank {first['rank']} "
                f"{'gives' if sends else 'gets'} {got:,} bytes, not {wanted:,}",
                f"{wanted:,} bytes", f"{got:,} bytes", found, found["node"].unique(maintain_order=True).implode(),
            )  # fmt: skip
        off = self._totals.filter((pl.col("bytes") < pl.col("least")) | (pl.col("bytes") > pl.col("most")))
        doubled = pl.col("purpose").str.ends_with("gradients") & (pl.col("bytes") >= 2 * pl.col("least"))
        for found in _split(off.filter(~doubled), ["purpose", "kind"]):
            first = found.row(0, named=True)
            yield self._finding(
                "communication.bytes",
                f"The {first['purpose']} communications over {first['axis']} have the wrong size in {len(found)} "
                f"groups: {first['bytes']:,} bytes a rank, not {first['least']:,}",
                f"{first['least']:,} bytes a rank in all", f"{first['bytes']:,}", found, found["nodes"],
            )  # fmt: skip

    def _finding(
        self, check: str, title: str, expected: str, found: str, rows: pl.DataFrame, nodes: pl.Series
    ) -> Finding:
        told = [rows["members"]]
        if "there" in rows.columns and check == "communication.group":
            told.append(rows["there"])
        ranks = {rank for column in told for members in column.drop_nulls().unique() for rank in read_members(members)}
        flat = nodes.explode(empty_as_null=False, keep_nulls=False) if nodes.dtype == pl.List else nodes
        layers = sorted(layer for layer in rows["layer"].drop_nulls().unique() if layer >= 0)
        return Finding(
            check=check, title=title, expected=expected, found=found, fix=CHECKS[check].fix,
            severity=CHECKS[check].severity, nodes=self._subject.name_nodes(flat), num_nodes=len(flat),
            ranks=tuple(sorted(ranks)), layers=tuple(layers),
        )  # fmt: skip


def _without(rows: pl.DataFrame, gone: Sequence[int]) -> pl.DataFrame:
    """Leave out what ranks that are not there at all would have taken part in: that is said once, of the ranks."""
    return rows if not gone else rows.filter(~_mentions(rows["members"], gone))


def _touching(rows: pl.DataFrame, gone: Sequence[int]) -> pl.DataFrame:
    """Leave out found groups that lack one of the absent ranks: their whole group is not looked at."""
    return rows if not gone else rows.filter(pl.col("members").is_not_null())


def _mentions(members: pl.Series, ranks: Sequence[int]) -> pl.Series:
    wanted = set(ranks)
    told = {text: bool(wanted & set(read_members(text))) for text in members.drop_nulls().unique()}
    return members.replace_strict(told, default=False, return_dtype=pl.Boolean)


def _split(rows: pl.DataFrame, by: Sequence[str]) -> list[pl.DataFrame]:
    return [] if rows.is_empty() else rows.partition_by(by, maintain_order=True)


def _during(row: dict[str, object]) -> str:
    return f" of the {row['phase']} pass" if row["phase"] in ("forward", "backward") else (
        f" of {row['phase']}" if row["phase"] else ""
    )  # fmt: skip


def _plural(kind: str, number: float) -> str:
    return kind if number == 1 else f"{kind}s"


def _among(rows: pl.DataFrame) -> str:
    parts = []
    layers = sorted(layer for layer in rows["layer"].drop_nulls().unique() if layer >= 0)
    if layers:
        parts.append(f"layer{'s' if len(layers) > 1 else ''} {write_runs(layers)}")
    batches = sorted(batch for batch in rows["microbatch"].drop_nulls().unique() if batch >= 0)
    if batches:
        parts.append(f"microbatch{'es' if len(batches) > 1 else ''} {write_runs(batches)}")
    members = sorted(rows["members"].drop_nulls().unique(), key=read_members)
    if members:
        parts.append(
            f"ranks {'; '.join(map(tell_members, members[:4]))}"
            + (f" and {len(members) - 4} more groups" if len(members) > 4 else "")
        )
    return f" ({', '.join(parts)})" if parts else ""


def _write_grid(rows: pl.DataFrame) -> str:
    parts = []
    layers = sum(1 for layer in rows["layer"].drop_nulls().unique() if layer >= 0)
    if layers:
        parts.append(f"{layers} layers")
    places = rows.select("microbatch", "decode_step").unique().height
    parts += [f"{places} passes", f"{rows['members'].n_unique()} groups"]
    num = int(rows["num"].max() or 1)  # type: ignore[arg-type]
    return " x ".join(parts) + (f" x {num}" if num > 1 else "")
