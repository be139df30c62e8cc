"""Shapes that do not fit: of operators, their inputs, the shards and the tokens of an expert."""

from __future__ import annotations

import random
from dataclasses import replace

import polars as pl

from audit_mutations.original import Mutant, Original, UnfitError, kind

_PRODUCTS = ("QKV projection", "output projection", "router", "attention scores", "attention context", "head")


@kind("a wrong output shape")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.role(rng, *_PRODUCTS, "expert first layer", "expert second layer")
    if row["op"] not in ("aten::mm", "aten::bmm"):
        raise UnfitError
    head, _, last = str(row["outputs"]).rpartition(",")
    wrong = f"{head},{int(last[:-1]) * 2}]"
    nodes = original.tables.nodes.with_columns(
        outputs=pl.when(pl.col("node") == row["node"]).then(pl.lit(wrong)).otherwise("outputs")
    )
    layer = row["layer"] if row["layer"] >= 0 else None
    return Mutant(tables=replace(original.tables, nodes=nodes), checks=("dimension.operator",), layer=layer)


@kind("a wrong input shape")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.role(rng, *_PRODUCTS)
    first, *others = str(row["inputs"]).split(" ")
    head, _, last = first.rpartition(",")
    wrong = " ".join([f"{head},{int(last[:-1]) + 3}]", *others])
    nodes = original.tables.nodes.with_columns(
        inputs=pl.when(pl.col("node") == row["node"]).then(pl.lit(wrong)).otherwise("inputs")
    )
    return Mutant(tables=replace(original.tables, nodes=nodes), checks=("dimension.edge",), rank=row["rank"])


@kind("a wrong shard")
def _(original: Original, rng: random.Random) -> Mutant:
    matrices = original.tables.nodes.filter(
        (pl.col("kind") == "parameter") & pl.col("label").str.contains(r"(linear_\w+|router|embeddings)\.weight$")
    )
    row = original.pick(rng, matrices)
    head, _, last = str(row["outputs"]).rpartition(",")
    wrong = f"{head},{int(last[:-1]) * 2}]"
    nodes = original.tables.nodes.with_columns(
        outputs=pl.when(pl.col("node") == row["node"]).then(pl.lit(wrong)).otherwise("outputs")
    )
    tables = replace(original.tables, nodes=nodes)
    return Mutant(tables=tables, checks=("dimension.shard",), rank=row["rank"])


@kind("lost tokens")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.role(rng, "expert first layer", phases=("forward",))
    if row["expert"] < 0:
        raise UnfitError
    rows = int(str(row["inputs"]).split("[")[1].split(",")[0])
    wrong = str(row["inputs"]).replace(f"[{rows},", f"[{rows + 5},", 1)
    nodes = original.tables.nodes.with_columns(
        inputs=pl.when(pl.col("node") == row["node"]).then(pl.lit(wrong)).otherwise("inputs")
    )
    tables = replace(original.tables, nodes=nodes)
    return Mutant(tables=tables, checks=("balance.tokens",), layer=row["layer"])
