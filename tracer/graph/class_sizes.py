"""Sizes that ranks of a class, or groups of a team, have of their own: read from tables beside the class graph's rows.

A table has, by row of the class graph and turn of what the row stands for, the columns that are otherwise there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from truedag.tracer.graph.class_world import Ints

# By table of the class graph: the table of its sizes.
SIZE_TABLES = {"nodes": "node_sizes", "edges": "edge_sizes", "participants": "participant_sizes"}
_KEYS = ("row", "turn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The table of one of the class graph's tables."""

    keys: Ints  # ascending: row and turn as one number
    width: int  # more than any turn
    values: pl.DataFrame

    @classmethod
    def read(cls, folder: Path, table: str) -> Sizes | None:
        """Return the sizes beside a table; None: all that a row stands for have equal ones."""
        path = folder / f"{SIZE_TABLES[table]}.parquet"
        if not path.exists():
            return None
        frame = pl.read_parquet(path)
        row, turn = (frame[name].to_numpy() for name in _KEYS)
        width = int(turn.max(initial=0)) + 1
        return cls(keys=row * width + turn, width=width, values=frame.drop(_KEYS))

    def lay_over(self, frame: pl.DataFrame, row: Ints, turn: Ints) -> pl.DataFrame:
        """Return the frame with the sizes that are otherwise.

        Args:
            frame: any columns of the table.
            row: of each of its rows, the one of the class graph.
            turn: of which rank of the class, or group of the team, it is.
        """
        names = [name for name in self.values.columns if name in frame.columns]
        if not names:
            return frame
        asked = np.where(turn < self.width, row * self.width + turn, -1)
        place = np.searchsorted(self.keys, asked)
        found = np.flatnonzero(np.append(self.keys, -2)[place] == asked)
        if not len(found):
            return frame
        own = place[found].astype(np.uint32)
        # Where each row's values are, in those of the frame and the others' after them.
        pick = np.arange(len(frame), dtype=np.uint32)
        pick[found] = len(frame) + np.arange(len(found), dtype=np.uint32)
        columns = [pl.concat([frame[name], self.values[name][own]])[pick].alias(name) for name in names]
        return frame.with_columns(columns)
