"""The dataset's tables as CSV, for spreadsheets and whatever does not read Parquet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl

from truedag.tracer.graph import Graph

_TABLES = ("nodes", "edges", "participants", "groups", "ranks", "kernels")


def write_csv(graph: Graph, folder: Path, show: Callable[[str], None]) -> Mapping[str, int]:
    """Write each table as NAME.csv with a head; lists are numbers with spaces between, what is unknown is empty.

    Raises:
        OSError: a file cannot be written.
    """
    counts = {}
    for name in _TABLES:
        show(f"writing {name}")
        table: pl.LazyFrame = getattr(graph, name)
        lists = [key for key, dtype in table.collect_schema().items() if isinstance(dtype, pl.List)]
        plain = table.with_columns(pl.col(key).cast(pl.List(pl.String)).list.join(" ") for key in lists)
        plain.sink_csv(folder / f"{name}.csv")
        counts[f"num_{name}"] = int(table.select(pl.len()).collect().item())
    return counts
