"""Between which layers a message from a stage to another goes."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from truedag.tracer.views.calls import CALL

Run = tuple[int, int]  # layers that follow each other: the first and the last


def find_boundaries(nodes: pl.DataFrame, edges: pl.DataFrame, members: pl.DataFrame) -> dict[int, set[tuple[int, int]]]:
    """Say of each folded message between which layers it goes: the last of a stage's layers and the first of another's.

    In the backward pass it is the first and the last. Of an interleaved stage, whose layers are several runs, it is the
    end of the run that its call had come to. Chosen tokens go from the last layer of all to the first.

    Args:
        nodes: node, rank, stage, layer, phase and CALL.
        edges: src, dst, kind.
        members: node and the fold that it is in.
    """
    layered = nodes.filter(pl.col("layer") >= 0).select("stage", "layer").unique().sort("stage", "layer")
    runs = {
        stage: _find_runs(layers)
        for stage, layers in layered.group_by("stage", maintain_order=True).agg("layer").iter_rows()
    }
    sent = edges.filter(pl.col("kind") == "p2p").select("src", "dst")
    come_to = pl.when(pl.col("layer") >= 0).then("layer").forward_fill().over("rank", "phase", *CALL)
    near = (
        nodes.filter((pl.col("layer") >= 0) | pl.col("node").is_in(sent["src"].implode()))
        .sort("node")
        .select("node", come_to=come_to)
    )
    ends = nodes.select("node", "stage", "phase").join(members, on="node")
    met = (
        sent.join(ends.rename({"node": "src"}), on="src")
        .join(ends.rename({"node": "dst"}), on="dst", suffix="_b")
        .join(near.rename({"node": "src"}), on="src", how="left")
        .filter(pl.col("stage") != pl.col("stage_b"))
        .select(
            "fold",
            "fold_b",
            "stage",
            "stage_b",
            "come_to",
            falls=(pl.col("phase") == "backward").fill_null(value=False),
        )
        .unique()
    )
    found: dict[int, set[tuple[int, int]]] = {}
    for src, dst, stage, other, layer, falls in met.iter_rows():
        if stage in runs and other in runs:
            pair = _find_pair(runs[stage], runs[other], layer, falls=falls)
            for fold in (src, dst):
                found.setdefault(fold, set()).add(pair)
    return found


def _find_runs(layers: Sequence[int]) -> list[Run]:
    runs: list[Run] = []
    for layer in layers:
        if runs and runs[-1][1] + 1 == layer:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs


def _find_pair(here: Sequence[Run], there: Sequence[Run], layer: int | None, *, falls: bool) -> tuple[int, int]:
    """Return the end of the run that a layer is of, and of the run there that goes on, if one does."""
    own = [run for run in here if layer is not None and run[0] <= layer <= run[1]] or here
    if falls:
        out = own[0][0]
        return out, next((high for _, high in there if high == out - 1), there[-1][1])
    out = own[-1][1]
    return out, next((low for low, _ in there if low == out + 1), there[0][0])
