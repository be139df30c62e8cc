"""What `comprehensive` shows of the world: rank classes, process groups and their traffic, the batch and its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from truedag.tracer.analysis.estimates import forget_estimates
from truedag.tracer.analysis.held_memory import HeldMemory, read_memory
from truedag.tracer.graph.fold import COMMUNICATIONS
from truedag.tracer.graph.tensor_types import read_tensors
from truedag.tracer.views import captions
from truedag.tracer.views.faults import Fault
from truedag.tracer.views.heads import Heads, find_heads
from truedag.tracer.views.scope import Scope, weigh
from truedag.tracer.views.speed import Speed, measure_speed


@dataclass(frozen=True, slots=True, kw_only=True)
class RankClass:
    """Ranks that ran the same program: the lowest of them, all of them, and what they ran.

    `num_operators` is the fewest and the most that one of them ran: for experts without tokens one runs others.
    `memory` is what the first of them had; None is unknown.
    """

    first: int
    stage: int
    ranks: tuple[int, ...]
    num_operators: tuple[int, int]
    num_nodes: int
    num_communications: int
    num_parameters: int
    busy_ns: float | None
    memory: HeldMemory | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """The communications over one axis in one stage (-1: across stages), or the messages of one phase.

    Attributes:
        stage: the stage.
        kind: collective, send or recv.
        axis: the axis, or '' where nobody told.
        phase: of messages; None of collectives.
        calls: for each label how many nodes of the graph.
        groups: for each size of its process groups how many there are.
        first: the first of them.
        num_bytes: that all participants send (or receive, for recv).
        transfer_ns: mean transfer of a participant; None: unknown.
        wait_ns: mean wait.
        shapes: of the tensors that go in and come out, as `captions.write_shapes` has them.
        classes: the classes, by their lowest ranks, that take part.
        is_merge: it joins what the parts of the batch gave.
    """

    stage: int
    kind: str
    axis: str
    phase: str | None
    calls: Mapping[str, int]
    groups: Mapping[int, int]
    first: tuple[int, ...]
    num_bytes: int
    transfer_ns: float | None
    wait_ns: float | None
    shapes: tuple[list[str], list[str]]
    classes: tuple[int, ...]
    is_merge: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPart:
    """A part of the batch: where on the axis, how many sequences and tokens, and the GPUs of the first stage.

    Where sequences are cut over cp, `num_tokens` counts those that a place on cp has.
    """

    axis: str
    place: int
    num_sequences: int
    num_tokens: int
    num_places: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All of it.

    `ties` has for two traffics (by place in the list) the messages between them and their bytes, `faults` for a traffic
    what an audit found of its nodes; `missing` are ranks that recorded nothing.
    """

    classes: list[RankClass]
    traffic: list[Traffic]
    ties: Mapping[tuple[int, int], tuple[int, int]]
    parts: list[BatchPart]
    num_sequences: int
    num_tokens: int
    num_microbatches: int
    num_decode_steps: int
    has_backward: bool
    speed: Speed | None
    heads: Heads | None
    missing: tuple[int, ...]
    faults: Mapping[int, list[Fault]]


def read_world(scope: Scope) -> World:
    """Read it; of a graph that is not read whole, one rank of each class stands for the others."""
    graph = scope.graph
    names = (
        "node",
        "kind",
        "rank",
        "stage",
        "label",
        "layer",
        "phase",
        "microbatch",
        "step",
        "decode_step",
        "start_ns",
        "end_ns",
        "timing",
        "inputs",
        "outputs",
    )
    nodes = graph.nodes.select(*names).collect()
    participants = forget_estimates(graph.participants.collect(), nodes)
    weights = weigh(scope, nodes, participants)
    traffic, places = _traffic(scope, nodes, participants, weights)
    edges = graph.edges.filter(pl.col("kind") != "order").select("src", "dst", "kind", "bytes").collect()
    ends = places.rename({"node": "src", "place": "a"}), places.rename({"node": "dst", "place": "b"})
    joined = edges.filter(pl.col("kind") == "p2p").join(ends[0], on="src").join(ends[1], on="dst")
    tied = joined.group_by("a", "b").agg(pl.len(), pl.col("bytes").sum()).sort("a", "b")
    parts, num_sequences, num_tokens = _batch(scope, nodes, edges)
    return World(
        classes=_classes(scope, nodes, participants),
        traffic=traffic,
        ties={(a, b): (num, size) for a, b, num, size in tied.iter_rows()},
        parts=parts,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        num_microbatches=nodes.filter(pl.col("microbatch") >= 0)["microbatch"].n_unique(),
        num_decode_steps=nodes.filter(pl.col("decode_step") >= 0)["decode_step"].n_unique(),
        has_backward=(nodes["phase"] == "backward").any(),
        speed=measure_speed(scope, nodes, participants),
        heads=find_heads(scope),
        missing=tuple(sorted(set(scope.whole.meta.get("missing_ranks") or ()) - set(scope.places))),
        faults=scope.faults.on_nodes(
            nodes.select("node", "rank", "layer").join(places, on="node").rename({"place": "box"})
        ),
    )


