"""Cycles, orphans, islands, doubled edges, and what comes from nowhere."""

from __future__ import annotations

import random
from dataclasses import replace

import polars as pl

from audit_mutations.original import Mutant, Original, UnfitError, kind


@kind("a cycle")
def _(original: Original, rng: random.Random) -> Mutant:
    edge = original.pick(rng, original.tables.edges)
    back = original.tables.edges.filter(
        (pl.col("src") == edge["src"]) & (pl.col("dst") == edge["dst"])
    ).head(1).with_columns(src=pl.lit(edge["dst"], pl.Int64), dst=pl.lit(edge["src"], pl.Int64))  # fmt: skip
    tables = replace(original.tables, edges=pl.concat([original.tables.edges, back]))
    return Mutant(tables=tables, checks=("structure.cycle",))


@kind("an orphan")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.pick(rng, original.roles)
    number = original.tables.nodes["node"].max() + 1
    copy = original.tables.nodes.filter(pl.col("node") == row["node"]).with_columns(node=pl.lit(number, pl.Int64))
    tables = replace(original.tables, nodes=pl.concat([original.tables.nodes, copy]))
    return Mutant(tables=tables, checks=("structure.orphan",), rank=row["rank"])


@kind("an edge drawn twice")
def _(original: Original, rng: random.Random) -> Mutant:
    readers = original.roles.select(dst="node")
    told = original.tables.edges.filter((pl.col("bytes") > 0) & (pl.col("kind") == "data")).join(readers, on="dst")
    edge = original.pick(rng, told)
    same = original.tables.edges.filter((pl.col("src") == edge["src"]) & (pl.col("dst") == edge["dst"]))
    edges = pl.concat([original.tables.edges, *([same] * 4)])
    return Mutant(tables=replace(original.tables, edges=edges), checks=("structure.duplicate-edge",))


@kind("an output from nowhere")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.pick(rng, original.tables.nodes.filter(pl.col("kind") == "output"))
    edges = original.tables.edges.filter(pl.col("dst") != row["node"])
    number = original.tables.nodes["node"].max()
    spare = original.tables.edges.head(1).with_columns(src=pl.lit(row["node"], pl.Int64), dst=pl.lit(number, pl.Int64))
    kept = pl.concat([edges, spare]) if rng.random() < 0.5 and number > row["node"] else edges
    return Mutant(tables=replace(original.tables, edges=kept), checks=("structure.unreachable-output",))


@kind("an island")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.pick(rng, original.roles)
    number = original.tables.nodes["node"].max() + 1
    one = original.tables.nodes.filter(pl.col("node") == row["node"])
    pair = pl.concat([one.with_columns(node=pl.lit(number + turn, pl.Int64)) for turn in range(2)])
    edge = original.tables.edges.head(1).with_columns(src=pl.lit(number, pl.Int64), dst=pl.lit(number + 1, pl.Int64))
    tables = replace(
        original.tables,
        nodes=pl.concat([original.tables.nodes, pair]),
        edges=pl.concat([original.tables.edges, edge]),
    )
    return Mutant(tables=tables, checks=("structure.components",), rank=row["rank"])


@kind("an operator that reads from nowhere")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.role(rng, "QKV projection", "attention scores", "router", "expert first layer", "fused attention")
    read = original.tables.edges.filter(pl.col("src") == row["node"])
    if read.is_empty():
        raise UnfitError
    edges = original.tables.edges.filter(pl.col("dst") != row["node"])
    tables = replace(original.tables, edges=edges)
    return Mutant(tables=tables, checks=("structure.source",), rank=row["rank"])
