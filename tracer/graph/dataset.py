"""A dataset on disk as the source of a graph: each table one Parquet file, or a folder of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from truedag.tracer.errors import GraphError
from truedag.tracer.graph.source import FORMAT_VERSION, TABLES

# A table in one file lies in this order; one in many files is brought into it.
_ORDER = {
    "nodes": ("node",),
    "edges": ("src", "dst", "kind", "bytes"),
    "participants": ("node", "rank"),
    "groups": ("group",),
    "ranks": ("rank",),
    "kernels": ("rank", "start_ns", "correlation"),
}


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset's folder: `nodes.parquet`, or `nodes/*.parquet` where there are many ranks, and so on."""

    path: Path
    meta: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
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
        dataset = cls(folder, meta)
        for table in TABLES:
            dataset._files(table)
        return dataset

    def scan(self, table: str, ranks: AbstractSet[int] | None = None) -> pl.LazyFrame:
        """Return a table; of files that tell their ranks in their statistics, Polars reads those that it needs.

        Raises:
            GraphError: there is no such table.
        """
        files = self._files(table)
        frame = pl.scan_parquet(files)
        if ranks is not None and table == "nodes":
            frame = frame.filter((pl.col("rank") < 0) | pl.col("rank").is_in(list(ranks)))
        return frame if isinstance(files, Path) else frame.sort(_ORDER[table])

    def files(self, table: str) -> list[Path]:
        """Return the files of a table.

        Raises:
            GraphError: there is no such table.
        """
        files = self._files(table)
        return [files] if isinstance(files, Path) else files

    def _files(self, table: str) -> Path | list[Path]:
        """One file, or several, even if there is but one in the table's folder."""
        single = self.path / f"{table}.parquet"
        if single.exists():
            return single
        several = sorted((self.path / table).glob("*.parquet"))
        if not several:
            raise GraphError(
                f"{self.path} lacks {table}.parquet, and {table}/ with Parquet files: merge its traces again"
            )
        return several
