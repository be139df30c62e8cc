"""Checks of what is computed: every part of every layer on each of its ranks, residuals, the cache, the phases."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.checks.strategy import placed_experts, placed_layers
from truedag.tracer.audit.findings import Audit, Finding, write_count
from truedag.tracer.audit.plan import Plan
from truedag.tracer.audit.roles import ATTENTION_CORE, FUSED_ATTENTION
from truedag.tracer.audit.subject import Subject

CHECK_OF_ROLE = {
    **dict.fromkeys(("attention norm", "feed-forward norm"), "model.norm"),
    **dict.fromkeys(
        ("QKV projection", *ATTENTION_CORE, FUSED_ATTENTION, "output projection"), "model.attention"
    ),
    **dict.fromkeys(("attention residual", "feed-forward residual"), "model.residual"),
    **dict.fromkeys(
        (
            "first layer", "activation", "second layer", "router", "top-k choice", "expert aggregation",
            "shared expert first layer", "shared expert activation", "shared expert second layer",
        ),
        "model.feed-forward",
    ),
    **dict.fromkeys(("expert first layer", "expert activation", "expert second layer"), "model.experts"),
    **dict.fromkeys(("embedding", "final norm", "head"), "model.ends"),
    "cache write": "model.cache",
}  # fmt: skip
PRODUCTS_BACKWARD = 2
"""Matrix products of a weight in the backward pass: the gradient of its input, and its own."""

_ON = ["role", "layer", "phase", "expert", "rank"]


def check_model(subject: Subject, plan: Plan, audit: Audit) -> None:
    """Check what is computed, operator by operator; for datasets, which tell all of it."""
    if subject.covers.is_empty():
        for check in dict.fromkeys(CHECK_OF_ROLE.values()):
            audit.skip(check, "no module of the graph has a name by which a part of a transformer is known")
        return
    rows = _compare(subject, plan)
    for check in dict.fromkeys(CHECK_OF_ROLE.values()):
        roles = [role for role, chapter in CHECK_OF_ROLE.items() if chapter == check]
        wanted = plan.operators.filter(pl.col("role").is_in(roles) & (pl.col("phase") != "backward"))
        if wanted.is_empty():
            continue
        mine = rows.filter(pl.col("role").is_in(roles) & (pl.col("phase") != "backward"))
        findings = [*_missing(mine, plan, check)]
        if check == "model.residual":
            findings += single_residuals(subject)
        if check == "model.cache":
            findings += [*_chain(subject), *_tokens(subject)]
        audit.judge(check, findings, f"{wanted['role'].n_unique()} parts on {wanted['rank'].n_unique()} ranks")
    if "backward" in set(plan.num_places["phase"]):
        back = rows.filter(pl.col("phase") == "backward")
        audit.judge("model.backward", _missing(back, plan, "model.backward"), "the weights of every layer")
    audit.judge("model.phases", _phases(subject, plan), ", ".join(plan.num_places["phase"]))


def _compare(subject: Subject, plan: Plan) -> pl.DataFrame:
    """Return what runs less often than it must: role, layer, phase, expert, rank, found, num_places."""
    told = subject.placed()
    one_by_one = plan.operators.filter(pl.col("expert") >= 0)["role"].unique()
    told = told.with_columns(
        expert=pl.when(pl.col("role").is_in(one_by_one.implode())).then("expert").otherwise(pl.lit(-1, pl.Int32))
    )
    times = pl.when(pl.col("phase") == "backward").then(PRODUCTS_BACKWARD).otherwise(1)
    found = (
        told.group_by(*_ON, "microbatch", "decode_step")
        .agg(times=pl.col("node").n_unique())
        .group_by(_ON)
        .agg(found=pl.min_horizontal("times", times).sum().cast(pl.Int64))
    )
    wanted = plan.operators.join(plan.num_places, on="phase").with_columns(num_places=pl.col("num_places") * times)
    # What a whole layer or rank lacks is said of the layer or the rank.
    held = placed_layers(subject)
    ranks = pl.DataFrame({"rank": list(subject.present())}, schema={"rank": pl.Int32})
    wanted = pl.concat(
        [
            wanted.filter(pl.col("layer") >= 0).join(held, on=["layer", "rank"], how="semi"),
            wanted.filter(pl.col("layer") < 0).join(ranks, on="rank", how="semi"),
        ]
    )
    experts = placed_experts(subject)
    wanted = pl.concat(
        [
            wanted.filter(pl.col("expert") < 0),
            wanted.filter(pl.col("expert") >= 0).join(experts, on=["layer", "expert", "rank"], how="semi"),
        ]
    )
    rows = wanted.join(found, on=_ON, how="left").with_columns(pl.col("found").fill_null(0))
    return rows.filter(pl.col("found") < pl.col("num_places"))


def _missing(rows: pl.DataFrame, plan: Plan, check: str) -> Iterator[Finding]:
    by = ["phase"] if check == "model.backward" and rows["role"].n_unique() > 3 else ["role", "phase"]
    for part in [] if rows.is_empty() else rows.partition_by(by, maintain_order=True):
        roles = part["role"].unique(maintain_order=True).to_list()
        layers = sorted(layer for layer in part["layer"].unique() if layer >= 0)
        experts = sorted(expert for expert in part["expert"].unique() if expert >= 0)
        ranks = sorted(part["rank"].unique())
        number = int((part["num_places"] - part["found"]).sum())
        same = plan.operators.filter(pl.col("role").is_in(roles) & (pl.col("phase") == part["phase"][0]))
        needed = int(same.join(plan.num_places, on="phase")["num_places"].sum())
        needed *= PRODUCTS_BACKWARD if part["phase"][0] == "backward" else 1
        where = f" in layer{'s' if len(layers) > 1 else ''} {write_runs(layers)}" if layers else ""
        of = f" of expert{'s' if len(experts) > 1 else ''} {write_runs(experts)}" if experts else ""
        yield Finding(
            check=check,
            title=f"{number:,} of {needed:,} {' and '.join(roles)} operators of the {part['phase'][0]} pass are missing"
            f"{of}{where}, on ranks {write_runs(ranks)}",
            expected=f"{needed:,}: one for each layer, rank and pass" + (" and expert" if experts else ""),
            found=f"{needed - number:,}",
            fix=CHECKS[check].fix,
            severity=CHECKS[check].severity,
            ranks=tuple(ranks),
            layers=tuple(layers),
        )


def single_residuals(subject: Subject) -> Iterator[Finding]:
    """Yield residual additions with fewer than two inputs."""
    added = subject.nodes.filter(pl.col("role").is_in(["attention residual", "feed-forward residual"]))
    into = subject.edges.filter(pl.col("dst").is_in(added["node"].implode()) & (pl.col("bytes") > 0))
    degree = into.group_by(node="dst").agg(pl.col("src").n_unique())
    single = added.join(degree, on="node", how="left").filter(pl.col("src").fill_null(0) < 2)
    if len(single):
        nodes = subject.expand(single["node"])
        yield Finding(
            check="model.residual",
            title=f"{len(nodes)} residual addition{'s' if len(nodes) > 1 else ''} with fewer than two inputs",
            expected="two inputs: what enters and what was computed from it",
            found=" or ".join(map(str, sorted(single["src"].fill_null(0).unique()))),
            fix=CHECKS["model.residual"].fix,
            severity="error",
            nodes=subject.name_nodes(nodes),
            num_nodes=len(nodes),
            ranks=tuple(subject.ranks_of(nodes)),
            layers=tuple(sorted(layer for layer in single["layer"].unique() if layer >= 0)),
        )


def _chain(subject: Subject) -> Iterator[Finding]:
    """Each step's cache must depend on an earlier step's."""
    writes = subject.nodes.filter(pl.col("role") == "cache write")
    steps = writes.filter(pl.col("phase") == "decode").select("node", "layer", "decode_step", "microbatch")
    if steps.is_empty():
        return
    source = writes.select(src="node", from_layer="layer", from_step="decode_step")
    into = (
        subject.edges.filter(pl.col("bytes") > 0)
        .join(source, on="src")
        .join(steps.rename({"node": "dst"}), on="dst")
        .filter((pl.col("from_layer") == pl.col("layer")) & (pl.col("from_step") < pl.col("decode_step")))
    )
    lost = steps.join(into.select(node="dst").unique(), on="node", how="anti")
    if into.is_empty():
        lost = _unread(subject, steps, source)
    if len(lost):
        nodes = subject.expand(lost["node"])
        yield Finding(
            check="model.cache",
            title=f"{len(nodes)} of {len(subject.expand(steps['node']))} cache writes of decoding do not depend on an "
            "earlier step's",
            expected="an edge from the cache as the step before left it",
            found=f"none, in decode steps {write_runs(lost['decode_step'])}",
            fix=CHECKS["model.cache"].fix,
            severity="error",
            nodes=subject.name_nodes(nodes),
            num_nodes=len(nodes),
            ranks=tuple(subject.ranks_of(nodes)),
            layers=tuple(sorted(lost["layer"].unique())),
        )


def _unread(subject: Subject, steps: pl.DataFrame, source: pl.DataFrame) -> pl.DataFrame:
    """Return the writes of steps in which nothing reads what an earlier step wrote, where each has slots of its own."""
    place = ["rank", "layer", "decode_step", "microbatch"]
    decoding = subject.nodes.filter(pl.col("phase") == "decode")
    touched = pl.concat([decoding.select("node"), steps.select("node")]).unique()
    first_rank = subject.on_ranks(touched).group_by("node").agg(pl.col("rank").min())
    decoding = decoding.join(first_rank, on="node")
    read = (
        subject.edges.filter(pl.col("bytes") > 0)
        .join(source, on="src")
        .join(decoding.select(pl.col("node").alias("dst"), *place), on="dst")
        .filter((pl.col("from_layer") == pl.col("layer")) & (pl.col("from_step") < pl.col("decode_step")))
    )
    return steps.join(first_rank, on="node").join(read.select(place).unique(), on=place, how="anti")


def _tokens(subject: Subject) -> Iterator[Finding]:
    """Each decode step's embedding must depend on what came out of the step before: an edge across the steps."""
    told = subject.nodes.select("node", "phase", "decode_step", "layer")
    first = subject.nodes.filter((pl.col("role") == "embedding") & (pl.col("phase") == "decode"))
    passes = subject.told_of_ranks(first.select("node", "decode_step"))
    if passes.is_empty():
        return
    around = subject.on_ranks(told.filter((pl.col("phase") == "decode") & (pl.col("layer") < 0)))
    is_token = pl.lit(True) if subject.form == "drawing" else pl.col("type").str.starts_with("int64")
    across = (
        subject.edges.filter(is_token & (pl.col("bytes") > 0))
        .join(around.select(dst="node", rank="rank", decode_step="decode_step"), on="dst")
        .join(told.select(src="node", from_phase="phase", from_step="decode_step"), on="src")
        .filter(pl.col("from_phase").is_not_null() & (pl.col("from_step") < pl.col("decode_step")))
    )
    lost = passes.join(across.select("rank", "decode_step").unique(), on=["rank", "decode_step"], how="anti")
    if len(lost):
        yield Finding(
            check="model.cache",
            title=f"{write_count(lost['decode_step'].n_unique(), 'decode step')} of {lost['rank'].n_unique()} ranks "
            "do not depend on the token that was sampled last",
            expected="an edge from the sampled token into the embedding",
            found=f"none, in decode steps {write_runs(lost['decode_step'])}",
            fix=CHECKS["model.cache"].fix,
            severity="error",
            ranks=tuple(sorted(lost["rank"].unique())),
        )


def _phases(subject: Subject, plan: Plan) -> Iterator[Finding]:
    there = set(subject.covers["phase"].drop_nulls())
    for phase in plan.num_places["phase"]:
        if phase not in there:
            yield Finding(
                check="model.phases",
                title=f"No node belongs to the {phase} pass",
                expected=", ".join(plan.num_places["phase"]),
                found=", ".join(sorted(there)) or "no phase is told",
                fix=CHECKS["model.phases"].fix,
                severity="error",
            )
