"""Between which layers a message from a stage to another goes."""

from __future__ import annotations

import polars as pl


def find_boundaries(nodes: pl.DataFrame, edges: pl.DataFrame, members: pl.DataFrame) -> dict[int, set[tuple[int, int]]]:
    """Say of each folded message between which layers it goes: the last of a stage and the first of another.

    In the backward pass it is the first of a stage and the last of another. Chosen tokens go from the last layer of all
    to the first.

    Args:
        nodes: node, stage, layer, phase.
        edges: src, dst, kind.
        members: node and the fold that it is in.
    """
    spans = (
        nodes.filter(pl.col("layer") >= 0).group_by("stage").agg(low=pl.col("layer").min(), high=pl.col("layer").max())
    )
    ends = nodes.select("node", "stage", "phase").join(members, on="node").join(spans, on="stage")
    met = (
        edges.filter(pl.col("kind") == "p2p")
        .join(ends.rename({"node": "src"}), on="src")
        .join(ends.rename({"node": "dst"}), on="dst", suffix="_b")
        .filter(pl.col("stage") != pl.col("stage_b"))
        .select("fold", "fold_b", "low", "high", "low_b", "high_b", falls=pl.col("phase") == "backward")
        .unique()
    )
    found: dict[int, set[tuple[int, int]]] = {}
    for src, dst, low, high, low_there, high_there, falls in met.iter_rows():
        pair = (low, high_there) if falls else (high, low_there)
        for fold in (src, dst):
            found.setdefault(fold, set()).add(pair)
    return found
