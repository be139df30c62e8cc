"""Communications that are lost, doubled, changed or between other ranks."""

from __future__ import annotations

import random
from dataclasses import replace

import polars as pl

from audit_mutations.original import Mutant, Original, UnfitError, kind
from truedag.tracer.audit.recorded import Tables


def _ids(*nodes: object) -> pl.Series:
    return pl.Series(nodes, dtype=pl.Int64)


def _drop(original: Original, rng: random.Random, row: dict, *checks: str) -> Mutant:
    """Remove one communication."""
    tables = original.without(_ids(row["node"]), heal=rng.random() < 0.5)
    layer = row["layer"] if row["layer"] >= 0 else None
    return Mutant(tables=tables, checks=checks, layer=layer)


@kind("drop a dispatch")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop(original, rng, original.purpose(rng, "dispatch"), "communication.dispatch")


@kind("drop the weights' dispatch")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop(original, rng, original.purpose(rng, "dispatch of weights"), "communication.dispatch")


@kind("drop the exchange of token counts")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop(original, rng, original.purpose(rng, "token counts"), "communication.dispatch")


@kind("drop a combine")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop(original, rng, original.purpose(rng, "combine"), "communication.combine")


@kind("drop a gathering within an expert")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.purpose(rng, "expert input", "expert output", "expert input of weights")
    return _drop(original, rng, row, "communication.expert-tensor")


@kind("drop a communication of attention")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop(original, rng, original.purpose(rng, "attention input", "attention output"), "communication.tensor")


@kind("drop a communication of the feed-forward")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.purpose(rng, "feed-forward input", "feed-forward output", "shared expert input")
    return _drop(original, rng, row, "communication.tensor")


@kind("drop a communication of embedding, head or loss")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop(original, rng, original.purpose(rng, "embedding", "head", "loss"), "communication.tensor")


@kind("drop the tensor dimension")
def _(original: Original, rng: random.Random) -> Mutant:
    nodes = original.met.filter((pl.col("axis") == "tp") & pl.col("members").str.contains(","))["node"]
    if nodes.is_empty():
        raise UnfitError
    return Mutant(tables=original.without(nodes, heal=True), checks=("communication.tensor",))


@kind("drop a dense gradient reduction")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop(
        original, rng, original.purpose(rng, "dense gradients"), "communication.gradient", "communication.bytes"
    )


@kind("drop an expert gradient reduction")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.purpose(rng, "expert gradients")
    return _drop(original, rng, row, "communication.gradient", "communication.bytes")


@kind("drop a reduction of the norms' gradients")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.purpose(rng, "sequence gradients", "embedding gradients")
    return _drop(original, rng, row, "communication.gradient")


@kind("drop a gathering of parameters")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.purpose(rng, "dense parameters", "expert parameters")
    return _drop(original, rng, row, "communication.optimizer", "communication.bytes")


def _copied(original: Original, node: object, **changes: object) -> Tables:
    """Return the tables with a copy of a communication, read by what reads the first."""
    tables = original.tables
    number = tables.nodes["node"].max() + 1
    copy = tables.nodes.filter(pl.col("node") == node).with_columns(
        node=pl.lit(number, pl.Int64), **{name: pl.lit(value) for name, value in changes.items()}
    )
    into = tables.edges.filter(pl.col("dst") == node).with_columns(dst=pl.lit(number, pl.Int64))
    return replace(
        tables,
        nodes=pl.concat([tables.nodes, copy.cast(tables.nodes.schema)]),
        edges=pl.concat([tables.edges, into]),
        participants=pl.concat(
            [
                tables.participants,
                tables.participants.filter(pl.col("node") == node).with_columns(node=pl.lit(number, pl.Int64)),
            ]
        ),
    )


@kind("reduce a gradient twice")
def _(original: Original, rng: random.Random) -> Mutant:
    purposes = ["dense gradients", "expert gradients", "sequence gradients"]
    met = original.met.filter(pl.col("purpose").is_in(purposes) & pl.col("members").str.contains(","))
    alone = met.filter(pl.len().over("purpose", "members") == 1)
    row = original.pick(rng, alone)
    return Mutant(tables=_copied(original, row["node"]), checks=("communication.gradient-twice",))


@kind("an all-reduce too many")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.purpose(rng, "attention output", "feed-forward output", "loss")
    tables = _copied(original, row["node"], op="c10d::allreduce_", label="all-reduce tp")
    number = tables.nodes["node"].max()
    parts = tables.participants.with_columns(
        recv_bytes=pl.when(pl.col("node") == number).then("send_bytes").otherwise("recv_bytes")
    )
    layer = row["layer"] if row["layer"] >= 0 else None
    return Mutant(tables=replace(tables, participants=parts), checks=("communication.extra",), layer=layer)


