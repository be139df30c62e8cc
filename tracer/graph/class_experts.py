"""The numbers of experts in rows that were made of one rank's: in their column, and in the names of what they are."""

from __future__ import annotations

import re

import numpy as np
import polars as pl

from truedag.tracer.graph.class_world import Bools, Ints

_EXPERT = re.compile(r"(\.local_experts\.)(\d+)")
_TEXTS = ("label", "module", "gradient")


def names_experts(nodes: pl.DataFrame) -> Bools:
    """Return which nodes say the number of an expert."""
    told = [pl.col(name).str.contains(_EXPERT.pattern).fill_null(False) for name in _TEXTS]
    found: Bools = nodes.select(pl.any_horizontal(pl.col("expert") >= 0, *told)).to_series().to_numpy()
    return found


def move_experts(frame: pl.DataFrame, rows: Ints, moved: Ints) -> pl.DataFrame:
    """Return the frame with higher numbers of experts in some rows.

    Args:
        frame: any columns of nodes.
        rows: which.
        moved: how much higher each one's numbers are.
    """
    if not len(rows):
        return frame
    columns = {}
    if "expert" in frame.columns:
        expert = frame["expert"].to_numpy().copy()
        expert[rows] += np.where(expert[rows] >= 0, moved, 0).astype(expert.dtype)
        columns["expert"] = pl.Series(expert)
    for name in _TEXTS:
        if name in frame.columns:
            some = pl.DataFrame({"text": frame[name][rows.astype(np.uint32)], "moved": moved})
            pairs = some.unique()
            said = [None if text is None else _move(text, by) for text, by in pairs.iter_rows()]
            found = some.join(
                pairs.with_columns(said=pl.Series(said, dtype=pl.String)),
                on=["text", "moved"],
                how="left",
                nulls_equal=True,
                maintain_order="left",
            )["said"]
            columns[name] = frame[name].scatter(pl.Series(rows.astype(np.uint32)), found)
    return frame.with_columns(column.alias(name) for name, column in columns.items())


def _move(text: str, by: int) -> str:
    return _EXPERT.sub(lambda match: f"{match[1]}{int(match[2]) + by}", text)
