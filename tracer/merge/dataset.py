"""The dataset's folder: the Parquet files of docs/DESIGN.md, format version 1, and `meta.json`.

A small graph is one file a table, in order: `nodes.parquet` by node, `edges.parquet` by src and dst. A large one has
folders of the same names, `nodes/`, `edges/` and `kernels/`, whose files hold some ranks each, in order by themselves:
what lies in a folder is one table to Polars, DuckDB, Spark or Dask. How it is divided goes by the graph alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.errors import MergeError
from truedag.tracer.graph import FORMAT_VERSION
from truedag.tracer.merge.align import Clock
from truedag.tracer.merge.finishing import NODES_IN_A_FILE, write_table
from truedag.tracer.merge.joining import Group, Joined, RankComms
from truedag.tracer.merge.match import Matched
from truedag.tracer.merge.opaque import tell_opaque

AXES = ("tp", "ep", "etp", "pp", "dp", "edp", "cp")
TABLES = ("nodes", "edges", "kernels")
# A graph of at most so many nodes is one file a table.
_NODES_OF_A_SMALL_GRAPH = 1 << 20


def divide(num_nodes: Mapping[int, int]) -> list[list[int]]:
    """Return which ranks share a file, or one list of all: then the graph is small.

    Args:
        num_nodes: by rank.
    """
    if sum(num_nodes.values()) <= _NODES_OF_A_SMALL_GRAPH:
        return [list(num_nodes)]
    files: list[list[int]] = []
    room = 0
    for rank, count in num_nodes.items():
        if not files or count > room:
            files.append([])
            room = NODES_IN_A_FILE
        files[-1].append(rank)
        room -= count
    return files


def file_names(folder: Path, ranks: Sequence[int] | None, *, is_small: bool) -> dict[str, Path]:
    """Return each table's file; `ranks` None: of what spans ranks."""
    if is_small:
        return {table: folder / f"{table}.parquet" for table in TABLES}
    name = "all-ranks" if ranks is None else f"ranks-{ranks[0]:05d}-{ranks[-1]:05d}"
    return {table: folder / table / f"{name}.parquet" for table in TABLES}


