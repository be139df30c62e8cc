"""Pipeline stages that follow each other and are alike, drawn once.

Stages are alike if they have as many GPUs, as many layers in runs of the same lengths, and pass the same folded nodes
and edges, in all phases; what they send to each other is not compared. The n-th run of layers of one then stands for
the n-th of each. Folded onto each other they would make a cycle, as each receives what the one before it sent; so these
messages are taken out, counted, and said in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from truedag.tracer.graph.fold import ENDS, Fold

_SAME = ("kind", "phase", "is_microbatch", "where", "role", "what", "place", "experts", "passed")
Layers = Mapping[tuple[int, int], tuple[int, ...]]
Counts = Mapping[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AlikeStages:
    """Which stages are drawn as one.

    Attributes:
        runs: for each stage that is drawn, the stages that it stands for.
        layers: for each of its layers that is drawn, by both, the layers that this stands for.
        repeats: edges and bytes from one of those layers to another, by both.
        transfers: for each stage that is drawn and phase, from how many of its stages messages lead to another of them,
            and how many edges these are.
    """

    runs: dict[int, tuple[int, ...]]
    layers: dict[tuple[int, int], tuple[int, ...]]
    repeats: dict[tuple[int, int], tuple[int, int]]
    transfers: dict[tuple[int, str | None], tuple[int, int]] = field(default_factory=dict)


def find_alike_stages(coarse: Fold, layers: Layers, sizes: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    """Return for the first stage of each run of alike stages the stages of the run.

    Args:
        coarse: the graph, alike layers folded.
        layers: for each stage and layer in it the layers that it stands for.
        sizes: how many GPUs each stage has.
    """
    turns = _number_layers(coarse, layers)
    nodes = coarse.nodes.filter(~pl.col("kind").is_in(ENDS)).join(turns, on=["stage", "layer"], how="left")
    same = pl.struct(*_SAME, "turn", "length").struct.json_encode()
    names = nodes.select("fold", "stage", name=same)
    ties = (
        coarse.edges.join(names.rename({"fold": "src", "name": "a"}), on="src")
        .join(names.rename({"fold": "dst", "name": "b"}), on="dst", suffix="_b")
        .filter((pl.col("stage") == pl.col("stage_b")) | (pl.col("stage") < 0) | (pl.col("stage_b") < 0))
        .select(stage=pl.max_horizontal("stage", "stage_b"), name=pl.col("a") + ">" + pl.col("b"))
    )
    told = (
        pl.concat([names.select("stage", "name"), ties])
        .filter(pl.col("stage") >= 0)
        .sort("stage", "name")
        .group_by("stage", maintain_order=True)
        .agg("name")
    )
    runs: dict[int, tuple[int, ...]] = {}
    first = -1
    before: tuple[int | None, list[str]] = (None, [])
    for stage, name in told.iter_rows():
        found = (sizes.get(stage), name)
        if first >= 0 and runs[first][-1] + 1 == stage and found == before:
            runs[first] = (*runs[first], stage)
        else:
            first, runs[stage] = stage, (stage,)
        before = found
    return runs


def fold_stages(
    fine: Fold, layers: Layers, repeats: Counts, runs: Mapping[int, tuple[int, ...]]
) -> tuple[Fold, AlikeStages]:
    """Give alike stages, and their layers, the numbers of the first; take out the messages between them."""
    by_stage: dict[int, list[int]] = {}
    for stage, layer in sorted(layers):
        by_stage.setdefault(stage, []).append(layer)
    goals = {
        (stage, layer): (first, by_stage[first][turn])
        for first, found in runs.items()
        for stage in found
        for turn, layer in enumerate(by_stage.get(stage, ()))
    }
    whole = [(stage, first) for first, found in runs.items() for stage in found]
    kind = {name: fine.nodes.schema[name] for name in ("stage", "layer")}
    rows = [(*place, layer) for place, (_, layer) in goals.items()]
    to_layer = pl.DataFrame(rows, schema={**kind, "to_layer": kind["layer"]}, orient="row")
    to_stage = pl.DataFrame(whole, schema={"stage": kind["stage"], "to_stage": kind["stage"]}, orient="row")
    nodes = fine.nodes.join(to_layer, on=["stage", "layer"], how="left").join(to_stage, on="stage", how="left")
    ends = nodes.select("fold", "stage", "to_stage", "phase")
    between = (
        fine.edges.join(ends.rename({"fold": "src"}), on="src")
        .join(ends.rename({"fold": "dst"}), on="dst", suffix="_b")
        .filter((pl.col("to_stage") == pl.col("to_stage_b")) & (pl.col("stage") != pl.col("stage_b")))
    )
    counted = between.group_by("to_stage", "phase").agg(pl.col("stage").n_unique(), pl.col("num_edges").sum())
    kept = fine.edges.join(between.select("src", "dst", "kind"), on=["src", "dst", "kind"], how="anti")
    renamed = nodes.with_columns(stage=pl.coalesce("to_stage", "stage"), layer=pl.coalesce("to_layer", "layer"))
    joined: dict[tuple[int, int], tuple[int, ...]] = {}
    sums: dict[tuple[int, int], tuple[int, int]] = {}
    for place, found in sorted(layers.items()):
        goal = goals.get(place, place)
        joined[goal] = (*joined.get(goal, ()), *found)
        (num, size), (more, larger) = sums.get(goal, (0, 0)), repeats.get(place, (0, 0))
        if num + more:
            sums[goal] = (num + more, size + larger)
    return replace(fine, nodes=renamed.drop("to_stage", "to_layer").sort("fold"), edges=kept), AlikeStages(
        runs=dict(runs),
        layers=joined,
        repeats=sums,
        transfers={(stage, phase): (num, edges) for stage, phase, num, edges in counted.iter_rows()},
    )


def _number_layers(coarse: Fold, layers: Layers) -> pl.DataFrame:
    """Number the layers of each stage that are drawn: stage, layer, turn and length, how many it stands for."""
    rows: list[tuple[int, int, int, int]] = []
    turns: dict[int, int] = {}
    for (stage, layer), found in sorted(layers.items()):
        if layer >= 0:
            rows.append((stage, layer, turns.get(stage, 0), len(found)))
            turns[stage] = turns.get(stage, 0) + 1
    kind = {name: coarse.nodes.schema[name] for name in ("stage", "layer")}
    schema: dict[str, Any] = {**kind, "turn": pl.Int64, "length": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")
