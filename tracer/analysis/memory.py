"""Memory that the graph knows of: parameters, what was there before, and results that are still to be read.

A result is live from the operator that wrote it to the last that reads it, in the rank's program order; of a result
that is read in parts, the largest part that is still to be read. This needs no times. It is what the program's data
need at least: buffers that an allocator keeps, and what an operator takes inside, are not in it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import polars as pl

from truedag.tracer.graph.tensor_types import read_tensors

_WIDTH = re.compile(r"[a-z]+(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """What a rank's data need, in bytes.

    Attributes:
        rank: the rank.
        parameter_bytes: its parameters.
        state_bytes: other tensors that were there when the recording began: optimizer state, gradients, KV cache.
        live_bytes: results that are still to be read, at most.
        peak_node: the operator after which that was.
        peak_label, peak_phase: what that operator is; None is unknown.
    """

    rank: int
    parameter_bytes: int
    state_bytes: int
    live_bytes: int
    peak_node: int | None
    peak_label: str | None
    peak_phase: str | None


def measure_memory(nodes: pl.DataFrame, edges: pl.DataFrame, sources: pl.DataFrame) -> list[RankMemory]:
    """Return each rank's memory.

    Args:
        nodes: node, kind, rank, label, phase.
        edges: src, dst, bytes of data edges.
        sources: rank, kind and outputs of parameters and inputs.
    """
    sizes = {text: count_bytes(text) for text in sources["outputs"].drop_nulls().unique().to_list()}
    held = sources.with_columns(size=pl.col("outputs").replace_strict(sizes, default=0, return_dtype=pl.Int64))
    by_rank = held.group_by("rank").agg(
        parameter=pl.col("size").filter(pl.col("kind") == "parameter").sum(),
        state=pl.col("size").filter(pl.col("kind") == "input").sum(),
    )
    peaks = _find_peaks(nodes, edges)
    ranks = nodes.filter(pl.col("rank") >= 0).select("rank").unique()
    rows = ranks.join(by_rank, on="rank", how="left").join(peaks, on="rank", how="left").sort("rank")
    return [
        RankMemory(
            rank=row["rank"], parameter_bytes=row["parameter"] or 0, state_bytes=row["state"] or 0,
            live_bytes=row["live"] or 0, peak_node=row["node"], peak_label=row["label"], peak_phase=row["phase"],
        )
        for row in rows.iter_rows(named=True)
    ]  # fmt: skip


def count_bytes(types: str) -> int:
    """Return the bytes of tensors from their types, such as float32[2,4]."""
    total = 0
    for dtype, sizes in read_tensors(types):
        bits = _WIDTH.match(dtype)  # bool alone has none in its name
        total += math.prod(sizes) * (8 if bits is None else int(bits[1])) // 8
    return total


def _find_peaks(nodes: pl.DataFrame, edges: pl.DataFrame) -> pl.DataFrame:
    """Return rank, live, node, label and phase of each rank's peak; node numbers are the clock."""
    told = nodes.select("node", "kind", "rank")
    ends = edges.join(told.rename({"node": "src"}), on="src").join(told.select(dst="node", reader="rank"), on="dst")
    # A collective's results are on the ranks that read them; what was there before is counted apart.
    ends = ends.filter(~pl.col("kind").is_in(["parameter", "input"])).with_columns(
        rank=pl.when(pl.col("rank") >= 0).then("rank").otherwise("reader")
    )
    readers = ends.filter(pl.col("rank") >= 0).group_by("rank", "src", "dst").agg(pl.col("bytes").max())
    readers = readers.sort("rank", "src", "dst", descending=[False, False, True])
    over = ["rank", "src"]
    readers = readers.with_columns(needed=pl.col("bytes").cum_max().over(over))
    freed = readers.select(
        "rank", node="dst", change=pl.col("needed").shift(1, fill_value=0).over(over) - pl.col("needed"), is_end=True
    )
    made = readers.group_by(over, maintain_order=True).agg(pl.col("needed").last())
    born = made.select("rank", node="src", change="needed", is_end=False)
    # After an operator: its results are there, and what it read last is not yet gone.
    events = pl.concat([born, freed]).sort("rank", "node", "is_end")
    live = events.with_columns(live=pl.col("change").cum_sum().over("rank"))
    peaks = live.group_by("rank").agg(
        pl.col("live").max(), pl.col("node").sort_by("live", descending=True, maintain_order=True).first()
    )
    return peaks.join(nodes.select("node", "label", "phase"), on="node", how="left")
