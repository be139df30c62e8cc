"""How deep in its call an operator is: what folds a sheet of too many operators by more than their calls.

The depth is the number of operators on the longest way to it inside its call. Operators of one name at one depth, the
update of each parameter say, then stand in one box; edges lead to greater depths, so that what is left is a DAG.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from truedag.tracer.views.calls import CALL


def add_depths(items: pl.DataFrame, edges: pl.DataFrame) -> pl.DataFrame:
    """Add depth to items of one phase.

    Args:
        items: node, rank, layer and the columns of CALL; a collective has a row for each rank.
        edges: src and dst, of data and messages; those within a call count.
    """
    numbers, first = np.unique(items["node"].to_numpy(), return_index=True)
    calls = items.select(pl.struct("layer", *CALL).rank("dense")).to_series().to_numpy()[first]
    known = edges.filter(pl.col("src").is_in(numbers) & pl.col("dst").is_in(numbers)).select("src", "dst").sort("src")
    src, dst = (np.searchsorted(numbers, known[end].to_numpy()) for end in ("src", "dst"))
    inside = calls[src] == calls[dst]
    depth = [0] * len(numbers)
    for one, other in zip(src[inside].tolist(), dst[inside].tolist(), strict=True):  # numbers are topological
        depth[other] = max(depth[other], depth[one] + 1)
    told = pl.DataFrame({"node": numbers, "depth": depth}, schema={"node": items.schema["node"], "depth": pl.Int64})
    return items.join(told, on="node", how="left", maintain_order="left")
