"""One rank's part of the graph as columns, ready to be joined with the others', in memory or on disk.

Nodes have local numbers: operators in program order, then outputs, then what was there before (sources), then what no
operator launched on a GPU. Times are the rank's own. Texts are places in `texts`. A part is made where its trace lies,
by any process on any machine; what joins the parts reads the communications of all of them, and then one part after
the other.

On disk a part is a folder: `part.json` with what is told once, and files of its columns, one after the other, which are
mapped into memory and not read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.errors import MergeError
from truedag.tracer.merge.comms import CommRecord

NO_TIME = np.iinfo(np.int64).min
NODE_KINDS = ("input", "parameter", "compute", "collective", "send", "recv", "output")
INPUT, PARAMETER, COMPUTE, COLLECTIVE, SEND, RECV, OUTPUT = range(7)
EDGE_KINDS = ("data", "order", "p2p")  # in the order of the alphabet, which is that of the dataset
DATA, ORDER, P2P = 0, 1, 2

# Raised whenever what a part holds changes: parts of one version are joined.
PART_VERSION = 2
_TABLES = ("nodes", "edges", "unlabelled")
_ALIGNMENT = 64

Table = Mapping[str, NDArray[Any]]  # columns of one length


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One rank's part of the graph.

    `told` holds what is said once: rank, meta, closed, groups, group_ranks, num_operators, num_views, texts, layouts
    ([dtype, sizes] by number), shapes (columns by number), steps, first_start_ns, opaque, program, gpu_clock.
    """

    told: Mapping[str, Any]
    comms: list[CommRecord]
    nodes: Table  # kind, op, label, sort_ns, start_ns, end_ns, host_end_ns, thread, stream, shape, NUMBERS, TEXTS
    edges: Table  # src, dst, kind, bytes, layout; by src, then dst; `layout` -1: no tensor
    kernels: pl.DataFrame  # as the dataset's, `node` local
    unlabelled: Table  # src, dst: what may take its microbatch from what, `dst` alone (src -1) included

    @property
    def rank(self) -> int:
        """The rank."""
        return int(self.told["meta"]["rank"])

    @property
    def stage(self) -> int | None:
        """The rank's pipeline stage."""
        stage: int | None = self.told["meta"]["coordinates"].get("pp")
        return stage

    @property
    def num_nodes(self) -> int:
        """How many nodes it has, communications included."""
        return len(self.nodes["kind"])


def save_part(part: Part, folder: Path) -> None:
    """Write a part into a folder, which appears whole or not at all.

    Raises:
        MergeError: it cannot be written.
    """
    fresh = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        columns = {name: _save_table(getattr(part, name), fresh / f"{name}.columns") for name in _TABLES}
        part.kernels.write_ipc(fresh / "kernels.arrow", compression="uncompressed")
        _comm_table(part.comms).write_ipc(fresh / "comms.arrow", compression="uncompressed")
        text = json.dumps({"version": PART_VERSION, "columns": columns, "told": part.told})
        (fresh / "part.json").write_text(text, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    except OSError as error:
        raise MergeError(f"cannot write a rank's part into {folder}: {error}") from error


def load_part(folder: Path) -> Part:
    """Read a part; its columns are mapped, not read.

    Raises:
        MergeError: it is not there, or of another version.
    """
    try:
        said = json.loads((folder / "part.json").read_text(encoding="utf-8"))
        if said["version"] != PART_VERSION:
            raise MergeError(f"{folder} is of another version of truedag: make the parts of all ranks with this one")
        return Part(
            told=said["told"],
            comms=_comm_records(pl.read_ipc(folder / "comms.arrow")),
            kernels=pl.read_ipc(folder / "kernels.arrow"),
            **{name: _load_table(said["columns"][name], folder / f"{name}.columns") for name in _TABLES},
        )
    except (OSError, ValueError, KeyError, pl.exceptions.PolarsError) as error:
        raise MergeError(f"cannot read the part {folder}: {error}") from error


def _save_table(table: Table, path: Path) -> list[tuple[str, str, int, int]]:
    """Write a table's columns; return each one's name, dtype, where it begins and how many values it has."""
    told = []
    with path.open("wb") as file:
        for name, column in table.items():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            told.append((name, column.dtype.str, file.tell(), len(column)))
            file.write(np.ascontiguousarray(column).data)
    return told


def _load_table(told: Sequence[tuple[str, str, int, int]], path: Path) -> Table:
    if not path.stat().st_size:
        return {name: np.zeros(0, dtype) for name, dtype, _, _ in told}
    whole = np.memmap(path, np.uint8, "r")
    return {
        name: np.frombuffer(whole, dtype, count, offset) if count else np.zeros(0, dtype)
        for name, dtype, offset, count in told
    }


_COLUMN_TYPES = (("tuple", pl.List(pl.Int64)), ("str", pl.String()), ("bool", pl.Boolean()), ("int", pl.Int64()))


def _comm_table(comms: list[CommRecord]) -> pl.DataFrame:
    columns = {field.name: [getattr(record, field.name) for record in comms] for field in fields(CommRecord)}
    columns["group"] = [list(group) for group in columns["group"]]
    schema = {
        field.name: next(dtype for name, dtype in _COLUMN_TYPES if str(field.type).startswith(name))
        for field in fields(CommRecord)
    }
    return pl.DataFrame(columns, schema=schema)


def _comm_records(table: pl.DataFrame) -> list[CommRecord]:
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    found = []
    for row in table.iter_rows(named=True):
        group = tuple(row.pop("group"))
        found.append(CommRecord(group=known.setdefault(group, group), **row))
    return found
