"""The merged graph, opened from its dataset."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import polars as pl

from truedag.tracer.errors import GraphError

FORMAT_VERSION = 1
TABLES = ("nodes", "edges", "participants", "groups", "ranks")


@dataclass(frozen=True, slots=True)
class Graph:
    """A ground-truth DAG on disk; the tables are lazy Polars frames with the columns of docs/DESIGN.md.

    ``Graph.open("OUT/dag").nodes.filter(pl.col("layer") == 3).collect()``
    """

    path: Path
    meta: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Graph:
        """Open a dataset, or a run's folder that holds one in `dag/`.

        Raises:
            GraphError: there is none, a table is missing, or it is of another format version.
        """
        folder = Path(path)
        if not (folder / "meta.json").exists() and (folder / "dag" / "meta.json").exists():
            folder = folder / "dag"
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise GraphError(f"{folder} holds no dataset (no meta.json): name a run's folder or its dag/") from error
        except ValueError as error:
            raise GraphError(f"{folder / 'meta.json'} is no JSON: {error}") from error
        found = meta.get("format_version") if isinstance(meta, dict) else None
        if found != FORMAT_VERSION:
            raise GraphError(
                f"{folder} is a dataset of format version {found}, this truedag reads version {FORMAT_VERSION}: "
                "merge its traces again"
            )
        for table in TABLES:
            if not (folder / f"{table}.parquet").exists() and not (folder / table).is_dir():
                raise GraphError(f"{folder} lacks {table}.parquet: merge its traces again")
        return cls(folder, meta)

    @property
    def nodes(self) -> pl.LazyFrame:
        """Operators, communications, and what goes in and out, in topological order."""
        return self._table("nodes")

    @property
    def edges(self) -> pl.LazyFrame:
        """Data, messages and program order."""
        return self._table("edges")

    @property
    def participants(self) -> pl.LazyFrame:
        """Each rank's part in each communication."""
        return self._table("participants")

    @property
    def groups(self) -> pl.LazyFrame:
        """Process groups."""
        return self._table("groups")

    @property
    def ranks(self) -> pl.LazyFrame:
        """Ranks, where they stand on each axis, their clocks."""
        return self._table("ranks")

    @property
    def kernels(self) -> pl.LazyFrame:
        """Kernels and copies on GPUs, and the node that each belongs to; no rows where none was recorded."""
        return self._table("kernels")

    def to_networkx(self, *, order: bool = True) -> nx.MultiDiGraph[int]:
        """Return the graph with all columns as attributes; without `order`, only data and messages are edges."""
        graph: nx.MultiDiGraph[int] = nx.MultiDiGraph()
        graph.add_nodes_from((row.pop("node"), row) for row in self.nodes.collect().to_dicts())
        edges = self.edges if order else self.edges.filter(pl.col("kind") != "order")
        graph.add_edges_from((row.pop("src"), row.pop("dst"), row) for row in edges.collect().to_dicts())
        return graph

    def _table(self, name: str) -> pl.LazyFrame:
        single = self.path / f"{name}.parquet"
        # Of many ranks it is a folder of files, in order by themselves.
        return pl.scan_parquet(single) if single.exists() else pl.scan_parquet(self.path / name / "*.parquet")
