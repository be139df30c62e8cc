"""Layers that follow each other and are alike, drawn once.

Layers of a stage are alike if they pass the same folded nodes and edges inside them, in all phases. What leads into and
out of them is not compared: the first reads what stands before the layers, the last gives to what stands after them.
Folded onto each other they would make a cycle, as each reads what the one before it gave; so the edges
from one of them to the next are taken out, counted, and said in words. What is left of the graph is a DAG.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl

from truedag.tracer.graph.fold import ENDS, Fold
from truedag.tracer.views import captions

_SAME = ("kind", "phase", "is_microbatch", "where", "role", "what", "path", "experts", "passed")
Layers = dict[tuple[int, int], tuple[int, ...]]


def find_alike(coarse: Fold) -> Layers:
    """Return for the first layer of each run of alike layers (by stage and layer) the layers of the run."""
    nodes = _add_paths(coarse.nodes).filter((pl.col("layer") >= 0) & ~pl.col("kind").is_in(ENDS))
    names = nodes.select("fold", "stage", "layer", name=pl.struct(*_SAME).struct.json_encode())
    inside = (
        coarse.edges.join(names.rename({"fold": "src", "name": "a"}), on="src")
        .join(names.rename({"fold": "dst", "name": "b"}), on="dst", suffix="_b")
        .filter((pl.col("stage") == pl.col("stage_b")) & (pl.col("layer") == pl.col("layer_b")))
        .select("stage", "layer", name=pl.col("a") + ">" + pl.col("b"))
    )
    told = (
        pl.concat([names.select("stage", "layer", "name"), inside])
        .sort("stage", "layer", "name")
        .group_by("stage", "layer", maintain_order=True)
        .agg("name")
    )
    layers: Layers = {}
    first: tuple[int, int] | None = None
    before: list[str] = []
    for stage, layer, found in told.iter_rows():
        follows = first is not None and first[0] == stage and layers[first][-1] + 1 == layer
        if first is not None and follows and found == before:
            layers[first] = (*layers[first], layer)
        else:
            first = (stage, layer)
            layers[first] = (layer,)
        before = found
    return layers


def fold_alike(fine: Fold, layers: Layers) -> tuple[Fold, dict[tuple[int, int], tuple[int, int]]]:
    """Give alike layers the number of their first; take out the edges between them, and count these."""
    rows = [(stage, layer, first) for (stage, first), found in layers.items() for layer in found]
    schema = {
        "stage": fine.nodes.schema["stage"],
        "layer": fine.nodes.schema["layer"],
        "first": fine.nodes.schema["layer"],
    }
    firsts = pl.DataFrame(rows, schema=schema, orient="row")
    nodes = _add_paths(fine.nodes).join(firsts, on=["stage", "layer"], how="left")
    ends = nodes.select("fold", "stage", "layer", "first")
    between = (
        fine.edges.join(ends.rename({"fold": "src"}), on="src")
        .join(ends.rename({"fold": "dst"}), on="dst", suffix="_b")
        .filter(
            (pl.col("stage") == pl.col("stage_b"))
            & (pl.col("first") == pl.col("first_b"))
            & (pl.col("layer") != pl.col("layer_b"))
        )
    )
    counted = (
        between.group_by("stage", "first").agg(pl.col("num_edges").sum(), pl.col("bytes").sum()).sort("stage", "first")
    )
    repeats = {(stage, first): (num, size) for stage, first, num, size in counted.iter_rows()}
    kept = fine.edges.join(between.select("src", "dst", "kind"), on=["src", "dst", "kind"], how="anti")
    renamed = nodes.with_columns(
        layer=pl.coalesce("first", "layer"),
        place=pl.when(pl.col("first").is_not_null()).then("path").otherwise("place"),
    ).drop("first", "path")
    return replace(fine, nodes=renamed.sort("fold"), edges=kept), repeats


def _add_paths(nodes: pl.DataFrame) -> pl.DataFrame:
    """Add path: the place of a communication inside its layer."""
    places = nodes.select("place", "layer").unique()
    rows = [
        (place, layer, None if place is None else captions.relative_module(place, layer))
        for place, layer in places.iter_rows()
    ]
    schema: dict[str, Any] = {"place": pl.String, "layer": nodes.schema["layer"], "path": pl.String}
    paths = pl.DataFrame(rows, schema=schema, orient="row")
    return nodes.join(paths, on=["place", "layer"], how="left", nulls_equal=True)
