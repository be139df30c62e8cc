"""Parts of the model that are lost, and the backward pass and the cache without what they need."""

from __future__ import annotations

import random
from dataclasses import replace

import polars as pl

from audit_mutations.original import Mutant, Original, UnfitError, kind


def _drop_role(original: Original, rng: random.Random, check: str, *roles: str, phases: tuple[str, ...] = ()) -> Mutant:
    """Remove all operators of a role in one layer, rank and pass."""
    row = original.role(rng, *roles, **({"phases": phases} if phases else {}))
    tables = original.without(original.same_operator(row), heal=rng.random() < 0.5)
    return Mutant(tables=tables, checks=(check,), layer=row["layer"] if row["layer"] >= 0 else None, rank=row["rank"])


@kind("drop a residual")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop_role(original, rng, "model.residual", "attention residual", "feed-forward residual")


@kind("a residual with one input")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.role(rng, "attention residual", "feed-forward residual")
    into = original.tables.edges.filter((pl.col("dst") == row["node"]) & (pl.col("kind") == "data"))
    source = original.pick(rng, into.filter(pl.col("dtype").is_not_null()))["src"]
    edges = original.tables.edges.filter(~((pl.col("dst") == row["node"]) & (pl.col("src") == source)))
    tables = replace(original.tables, edges=edges)
    return Mutant(tables=tables, checks=("model.residual",), layer=row["layer"])


@kind("drop a norm")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop_role(original, rng, "model.norm", "attention norm", "feed-forward norm")


@kind("drop the QKV projection")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop_role(original, rng, "model.attention", "QKV projection")


@kind("drop scores, softmax or context")
def _(original: Original, rng: random.Random) -> Mutant:
    roles = ("attention scores", "attention softmax", "attention context", "fused attention")
    return _drop_role(original, rng, "model.attention", *roles)


@kind("drop the output projection")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop_role(original, rng, "model.attention", "output projection")


@kind("drop router or choice")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop_role(original, rng, "model.feed-forward", "router", "top-k choice")


@kind("drop the aggregation of experts")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop_role(original, rng, "model.feed-forward", "expert aggregation")


@kind("drop a feed-forward layer")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop_role(original, rng, "model.feed-forward", "first layer", "activation", "second layer")


@kind("drop a part of an expert")
def _(original: Original, rng: random.Random) -> Mutant:
    roles = ("expert first layer", "expert activation", "expert second layer")
    return _drop_role(original, rng, "model.experts", *roles)


@kind("drop embedding, final norm or head")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop_role(original, rng, "model.ends", "embedding", "final norm", "head")


@kind("drop a weight's backward pass")
def _(original: Original, rng: random.Random) -> Mutant:
    roles = ("QKV projection", "output projection", "router", "head", "first layer", "expert second layer")
    return _drop_role(original, rng, "model.backward", *roles, phases=("backward",))


@kind("drop the backward pass")
def _(original: Original, rng: random.Random) -> Mutant:
    nodes = original.tables.nodes.filter(pl.col("phase") == "backward")["node"]
    if nodes.is_empty():
        raise UnfitError
    return Mutant(tables=original.without(nodes, heal=False), checks=("model.phases",))


@kind("drop decoding")
def _(original: Original, rng: random.Random) -> Mutant:
    nodes = original.tables.nodes.filter(pl.col("phase") == "decode")["node"]
    if nodes.is_empty():
        raise UnfitError
    return Mutant(tables=original.without(nodes, heal=False), checks=("model.phases",))


@kind("decoding without its cache")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.role(rng, "cache write", phases=("decode",))
    writes = original.roles.filter(pl.col("role") == "cache write")["node"]
    cut = (pl.col("dst") == row["node"]) & pl.col("src").is_in(writes.implode())
    tables = replace(original.tables, edges=original.tables.edges.filter(~cut))
    return Mutant(tables=tables, checks=("model.cache",), layer=row["layer"], rank=row["rank"])


@kind("no write into the cache")
def _(original: Original, rng: random.Random) -> Mutant:
    return _drop_role(original, rng, "model.cache", "cache write")


@kind("decoding without the sampled token")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.role(rng, "embedding", phases=("decode",))
    told = original.subject.nodes.select("node", "phase", "decode_step")
    inside = told.filter((pl.col("phase") == "decode") & (pl.col("decode_step") == row["decode_step"]))["node"]
    own = original.tables.nodes.filter(pl.col("rank") == row["rank"])["node"]
    outside = told.filter(pl.col("phase").is_not_null() & (pl.col("decode_step") < row["decode_step"]))["node"]
    cut = (
        pl.col("dst").is_in(inside.implode())
        & pl.col("dst").is_in(own.implode())
        & pl.col("src").is_in(outside.implode())
        & (pl.col("dtype") == "int64")
    )
    tables = replace(original.tables, edges=original.tables.edges.filter(~cut))
    return Mutant(tables=tables, checks=("model.cache",), rank=row["rank"])
