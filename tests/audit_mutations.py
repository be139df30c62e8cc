"""Faults put into true graphs at random places, each with the check that must find it and where."""

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


def _ids(*nodes: object) -> pl.Series:
    return pl.Series(nodes, dtype=pl.Int64)


def _drop(original: Original, rng: random.Random, row: dict, *checks: str) -> Mutant:
    """Remove one communication."""
    tables = original.without(_ids(row["node"]), heal=rng.random() < 0.5)
    layer = row["layer"] if row["layer"] >= 0 else None
    return Mutant(tables=tables, checks=checks, layer=layer)


def _drop_role(original: Original, rng: random.Random, check: str, *roles: str, phases: tuple[str, ...] = ()) -> Mutant:
    """Remove all operators of a role in one layer, rank and pass."""
    row = original.role(rng, *roles, **({"phases": phases} if phases else {}))
    tables = original.without(original.same_operator(row), heal=rng.random() < 0.5)
    return Mutant(tables=tables, checks=(check,), layer=row["layer"] if row["layer"] >= 0 else None, rank=row["rank"])


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


@kind("swap ranks between groups")
def _(original: Original, rng: random.Random) -> Mutant:
    row = original.purpose(rng, "attention output", "dispatch", "combine", "dense gradients", "attention input")
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


@kind("a communication that was not joined")
def _(original: Original, rng: random.Random) -> Mutant:
    told = f"group {rng.randrange(9)}, all-reduce number {rng.randrange(99)}: rank {rng.randrange(9)} is missing"
    tables = replace(original.tables, meta={**original.tables.meta, "unmatched": [told]})
    return Mutant(tables=tables, checks=("communication.unmatched",))
