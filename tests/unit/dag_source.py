"""A small graph of tests as a graph that lies in memory."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from small_dag import SmallDag

from truedag.tracer.graph import Graph

NO_KERNELS = pl.DataFrame(
    schema={"node": pl.Int64, "rank": pl.Int32, "device": pl.Int32, "stream": pl.Int32, "name": pl.String,
            "kind": pl.String, "start_ns": pl.Int64, "end_ns": pl.Int64}
)  # fmt: skip


class DagSource:
    """The tables of a small graph."""

    def __init__(self, dag: SmallDag) -> None:
        self.path, self.meta = Path("small"), {"deployment": "small"}
        self.frames = dag.frames() | {"kernels": NO_KERNELS}

    def scan(self, table: str, ranks: frozenset[int] | None = None) -> pl.LazyFrame:
        return self.frames[table].lazy()


def as_graph(dag: SmallDag) -> Graph:
    return Graph(DagSource(dag))
