"""The operators of one rank class, folded over what repeats: calls of a layer, alike layers, alike ranks.

A call is what one rank runs of one layer, in one phase, step and microbatch. Operators of two calls are the same where
module (inside its layer), operator, label and expert are, and how many such ran before in the call. Layers of a stage
are alike if they have the same modules and communications in the same phases. Shapes and times play no part: they are
stated as the spans that were found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from truedag.tracer.graph import Graph
from truedag.tracer.graph.fold import COMMUNICATIONS, ENDS
from truedag.tracer.views import captions
from truedag.tracer.views.scope import Scope

CALL = ("step", "decode_step", "microbatch")
KEY = ("path", "op", "label", "expert", "turn", "kind")
_COLUMNS = (
    "node",
    "kind",
    "category",
    "rank",
    "op",
    "label",
    "module",
    "layer",
    "stage",
    "expert",
    "phase",
    *CALL,
    "start_ns",
    "end_ns",
    "timing",
    "inputs",
    "outputs",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """The operators of a class's ranks, and of those that hold the other experts.

    Attributes:
        lead: the class, by its lowest rank.
        ranks: the ranks of the class that were read.
        items: a row for each operator on each of its ranks that were read: the columns of the graph's nodes, path
            (module inside the layer), turn, kind_of_layer, a number that alike layers share, and weight, how many
            nodes of the class it stands for.
        edges: the edges of data and messages with an end among these.
        layers: for each number of a kind of layers, its layers.
    """

    lead: int
    ranks: tuple[int, ...]
    items: pl.DataFrame
    edges: pl.DataFrame
    layers: dict[int, tuple[int, ...]]


def read_calls(scope: Scope, lead: int) -> Calls:
    """Read what the ranks of a class ran, and the experts of the others of their stage."""
    members = scope.members[lead]
    ranks = (lead,) if scope.is_folded else members
    peers = _expert_ranks(scope, lead)
    part = scope.whole.subgraph(ranks=sorted({*ranks, *peers}))
    nodes = part.nodes.select(*_COLUMNS).collect()
    parts = part.participants.select("node", pl.col("rank").alias("of")).unique().collect()
    items = (
        nodes.join(parts, on="node", how="left")
        .with_columns(rank=pl.coalesce("of", "rank").cast(pl.Int64))
        .drop("of")
        .filter(pl.col("rank").is_in([*ranks, *peers]))
    )
    items = _add_paths(items).sort("rank", "node")
    call = ("rank", "layer", "phase", *CALL)
    items = items.with_columns(turn=pl.int_range(pl.len()).over(*call, "path", "op", "label", "expert", "kind"))
    numbers, layers = _alike_layers(items.filter(pl.col("rank").is_in(ranks)))
    items = items.join(numbers, on="layer", how="left").with_columns(pl.col("kind_of_layer").fill_null(-1))
    items = items.join(_weigh(scope, lead, part), on="node", how="left").with_columns(
        weight=pl.coalesce("weight", pl.lit(len(members) if scope.is_folded else 1.0))
    )
    edges = part.edges.filter(pl.col("kind") != "order").collect()
    return Calls(lead=lead, ranks=tuple(ranks), items=items, edges=edges, layers=layers)


def _weigh(scope: Scope, lead: int, part: Graph) -> pl.DataFrame:
    """Say of each collective how many like it the class has: node and weight; of a graph read whole it is itself."""
    members = set(scope.members[lead])
    groups = {row["group"]: row["ranks"] for row in scope.whole.groups.select("group", "ranks").collect().to_dicts()}
    met = part.participants.select("node", "group").unique("node").collect()
    weights = [
        len(members) / max(1, len(members.intersection(groups[group]))) if scope.is_folded else 1.0
        for group in met["group"]
    ]
    return pl.DataFrame({"node": met["node"], "weight": pl.Series(weights, dtype=pl.Float64)}).filter(
        pl.col("node").is_in(
            part.nodes.filter(pl.col("kind") == "collective").select("node").collect()["node"].implode()
        )
    )


def _expert_ranks(scope: Scope, lead: int) -> list[int]:
    """Ranks whose experts are drawn: of a graph read whole all of the stage, else one for each place on the axis."""
    stage = scope.coordinate(lead, "pp")
    near = [rank for rank in scope.places if scope.coordinate(rank, "pp") == stage]
    if not scope.is_folded:
        return near
    firsts: dict[int, int] = {}
    for rank in sorted(near, key=lambda rank: (rank not in scope.members[lead], rank)):
        firsts.setdefault(scope.coordinate(rank, "ep"), rank)
    return sorted(firsts.values()) if scope.size("ep") > 1 else [lead]


def _add_paths(items: pl.DataFrame) -> pl.DataFrame:
    """Add path: the module inside its layer; an expert's is the one inside the expert."""
    modules = items.select("module", "layer", "expert").unique()
    rows = [
        (module, layer, expert, _path(module, layer, is_expert=expert >= 0))
        for module, layer, expert in modules.iter_rows()
    ]
    schema: dict[str, Any] = {**{name: items.schema[name] for name in modules.columns}, "path": pl.String}
    paths = pl.DataFrame(rows, schema=schema, orient="row")
    return items.join(paths, on=["module", "layer", "expert"], how="left", nulls_equal=True)


def _path(module: str | None, layer: int, *, is_expert: bool) -> str:
    path = captions.relative_module(module, layer) if module is not None else ""
    names = path.split(".")
    last = max((i for i, name in enumerate(names) if name.isdigit()), default=-1)
    return ".".join(names[last + 1 :]) if is_expert and last >= 0 else path


def _alike_layers(items: pl.DataFrame) -> tuple[pl.DataFrame, dict[int, tuple[int, ...]]]:
    """Number the kinds of layers by their first: layer to kind_of_layer, and each kind's layers."""
    of_layers = items.filter((pl.col("layer") >= 0) & ~pl.col("kind").is_in(ENDS))
    what = pl.when(pl.col("expert") >= 0).then(pl.lit("expert")).otherwise(pl.col("path"))
    talk = pl.when(pl.col("kind").is_in(COMMUNICATIONS)).then("label")
    rows = (
        of_layers.select("layer", "stage", "phase", what=what, talk=talk)
        .unique()
        .sort("stage", "phase", "what", "talk", nulls_last=True)
        .group_by("layer")
        .agg(pl.struct("stage", "phase", "what", "talk"))
        .sort("layer")
    )
    kinds: dict[str, list[int]] = {}
    for layer, told in rows.iter_rows():
        kinds.setdefault(str(told), []).append(layer)
    layers = {found[0]: tuple(found) for found in kinds.values()}
    pairs = [(layer, first) for first, found in layers.items() for layer in found]
    schema: dict[str, Any] = {"layer": items.schema["layer"], "kind_of_layer": pl.Int64}
    return pl.DataFrame(pairs, schema=schema, orient="row"), layers


def select_sheet(calls: Calls, layers: Sequence[int], phase: str | None) -> pl.DataFrame:
    """Return the items of some layers (-1: of none) in a phase, without what goes in and out of the program."""
    is_phase = pl.col("phase").is_null() if phase is None else pl.col("phase") == phase
    return calls.items.filter(pl.col("layer").is_in(list(layers)) & is_phase & ~pl.col("kind").is_in(ENDS))