def begin_folder(folder: Path) -> Path:
    """Return a new folder to write the dataset into.

    Raises:
        MergeError: it cannot be made, or what is there is no dataset.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "meta.json").exists():
        raise MergeError(f"{folder} holds something that is no dataset of truedag: name another folder")
    fresh = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
    except OSError as error:
        raise MergeError(f"cannot write the dataset {folder}: {error}") from error
    return fresh


def finish_folder(fresh: Path, folder: Path, frames: Mapping[str, pl.DataFrame], meta: Mapping[str, Any]) -> None:
    """Write what is left, and let the folder appear.

    Raises:
        MergeError: it cannot be written.
    """
    try:
        for name, frame in frames.items():
            write_table(frame, fresh / f"{name}.parquet")
        (fresh / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    except OSError as error:
        raise MergeError(f"cannot write the dataset {folder}: {error}") from error


def describe_run(
    ranks: Mapping[int, RankComms],
    joined: Joined,
    matched: Matched,
    *,
    origin_ns: int,
    counts: Mapping[str, int],
    memory: Sequence[Mapping[str, Any]],
    missing_ranks: Sequence[int],
    deployment: str | None,
    strategy: str | None,
) -> dict[str, Any]:
    """Return what `meta.json` says."""
    first = next(iter(ranks.values())).told["meta"]
    steps = {step for one in ranks.values() for step in one.told["steps"]}
    steps |= {label.step for label in _alone(ranks, joined) if label.step is not None}
    steps |= {one.belonging.step for one in joined.collectives if one.belonging.step is not None}
    return {
        "format_version": FORMAT_VERSION,
        "deployment": deployment,
        "strategy": strategy,
        "world_size": int(first["world_size"]),
        "missing_ranks": list(missing_ranks),
        "incomplete_ranks": [rank for rank, one in ranks.items() if not one.told["closed"]],
        "steps": sorted(steps),
        "torch": str(first["torch"]),
        "truedag": version("truedag"),
        "recorder": str(first["recorder"]),
        "clock_origin_ns": origin_ns,
        "num_nodes": counts["nodes"],
        "num_edges": counts["edges"],
        "num_views_dropped": sum(one.told["num_views"] for one in ranks.values()),
        "num_collectives": len(matched.collectives),
        "num_messages": len(matched.messages),
        "num_unmatched": len(matched.unmatched),
        "num_kernels": counts["kernels"],
        "memory": list(memory),
        "opaque": [told for rank, one in ranks.items() for told in tell_opaque(rank, one.told["opaque"])],
        "unmatched": [one.describe() for one in matched.unmatched],
    }


def find_origin(ranks: Mapping[int, RankComms], joined: Joined, clocks: Mapping[int, Clock]) -> int:
    """Return when the first node began."""
    starts = [
        clocks[rank].at(one.told["first_start_ns"])
        for rank, one in ranks.items()
        if one.told["first_start_ns"] is not None
    ]
    starts += [
        clocks[rank].at(one.start_ns[record.node])
        for rank, one in ranks.items()
        for record in one.comms
        if record.node not in joined.places[rank]
    ]
    starts += [one.start_ns for one in joined.collectives]
    return min(starts, default=0)


def _alone(ranks: Mapping[int, RankComms], joined: Joined) -> list[Any]:
    """The labels of communications that are nodes of their own."""
    return [
        label for rank, one in ranks.items() for node, label in one.labels.items() if node not in joined.places[rank]
    ]


def small_tables(
    ranks: Mapping[int, RankComms],
    joined: Joined,
    clocks: Mapping[int, Clock],
    numbers: Mapping[int, NDArray[np.int64]],
    origin_ns: int,
) -> dict[str, pl.DataFrame]:
    """Return the tables that are one file always: participants, groups and ranks."""
    group_numbers: dict[Group, int] = {}
    participants = _participants(joined, numbers, origin_ns, group_numbers)
    return {
        "participants": participants,
        "groups": _groups(ranks, group_numbers),
        "ranks": _ranks(ranks, clocks),
    }


def _participants(
    joined: Joined, numbers: Mapping[int, NDArray[np.int64]], origin_ns: int, group_numbers: dict[Group, int]
) -> pl.DataFrame:
    rows = joined.participants
    names = ("node", "rank", "group", "seq", "arrive_ns", "start_ns", "end_ns", "send_bytes", "recv_bytes", "waited_ns")
    columns: dict[str, list[Any]] = {
        name: [getattr(row, name) for row in rows] for name in names if name not in ("node", "group")
    }
    columns["node"] = [int(numbers[row.owner][row.node]) for row in rows]
    columns["group"] = [group_numbers.setdefault(row.group, len(group_numbers)) for row in rows]
    schema = dict.fromkeys(names, pl.Int64) | {"rank": pl.Int32, "group": pl.Int32}
    frame = pl.DataFrame({name: columns[name] for name in names}, schema=schema)
    times = [pl.col(name) - origin_ns for name in ("arrive_ns", "start_ns", "end_ns")]
    return frame.with_columns(times).sort("node", "rank", maintain_order=True)


def _groups(ranks: Mapping[int, RankComms], group_numbers: dict[Group, int]) -> pl.DataFrame:
    """All groups that any rank told of, used or not; those with communications keep their numbers."""
    axes: dict[Group, str | None] = {}
    descriptions: dict[Group, str] = {}
    for one in ranks.values():
        for told in one.told["group_ranks"]:
            key = (str(told["name"]), tuple(told["ranks"]))
            axes[key] = axes.get(key) or told.get("axis")
        for told in one.told["groups"]:
            description = str(told.get("description") or "")
            members = tuple(told.get("ranks") or ())
            descriptions[str(told["name"]), members] = description
            if not members:  # torch lists none of the group of all ranks
                descriptions[str(told["name"]), tuple(range(int(told.get("size") or 0)))] = description
    for key in sorted(axes):
        group_numbers.setdefault(key, len(group_numbers))
    keys = sorted(group_numbers, key=lambda key: group_numbers[key])
    return pl.DataFrame(
        {
            "group": range(len(keys)),
            "axis": [axes.get(key) for key in keys],
            "ranks": [list(key[1]) for key in keys],
            "name": [key[0] for key in keys],
            "description": [descriptions.get(key, "") for key in keys],
        },
        schema={
            "group": pl.Int32,
            "axis": pl.String,
            "ranks": pl.List(pl.Int64),
            "name": pl.String,
            "description": pl.String,
        },
    )


def _ranks(ranks: Mapping[int, RankComms], clocks: Mapping[int, Clock]) -> pl.DataFrame:
    classes: dict[str, int] = {}
    rows = []
    for rank, one in ranks.items():
        meta = one.told["meta"]
        correction, drift, error = one.told["gpu_clock"] or (None, None, None)
        rows.append(
            {
                "rank": rank,
                "host": meta["host"],
                "device": meta["device"],
                **{axis: meta["coordinates"].get(axis, -1) for axis in AXES},
                "rank_class": classes.setdefault(one.told["program"], len(classes)),
                "clock_offset_ns": clocks[rank].offset_ns,
                "clock_error_ns": clocks[rank].error_ns,
                "gpu_clock_correction_ns": correction,
                "gpu_clock_drift_ns": drift,
                "gpu_clock_error_ns": error,
            }
        )
    schema = {"rank": pl.Int32, "host": pl.String, "device": pl.String}
    schema |= dict.fromkeys(AXES, pl.Int32)
    schema |= {"rank_class": pl.Int32, "clock_offset_ns": pl.Int64, "clock_error_ns": pl.Int64}
    schema |= dict.fromkeys(("gpu_clock_correction_ns", "gpu_clock_drift_ns", "gpu_clock_error_ns"), pl.Int64)
    return pl.DataFrame(rows, schema=schema)