@kind("drop a send")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.purpose(rng, "activations", "activation gradients", "sampled tokens")
    return Mutant(tables=original.without(_ids(row["node"]), heal=False), checks=("communication.unmatched",))


@kind("drop a receive")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.pick(rng, original.tables.nodes.filter(pl.col("kind") == "recv"))
    return Mutant(tables=original.without(_ids(row["node"]), heal=False), checks=("communication.unmatched",))


@kind("drop a message")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.purpose(rng, "activations", "activation gradients", "sampled tokens")
    other = original.tables.edges.filter((pl.col("src") == row["node"]) & (pl.col("kind") == "p2p"))["dst"][0]
    tables = original.without(_ids(row["node"], other), heal=rng.random() < 0.5)
    return Mutant(tables=tables, checks=("communication.pipeline",))


@kind("drop one direction of the pipeline")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.purpose(rng, "activations", "activation gradients")
    sends = original.met.filter(pl.col("purpose") == row["purpose"])["node"]
    received = original.tables.edges.filter(pl.col("src").is_in(sends.implode()) & (pl.col("kind") == "p2p"))["dst"]
    tables = original.without(sends.append(received), heal=True)
    return Mutant(tables=tables, checks=("communication.pipeline",))


def _swap(original: Original, rng: random.Random, row: dict) -> Mutant:
    """Put another rank in the place of one of a communication's, of the same stage if there is one."""
    members = [int(rank) for rank in str(row["members"]).split(",")]
    stages = dict(original.tables.ranks.select("rank", "pp").iter_rows())
    others = [rank for rank in range(original.world_size) if rank not in members and stages[rank] == stages[members[0]]]
    if not others:
        others = [rank for rank in range(original.world_size) if rank not in members]
    if not others:
        raise UnfitError
    out, there = rng.choice(members), rng.choice(others)
    swapped = pl.when((pl.col("node") == row["node"]) & (pl.col("rank") == out)).then(there).otherwise("rank")
    parts = original.tables.participants.with_columns(rank=swapped.cast(original.tables.participants["rank"].dtype))
    tables = replace(original.tables, participants=parts)
    return Mutant(tables=tables, checks=("communication.group",), rank=there)


@kind("swap ranks between groups")
def _(original: Original, rng: random.Random) -> Mutant:
    return _swap(original, rng, original.purpose(rng, "attention output", "dispatch", "combine", "attention input"))


@kind("reduce a gradient over another group")
def _(original: Original, rng: random.Random) -> Mutant:
    return _swap(original, rng, original.purpose(rng, "dense gradients", "expert gradients", "sequence gradients"))


@kind("another kind of communication")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.purpose(rng, "attention input", "attention output", "feed-forward input", "feed-forward output")
    if row["phase"] == "backward" and row["purpose"] == "attention input":
        raise UnfitError  # it is both kinds there
    ops = {
        "all-gather": "c10d::allreduce_",
        "reduce-scatter": "c10d::allreduce_",
        "all-reduce": "c10d::_allgather_base_",
    }
    nodes = original.tables.nodes.with_columns(
        op=pl.when(pl.col("node") == row["node"]).then(pl.lit(ops[row["kind"]])).otherwise("op")
    )
    return Mutant(tables=replace(original.tables, nodes=nodes), checks=("communication.kind",), layer=row["layer"])


@kind("wrong bytes")
def _(original: Original, rng: random.Random) -> Mutant:
    told = original.met.filter(pl.col("purpose") != "optimizer").filter(
        pl.col("weight").eq(1) & pl.col("members").str.contains("[,>]")
    )
    row = original.pick(rng, told)
    factor = rng.choice([2, 4, 8])
    parts = original.tables.participants.with_columns(
        send_bytes=pl.when(pl.col("node") == row["node"])
        .then(pl.col("send_bytes") * factor + 4)
        .otherwise("send_bytes")
    )
    tables = replace(original.tables, participants=parts)
    return Mutant(tables=tables, checks=("communication.bytes", "communication.gradient-twice"))


@kind("a communication that was not joined")
def _(original: Original, rng: random.Random) -> Mutant:
    told = f"group {rng.randrange(9)}, all-reduce number {rng.randrange(99)}: rank {rng.randrange(9)} is missing"
    tables = replace(original.tables, meta={**original.tables.meta, "unmatched": [told]})
    return Mutant(tables=tables, checks=("communication.unmatched",))
