"""Ranks, layers, experts, groups and coordinates that are lost, moved or called by another name."""

from __future__ import annotations

import random
from dataclasses import replace

import polars as pl

from audit_mutations.original import Mutant, Original, UnfitError, kind


@kind("drop a rank")
def _(original: Original, rng: random.Random) -> Mutant:
    rank = rng.randrange(original.world_size)
    tables = original.without(original.tables.nodes.filter(pl.col("rank") == rank)["node"], heal=False)
    tables = replace(tables, participants=tables.participants.filter(pl.col("rank") != rank))
    return Mutant(tables=tables, checks=("strategy.ranks",), rank=rank)


@kind("a rank too many")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.pick(rng, original.roles)
    extra = original.world_size + rng.randrange(3)
    nodes = original.tables.nodes.with_columns(
        rank=pl.when(pl.col("node") == row["node"]).then(extra).otherwise("rank").cast(pl.Int32)
    )
    return Mutant(tables=replace(original.tables, nodes=nodes), checks=("strategy.ranks",), rank=extra)


@kind("drop a layer")
def _(original: Original, rng: random.Random) -> Mutant:
    layer = rng.choice(original.roles.filter(pl.col("layer") >= 0)["layer"].unique().sort().to_list())
    nodes = original.tables.nodes.filter(pl.col("layer") == layer)["node"]
    return Mutant(tables=original.without(nodes, heal=False), checks=("strategy.layers",), layer=layer)


@kind("drop a layer on one rank")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.pick(rng, original.roles.filter(pl.col("layer") >= 0))
    own = (pl.col("layer") == row["layer"]) & (pl.col("rank") == row["rank"])
    tables = original.without(original.tables.nodes.filter(own)["node"], heal=False)
    return Mutant(tables=tables, checks=("strategy.layers",), layer=row["layer"], rank=row["rank"])


@kind("move a layer to another stage")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.pick(rng, original.roles.filter(pl.col("layer") >= 0))
    stages = dict(original.tables.ranks.select("rank", "pp").iter_rows())
    others = [rank for rank, stage in stages.items() if stage != stages[row["rank"]]]
    if not others:
        raise UnfitError
    there = rng.choice(others)
    own = (pl.col("layer") == row["layer"]) & (pl.col("rank") == row["rank"])
    nodes = original.tables.nodes.with_columns(rank=pl.when(own).then(there).otherwise("rank").cast(pl.Int32))
    return Mutant(
        tables=replace(original.tables, nodes=nodes), checks=("strategy.layers",), layer=row["layer"], rank=there
    )


@kind("drop an expert")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.pick(rng, original.roles.filter(pl.col("expert") >= 0))
    own = (pl.col("layer") == row["layer"]) & (pl.col("expert") == row["expert"])
    tables = original.without(original.tables.nodes.filter(own)["node"], heal=rng.random() < 0.5)
    return Mutant(tables=tables, checks=("strategy.experts",), layer=row["layer"])


@kind("sampled experts")
def _(original: Original, rng: random.Random) -> Mutant:
    experts = original.roles.filter(pl.col("expert") >= 0)["expert"].unique().sort().to_list()
    if len(experts) < 2:
        raise UnfitError
    gone = rng.sample(experts, len(experts) // 2)
    nodes = original.tables.nodes.filter(pl.col("expert").is_in(gone))["node"]
    return Mutant(tables=original.without(nodes, heal=False), checks=("strategy.experts",))


@kind("move an expert to another rank")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.pick(rng, original.roles.filter(pl.col("expert") >= 0))
    same = original.roles.filter((pl.col("expert") == row["expert"]) & (pl.col("layer") == row["layer"]))
    holders = set(same["rank"])
    stages = dict(original.tables.ranks.select("rank", "pp").iter_rows())
    others = [rank for rank, stage in stages.items() if stage == stages[row["rank"]] and rank not in holders]
    if not others:
        raise UnfitError
    there = rng.choice(others)
    own = (pl.col("layer") == row["layer"]) & (pl.col("expert") == row["expert"]) & (pl.col("rank") == row["rank"])
    nodes = original.tables.nodes.with_columns(rank=pl.when(own).then(there).otherwise("rank").cast(pl.Int32))
    tables = replace(original.tables, nodes=nodes)
    return Mutant(tables=tables, checks=("strategy.experts",), layer=row["layer"], rank=there)


@kind("call an expert by another's number")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.pick(rng, original.roles.filter(pl.col("expert") >= 0))
    experts = original.roles.filter(pl.col("expert") >= 0)["expert"].unique().to_list()
    other = rng.choice([expert for expert in experts if expert != row["expert"]])
    own = (pl.col("layer") == row["layer"]) & (pl.col("expert") == row["expert"]) & (pl.col("rank") == row["rank"])
    nodes = original.tables.nodes.with_columns(expert=pl.when(own).then(other).otherwise("expert").cast(pl.Int32))
    tables = replace(original.tables, nodes=nodes)
    return Mutant(tables=tables, checks=("strategy.experts",), layer=row["layer"], rank=row["rank"])


@kind("swap ranks in the table of groups")
def _(original: Original, rng: random.Random) -> Mutant:
    groups = original.tables.groups.with_columns(size=pl.col("ranks").list.len())
    axes = groups.filter(pl.col("axis").is_in(["tp", "pp", "dp", "ep", "edp"]) & (pl.col("size") > 1))
    row = original.pick(rng, axes)
    several = axes.filter(pl.col("axis") == row["axis"])
    if several["ranks"].n_unique() < 2:
        raise UnfitError
    others = sorted({rank for ranks in several["ranks"] for rank in ranks} - set(row["ranks"]))
    out, there = rng.choice(list(row["ranks"])), rng.choice(others)
    broken = [there if rank == out else rank for rank in row["ranks"]]
    same = pl.col("axis").eq(row["axis"]) & pl.Series(
        [list(ranks) == list(row["ranks"]) for ranks in original.tables.groups["ranks"]]
    )
    changed = original.tables.groups.with_columns(
        ranks=pl.when(same).then(pl.lit(broken, dtype=pl.List(pl.Int64))).otherwise("ranks")
    )
    return Mutant(tables=replace(original.tables, groups=changed), checks=("strategy.groups",), rank=there)


@kind("swapped coordinates")
def _(original: Original, rng: random.Random) -> Mutant:
    ranks = original.tables.ranks
    axes = [axis for axis in ("tp", "ep", "pp", "dp", "edp") if (ranks[axis] >= 0).all() and ranks[axis].n_unique() > 1]
    if not axes:
        raise UnfitError
    axis = rng.choice(axes)
    rank = rng.randrange(len(ranks))
    other = rng.choice([place for place in ranks[axis].unique() if place != ranks[axis][rank]])
    changed = ranks.with_columns(
        pl.when(pl.col("rank") == rank).then(other).otherwise(axis).cast(ranks[axis].dtype).alias(axis)
    )
    return Mutant(tables=replace(original.tables, ranks=changed), checks=("strategy.coordinates",), rank=rank)
