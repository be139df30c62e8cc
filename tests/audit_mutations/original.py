"""The true graph that mutants are made from, what a mutant is, and the register of the kinds of faults."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import polars as pl

from truedag.tracer.audit.recorded import Tables, subject_of
from truedag.tracer.audit.subject import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A graph with one fault, and what an audit must say of it."""

    tables: Tables
    checks: tuple[str, ...]
    """One of these must be among the findings."""

    layer: int | None = None
    """A finding of the check must name this layer."""

    rank: int | None = None
    """And this rank."""


class UnfitError(Exception):
    """The graph has no place for this kind of fault."""


class Original:
    """A true graph that mutants are made from."""

    def __init__(self, tables: Tables, world_size: int) -> None:
        self.tables = tables
        self.world_size = world_size
        self.subject: Subject = subject_of(tables, name="original")
        self.roles = self.subject.nodes.filter(pl.col("role").is_not_null()).join(
            tables.nodes.select("node", "rank"), on="node"
        )
        self.met = self.subject.communications

    def pick(self, rng: random.Random, rows: pl.DataFrame) -> dict[str, object]:
        """Return a random row."""
        if rows.is_empty():
            raise UnfitError
        return rows.row(rng.randrange(len(rows)), named=True)

    def role(self, rng: random.Random, *roles: str, phases: tuple[str, ...] = ("forward", "prefill", "decode")) -> dict:
        """Return a random operator of some roles."""
        return self.pick(rng, self.roles.filter(pl.col("role").is_in(roles) & pl.col("phase").is_in(phases)))

    def purpose(self, rng: random.Random, *purposes: str) -> dict:
        """Return a random communication of some purposes, between at least two ranks."""
        several = pl.col("members").str.contains("[,>]")
        return self.pick(rng, self.met.filter(pl.col("purpose").is_in(purposes) & several))

    def same_operator(self, row: dict) -> pl.Series:
        """Return the nodes of an operator's role in the same layer, expert, rank and pass."""
        names = ("role", "layer", "expert", "rank", "phase", "microbatch", "decode_step")
        return self.roles.filter(pl.all_horizontal(pl.col(name) == row[name] for name in names))["node"]

    def without(self, nodes: pl.Series, *, heal: bool) -> Tables:
        """Return the tables without some nodes; `heal` joins what they joined."""
        tables = self.tables
        gone = nodes.implode()
        edges = tables.edges
        kept = edges.filter(~pl.col("src").is_in(gone) & ~pl.col("dst").is_in(gone))
        if heal:
            into = edges.filter(pl.col("dst").is_in(gone) & ~pl.col("src").is_in(gone)).select("src", via="dst")
            out = edges.filter(pl.col("src").is_in(gone) & ~pl.col("dst").is_in(gone)).rename({"src": "via"})
            joined = into.join(out, on="via").filter(pl.col("kind") != "p2p")
            kept = pl.concat([kept, joined.select(kept.columns).unique(["src", "dst", "dtype", "shape"])])
        return replace(
            tables,
            nodes=tables.nodes.filter(~pl.col("node").is_in(gone)),
            edges=kept,
            participants=tables.participants.filter(~pl.col("node").is_in(gone)),
        )


Kind = Callable[[Original, random.Random], Mutant]
KINDS: dict[str, Kind] = {}


def kind(name: str) -> Callable[[Kind], Kind]:
    """Register a kind of fault."""

    def register(make: Kind) -> Kind:
        KINDS[name] = make
        return make

    return register