def _classes(scope: Scope, nodes: pl.DataFrame, participants: pl.DataFrame) -> list[RankClass]:
    duration = pl.when(pl.col("timing") == "measured").then(pl.col("end_ns") - pl.col("start_ns"))
    own = (
        nodes.filter(pl.col("kind") == "compute")
        .group_by("rank")
        .agg(num=pl.len(), known=duration.is_not_null().all(), busy=duration.sum())
    )
    told = {row["rank"]: row for row in own.to_dicts()}
    met = dict(participants.group_by("rank").agg(pl.col("node").n_unique()).iter_rows())
    sizes: dict[int, int] = {}
    for rank, text in nodes.filter(pl.col("kind") == "parameter").select("rank", "outputs").iter_rows():
        sizes[rank] = sizes.get(rank, 0) + captions.count_elements(text or "")
    told_ranks = scope.whole.ranks.select("rank", "rank_class").collect()
    memory = {rank: one for one in read_memory(scope.whole.meta, told_ranks) for rank in one.ranks}
    classes = []
    for first, ranks in sorted(scope.members.items()):
        read = [rank for rank in ([first] if scope.is_folded else ranks) if rank in told]
        nums = [told[rank]["num"] for rank in read] or [0]
        times = [told[rank]["busy"] for rank in read if told[rank]["known"]]
        classes.append(
            RankClass(
                first=first,
                stage=scope.coordinate(first, "pp"),
                ranks=ranks,
                num_operators=(min(nums), max(nums)),
                num_nodes=sum(told[rank]["num"] * scope.weight(rank) for rank in read),
                num_communications=met.get(first, 0),
                num_parameters=sizes.get(first, 0),
                busy_ns=sum(times) / len(times) if times else None,
                memory=memory.get(first),
            )
        )
    return classes


def _traffic(
    scope: Scope, nodes: pl.DataFrame, participants: pl.DataFrame, weights: pl.DataFrame
) -> tuple[list[Traffic], pl.DataFrame]:
    """Add up the communications; return with them for each message its place in the list."""
    groups = scope.whole.groups.select("group", "axis", "ranks").collect()
    talks = nodes.filter(pl.col("kind").is_in(COMMUNICATIONS)).join(weights, on="node")
    part = (
        participants.join(talks.drop("rank", "start_ns", "end_ns"), on="node")
        .join(groups, on="group")
        .with_columns(
            axis=pl.col("axis").fill_null(""),
            of_phase=pl.when(pl.col("kind") != "collective").then(pl.col("phase").fill_null("")),
            times=_rank_weights(scope),
        )
    )
    wait, transfer = pl.col("start_ns") - pl.col("arrive_ns"), pl.col("end_ns") - pl.col("start_ns")
    moved = pl.when(pl.col("kind") == "recv").then("recv_bytes").otherwise("send_bytes")
    by = ("stage", "kind", "axis", "of_phase")
    found = []
    rows = (
        part.group_by(by)
        .agg(
            wait=wait.mean(),
            transfer=transfer.mean(),
            moved=(moved * pl.col("times")).sum(),
            first=pl.col("node").min(),
            groups=pl.struct("group", "ranks", "rank").unique(),
            inputs=pl.col("inputs").unique(),
            outputs=pl.col("outputs").unique(),
            ranks=pl.col("rank").unique(),
        )
        .sort("stage", "first")
    )
    counts = talks.join(part.select("node", *by).unique("node"), on=["node", "stage", "kind"])
    counted = counts.group_by(*by, "label").agg(pl.col("weight").sum()).sort("label")
    labels: dict[tuple[Any, ...], dict[str, int]] = {}
    for values in counted.iter_rows():
        labels.setdefault(values[:4], {})[values[4]] = round(values[5])
    keys: list[tuple[Any, ...]] = []
    for row in rows.to_dicts():
        key = tuple(row[name] for name in by)
        keys.append((*key, len(keys)))
        members = [(tuple(one["ranks"]), one["rank"]) for one in row["groups"]]
        found.append(
            Traffic(
                stage=row["stage"],
                kind=row["kind"],
                axis=row["axis"],
                phase=row["of_phase"],
                calls=labels[key],
                groups=_count_groups(scope, members),
                first=min(ranks for ranks, _ in members),
                num_bytes=row["moved"] or 0,
                transfer_ns=row["transfer"],
                wait_ns=row["wait"],
                shapes=(_write(row["inputs"]), _write(row["outputs"])),
                classes=tuple(sorted({scope.class_of(rank) for rank in row["ranks"]})),
                is_merge=row["kind"] == "collective" and bool({"dp", "edp"} & set(row["axis"].split("+"))),
            )
        )
    schema = {name: part.schema[name] for name in by} | {"place": pl.Int64}
    places = (
        part.select("node", *by)
        .unique("node")
        .join(pl.DataFrame(keys, schema=schema, orient="row"), on=by, nulls_equal=True)
    )
    return found, places.select("node", "place")


