"""Write the Parquet files of the nodes, edges and kernels of some ranks: the last step, done rank by rank."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.errors import MergeError
from truedag.tracer.merge.clock import Clock
from truedag.tracer.merge.joining import CollectiveNode
from truedag.tracer.merge.part import Part, load_part
from truedag.tracer.merge.rank_part import KERNEL_SCHEMA
from truedag.tracer.merge.tables import (
    NODE_SCHEMA,
    EdgeRows,
    RankPlan,
    collective_nodes,
    edge_table,
    rank_edges,
    rank_kernels,
    rank_nodes,
)

# A file of a large graph holds at most so many nodes, or edges: that is what a process has in memory at once.
NODES_IN_A_FILE = 1 << 19
EDGES_IN_A_FILE = 1 << 20
_ROW_GROUP = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTask:
    """One rank's rows: its part and its nodes' numbers, or where they lie, and what joining found."""

    part: Part | Path
    number: NDArray[np.int64] | Path
    places: Mapping[int, int]  # the collectives that took nodes' places
    clock: Clock
    origin_ns: int
    labels: Mapping[int, str]
    microbatches: Mapping[int, tuple[int, str | None]]
    dropped: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTask:
    """The rows of some ranks, of collectives and of messages, and into which files they go.

    `names` gives each table's file. Unless the graph is small there are as many as rows need: `-00000` and so on are
    put to its name.
    """

    ranks: Sequence[RankTask]
    collectives: Sequence[CollectiveNode]
    numbers: NDArray[np.int64]  # of the collectives
    messages: EdgeRows | None
    origin_ns: int
    names: Mapping[str, Path]
    is_small: bool


def write_files(task: FileTask) -> dict[str, int]:
    """Write a task's files; return how many rows each table has in them.

    Raises:
        MergeError: they cannot be written, or a part cannot be read.
    """
    loaded = [_load(rank) for rank in task.ranks]
    counts = {}
    try:
        for table, frames in (
            ("nodes", _nodes(task, loaded)),
            ("edges", _edges(task, loaded)),
            ("kernels", _kernels(loaded)),
        ):
            counts[table] = 0
            for place, frame in enumerate(frames):
                path = task.names[table]
                write_table(frame, path if task.is_small else path.with_name(f"{path.stem}-{place:05d}{path.suffix}"))
                counts[table] += len(frame)
    except OSError as error:
        raise MergeError(f"cannot write the dataset: {error}") from error
    return counts


def write_table(frame: pl.DataFrame, path: Path) -> None:
    """Write a Parquet file, the same bytes for the same rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.rechunk().write_parquet(
        path, compression="zstd", compression_level=1, statistics=True, row_group_size=_ROW_GROUP
    )


def _load(task: RankTask) -> tuple[Part, RankPlan]:
    part = load_part(task.part) if isinstance(task.part, Path) else task.part
    number = np.load(task.number, mmap_mode="r") if isinstance(task.number, Path) else task.number
    collective = np.full(len(number), -1)
    collective[list(task.places)] = list(task.places.values())
    plan = RankPlan(
        number=number,
        collective=collective,
        clock=task.clock,
        origin_ns=task.origin_ns,
        labels=task.labels,
        microbatches=task.microbatches,
        dropped=task.dropped,
    )
    return part, plan


def _nodes(task: FileTask, loaded: Sequence[tuple[Part, RankPlan]]) -> Iterator[pl.DataFrame]:
    if len(loaded) == 1 and not task.is_small:
        yield from rank_nodes(*loaded[0], at_once=NODES_IN_A_FILE)
        return
    frames = [pl.DataFrame(schema=NODE_SCHEMA)]
    if task.collectives:
        frames.append(collective_nodes(task.collectives, task.numbers, task.origin_ns))
    for part, plan in loaded:
        frames.extend(rank_nodes(part, plan, at_once=len(plan.number) + 1))
    yield pl.concat(frames).sort("node")


def _edges(task: FileTask, loaded: Sequence[tuple[Part, RankPlan]]) -> Iterator[pl.DataFrame]:
    rows = [rank_edges(part, plan) for part, plan in loaded]
    if task.messages is not None:
        rows.append(task.messages)
    yield from edge_table(rows, at_once=sys.maxsize if task.is_small else EDGES_IN_A_FILE)


def _kernels(loaded: Sequence[tuple[Part, RankPlan]]) -> Iterator[pl.DataFrame]:
    yield pl.concat([pl.DataFrame(schema=KERNEL_SCHEMA), *(rank_kernels(part, plan) for part, plan in loaded)])
