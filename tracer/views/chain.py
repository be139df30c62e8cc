"""The layers of one rank class of each stage, a box for each layer and phase, in the order in which data pass them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from truedag.tracer.graph import Graph
from truedag.tracer.graph.fold import ENDS
from truedag.tracer.views import captions
from truedag.tracer.views.boundaries import find_boundaries
from truedag.tracer.views.calls import CALL, Calls
from truedag.tracer.views.faults import Fault, Faults
from truedag.tracer.views.operators import Tensor

BEFORE, AFTER, ALONE = -3, -2, -1


@dataclass(slots=True)
class Part:
    """A box: a layer (or what runs before, after or without them, or a message's end) of a stage in a phase.

    Attributes:
        slot: the layer; or BEFORE, AFTER, ALONE.
        label: of a message's end what it is; else ''.
        is_receive: it is the end that receives.
        num_nodes: nodes that were read and that it stands for.
        num_items: the same, counted on each of their ranks.
        num_calls: calls of it.
        fewest: nodes in the call that ran the fewest.
        most: nodes in the call that ran the most.
        mean_ns: mean over calls of the sum of the operators' times; None: not all are known.
        num_parameters: elements of the parameters of the layer on one GPU.
        boundaries: of a message's end between which layers it goes.
    """

    stage: int
    phase: str | None
    slot: int
    label: str
    is_receive: bool
    num_nodes: int
    num_items: int
    num_calls: int
    fewest: int
    most: int
    mean_ns: float | None
    inputs: set[Tensor] = field(default_factory=set)
    outputs: set[Tensor] = field(default_factory=set)
    num_parameters: int = 0
    boundaries: set[tuple[int, int]] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Parts in the order in which they first ran, and for each pair of them edges and bytes between."""

    parts: list[Part]
    ties: Mapping[tuple[int, int], tuple[int, int, bool]]
    faults: Mapping[int, list[Fault]] = field(default_factory=dict)


def make_chain(graph: Graph, calls: Mapping[int, Calls], faults: Faults) -> Chain:
    """Fold the classes of several stages (by stage) into parts."""
    items = pl.concat([_with_slots(one).with_columns(home=pl.lit(stage)) for stage, one in sorted(calls.items())])
    duration = pl.when(pl.col("timing") == "measured").then(pl.col("end_ns") - pl.col("start_ns"))
    by = ("home", "phase", "slot", "talk")
    inside = items.filter(~pl.col("kind").is_in(ENDS))
    per_call = inside.group_by(*by, "rank", *CALL).agg(
        num=pl.len(), known=duration.is_not_null().all(), time=duration.sum(), first=pl.col("node").min()
    )
    rows = (
        per_call.group_by(by)
        .agg(
            pl.len().alias("calls"),
            pl.col("num").sum(),
            fewest=pl.col("num").min(),
            most=pl.col("num").max(),
            first=pl.col("first").min(),
            time=pl.when(pl.col("known").all()).then(pl.col("time").mean()),
        )
        .join(
            inside.group_by(by).agg(
                pl.col("kind").first(), nodes=pl.struct("node", "weight").unique().struct.field("weight").sum()
            ),
            on=by,
            nulls_equal=True,
        )
        .sort("first")
    )
    parts = [
        Part(
            stage=row["home"],
            phase=row["phase"],
            slot=row["slot"],
            label=row["talk"] or "",
            is_receive=row["kind"] == "recv",
            num_nodes=round(row["nodes"]),
            num_items=row["num"],
            num_calls=row["calls"],
            fewest=row["fewest"],
            most=row["most"],
            mean_ns=row["time"],
        )
        for row in rows.to_dicts()
    ]
    numbers = rows.select(*by).with_row_index("part")
    place = inside.join(numbers, on=by, nulls_equal=True).select("node", pl.col("part").cast(pl.Int64)).unique("node")
    _add_parameters(parts, items)
    messages = _messages(graph, calls)
    edges = [*(one.edges for one in calls.values()), messages]
    of_stages = inside.select("node", "rank", "stage", "layer", "phase", *CALL).unique("node")
    for part, pairs in find_boundaries(of_stages, messages, place.rename({"part": "fold"})).items():
        parts[part].boundaries = pairs
    held = faults.on(
        place.join(inside.select("node", "rank", "layer").unique("node"), on="node").rename({"part": "box"})
    )
    return Chain(faults=held, parts=parts, ties=_ties(parts, place, pl.concat(edges, how="diagonal_relaxed")))


def _with_slots(calls: Calls) -> pl.DataFrame:
    """Add slot and talk (what a message's end is) to the operators of the class."""
    items = calls.items.filter(pl.col("rank").is_in(calls.ranks))
    near = ("rank", "phase", *CALL)
    layered = items.filter((pl.col("layer") >= 0) & ~pl.col("kind").is_in(ENDS))
    spans = layered.group_by(near).agg(low=pl.col("node").min())
    slot = (
        pl.when(pl.col("layer") >= 0)
        .then(pl.col("layer").cast(pl.Int64))
        .when(pl.col("low").is_null())
        .then(pl.lit(ALONE, pl.Int64))
        .when(pl.col("node") < pl.col("low"))
        .then(pl.lit(BEFORE, pl.Int64))
        .otherwise(pl.lit(AFTER, pl.Int64))
    )
    talk = pl.when(pl.col("kind").is_in(["send", "recv"])).then("label")
    return items.join(spans, on=near, how="left", nulls_equal=True).with_columns(slot=slot, talk=talk).drop("low")


def _messages(graph: Graph, calls: Mapping[int, Calls]) -> pl.DataFrame:
    """Return the messages between the classes; of a graph read in part, those between the ranks that were read."""
    ranks = sorted({rank for one in calls.values() for rank in one.ranks})
    part = graph.subgraph(ranks=ranks)
    return part.edges.filter(pl.col("kind") == "p2p").collect()


def _add_parameters(parts: Sequence[Part], items: pl.DataFrame) -> None:
    held = items.filter((pl.col("kind") == "parameter") & (pl.col("layer") >= 0))
    one = held.group_by("home", "layer").agg(pl.col("rank").first(), rows=pl.struct("rank", "outputs"))
    counts = {
        (row["home"], row["layer"]): sum(
            captions.count_elements(told["outputs"] or "") for told in row["rows"] if told["rank"] == row["rank"]
        )
        for row in one.to_dicts()
    }
    for part in parts:
        part.num_parameters = counts.get((part.stage, part.slot), 0)


def _ties(
    parts: Sequence[Part], place: pl.DataFrame, edges: pl.DataFrame
) -> dict[tuple[int, int], tuple[int, int, bool]]:
    crossing = (
        edges.unique(["src", "dst", "kind"])
        .join(place.rename({"node": "src", "part": "a"}), on="src")
        .join(place.rename({"node": "dst", "part": "b"}), on="dst")
        .filter(pl.col("a") != pl.col("b"))
    )
    tensors = crossing.select("a", "b", "dtype", "shape").drop_nulls().unique().to_dicts()
    for row in tensors:
        a, b, tensor = parts[row["a"]], parts[row["b"]], (row["dtype"], tuple(row["shape"]))
        if a.phase == b.phase:
            a.outputs.add(tensor)
            b.inputs.add(tensor)
    rows: list[dict[str, Any]] = (
        crossing.group_by("a", "b")
        .agg(pl.len(), pl.col("bytes").sum(), (pl.col("kind") == "p2p").any().alias("is_message"))
        .sort("a", "b")
        .to_dicts()
    )
    return {(row["a"], row["b"]): (row["len"], row["bytes"], row["is_message"]) for row in rows}