def _rank_weights(scope: Scope) -> pl.Expr:
    weights = {rank: scope.weight(rank) for rank in scope.read}
    return pl.col("rank").cast(pl.Int64).replace_strict(weights, default=1, return_dtype=pl.Int64)


def _count_groups(scope: Scope, members: Sequence[tuple[tuple[int, ...], int]]) -> dict[int, int]:
    """Count the groups of each size, the largest first; a rank that was read stands for its class in its groups."""
    counted: dict[int, float] = {}
    if scope.is_folded:
        for ranks, rank in members:
            counted[len(ranks)] = counted.get(len(ranks), 0.0) + scope.weight(rank) / len(ranks)
    else:
        for ranks in {ranks for ranks, _ in members}:
            counted[len(ranks)] = counted.get(len(ranks), 0.0) + 1.0
    return {size: max(1, round(counted[size])) for size in sorted(counted, reverse=True)}


def _write(texts: Sequence[str | None]) -> list[str]:
    return captions.write_shapes({one for text in texts if text for one in read_tensors(text)})


def _batch(scope: Scope, nodes: pl.DataFrame, edges: pl.DataFrame) -> tuple[list[BatchPart], int, int]:
    """Find the token tensors that the ranks of the first stage read, and how they are spread over the replicas.

    A token tensor is an input of whole numbers in two dimensions, sequences and positions, which is read in a
    microbatch's forward pass or prefill outside the layers. Of several steps the first is counted. There are no parts
    where a microbatch reads tensors of several such shapes, or where several ranks read some and nobody told which of
    them are replicas.
    """
    inputs = nodes.filter((pl.col("kind") == "input") & pl.col("outputs").str.contains(r"^int64\[\d+,\d+\]$"))
    reads = nodes.filter(
        (pl.col("microbatch") >= 0) & pl.col("phase").is_in(["forward", "prefill"]) & (pl.col("layer") < 0)
    )
    rows = (
        edges.join(inputs.select(src="node", tokens="outputs"), on="src")
        .join(reads.select("rank", "step", "microbatch", dst="node"), on="dst")
        .filter(pl.col("step") == pl.col("step").min())
        .select("rank", "microbatch", "tokens")
        .unique()
        .sort("rank", "microbatch", "tokens")
    )
    if rows.select("rank", "microbatch").is_duplicated().any():
        return [], 0, 0
    given: dict[int, tuple[int, int]] = {}
    for rank, _, text in rows.iter_rows():
        (shape,) = (shape for _, shape in read_tensors(text))
        for one in scope.spread([rank]):
            if scope.coordinate(one, "pp") <= 0:
                before = given.get(one, (0, 0))
                given[one] = (before[0] + shape[0], before[1] + shape[0] * shape[1])
    if len(given) > 1 and not scope.size("dp"):
        return [], 0, 0
    axis = "dp" if scope.size("dp") <= 16 else "edp"
    whole = {scope.coordinate(rank, "dp"): told for rank, told in sorted(given.items(), reverse=True)}
    spread: dict[int, dict[int, list[int]]] = {}
    for rank in sorted(given):
        spread.setdefault(max(0, scope.coordinate(rank, axis)), {}).setdefault(scope.coordinate(rank, "dp"), []).append(
            rank
        )
    parts = [
        BatchPart(
            axis=axis,
            place=place,
            num_sequences=sum(whole[dp][0] for dp in inside),
            num_tokens=sum(whole[dp][1] for dp in inside),
            num_places=len(inside),
            ranks=tuple(sorted(rank for ranks in inside.values() for rank in ranks)),
        )
        for place, inside in sorted(spread.items())
    ]
    return parts, sum(told[0] for told in whole.values()), sum(told[1] for told in whole.values())
