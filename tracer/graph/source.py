"""What a graph is read from: tables of docs/DESIGN.md by name, as lazy frames."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Protocol

import polars as pl

FORMAT_VERSION = 1
TABLES = ("nodes", "edges", "participants", "groups", "ranks")


class TableSource(Protocol):
    """Where the tables of a whole graph come from: files, or something that makes them when they are asked for.

    `Graph` needs nothing else of it, and hands out every subgraph, fold and search on top of it. Node numbers are a
    topological order; they need not be dense.
    """

    @property
    def path(self) -> Path:
        """Where it lies, for people and for what is written beside it."""
        ...

    @property
    def meta(self) -> Mapping[str, Any]:
        """What `meta.json` says."""
        ...

    def scan(self, table: str, ranks: AbstractSet[int] | None = None) -> pl.LazyFrame:
        """Return a table with the columns of docs/DESIGN.md, sorted as it says.

        Args:
            table: one of TABLES, or kernels.
            ranks: only what concerns one of these is wanted: their nodes and the collectives that they take part in,
                every edge with an end among those, all participants of those collectives. More may be returned.

        Raises:
            GraphError: there is no such table.
        """
        ...
