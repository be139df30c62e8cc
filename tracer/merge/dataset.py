"""Write the graph to disk: the Parquet dataset of docs/DESIGN.md, format version 1.

Times are ns since the recording began on the lowest rank's clock (`meta.json` gives that moment). null is unknown.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.errors import MergeError
from truedag.tracer.graph import FORMAT_VERSION
from truedag.tracer.merge.align import Clock
from truedag.tracer.merge.columns import EDGE_KINDS, Assembly
from truedag.tracer.merge.kernels import KERNEL_KINDS
from truedag.tracer.merge.match import Matched
from truedag.tracer.merge.opaque import tell_opaque
from truedag.tracer.merge.rank_graph import RankGraph

AXES = ("tp", "ep", "etp", "pp", "dp", "edp", "cp")
_COMMUNICATION = frozenset({"collective", "send", "recv"})


def write_dataset(
    folder: Path,
    assembly: Assembly,
    number: NDArray[np.int64],
    *,
    graphs: Sequence[RankGraph],
    clocks: Mapping[int, Clock],
    matched: Matched,
    missing_ranks: Sequence[int],
    deployment: str | None,
    strategy: str | None,
) -> None:
    """Write all tables and `meta.json` into a folder that appears whole or not at all.

    Raises:
        MergeError: the folder cannot be written, or holds something that is no dataset.
    """
    starts = [start for start in assembly.start_ns if start is not None]
    origin = min(starts, default=0)
    group_numbers: dict[tuple[str, tuple[int, ...]], int] = {}
    frames = {
        "nodes": _nodes(assembly, number, origin),
        "edges": _edges(assembly, number),
        "participants": _participants(assembly, number, origin, group_numbers),
    }
    frames["kernels"] = _kernels(assembly, number, origin)
    frames["groups"] = _groups(graphs, group_numbers)
    frames["ranks"] = _ranks(graphs, clocks)
    meta = {
        "format_version": FORMAT_VERSION,
        "deployment": deployment,
        "strategy": strategy,
        "world_size": int(graphs[0].nodes.trace.meta["world_size"]),
        "missing_ranks": list(missing_ranks),
        "incomplete_ranks": [graph.rank for graph in graphs if not graph.nodes.trace.closed],
        "steps": sorted({label.step for label in assembly.labels if label.step is not None}),
        "torch": str(graphs[0].nodes.trace.meta["torch"]),
        "truedag": version("truedag"),
        "recorder": str(graphs[0].nodes.trace.meta["recorder"]),
        "clock_origin_ns": origin,
        "num_nodes": len(frames["nodes"]),
        "num_edges": len(frames["edges"]),
        "num_views_dropped": sum(graph.nodes.num_views for graph in graphs),
        "num_collectives": len(matched.collectives),
        "num_messages": len(matched.messages),
        "num_unmatched": len(matched.unmatched),
        "num_kernels": len(frames["kernels"]),
        "opaque": tell_opaque(assembly),
        "unmatched": [one.describe() for one in matched.unmatched],
    }
    _replace(folder, frames, meta)


def _replace(folder: Path, frames: Mapping[str, pl.DataFrame], meta: Mapping[str, Any]) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / "meta.json").exists():
        raise MergeError(f"{folder} holds something that is no dataset of truedag: name another folder")
    fresh = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for name, frame in frames.items():
            frame.write_parquet(fresh / f"{name}.parquet", compression="zstd", statistics=True)
        (fresh / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    except OSError as error:
        raise MergeError(f"cannot write the dataset {folder}: {error}") from error


def _nodes(assembly: Assembly, number: NDArray[np.int64], origin: int) -> pl.DataFrame:
    labels = assembly.labels
    timed = [
        start is not None and end is not None for start, end in zip(assembly.start_ns, assembly.end_ns, strict=True)
    ]
    frame = pl.DataFrame(
        {
            "node": number,
            "kind": assembly.kind,
            "category": [
                "communication" if kind in _COMMUNICATION else label.category or "computation"
                for kind, label in zip(assembly.kind, labels, strict=True)
            ],
            "rank": assembly.rank,
            "op": assembly.op,
            "label": assembly.label,
            "module": [label.module for label in labels],
            "layer": [-1 if label.layer is None else label.layer for label in labels],
            "stage": [-1 if stage is None else stage for stage in assembly.stage],
            "microbatch": [-1 if label.microbatch is None else label.microbatch for label in labels],
            "expert": [-1 if label.expert is None else label.expert for label in labels],
            "phase": [label.phase for label in labels],
            "step": [-1 if label.step is None else label.step for label in labels],
            "decode_step": [-1 if label.decode_step is None else label.decode_step for label in labels],
            "thread": assembly.thread,
            "stream": assembly.stream,
            "start_ns": assembly.start_ns,
            "end_ns": assembly.end_ns,
            "host_start_ns": assembly.host_start_ns,
            "host_end_ns": assembly.host_end_ns,
            "timing": ["measured" if known else "none" for known in timed],
            "flops": assembly.flops,
            "bytes_read": assembly.bytes_read,
            "bytes_written": assembly.bytes_written,
            "gradient": [label.gradient for label in labels],
            "inputs": assembly.inputs,
            "outputs": assembly.outputs,
        },
        schema={
            "node": pl.Int64, "kind": pl.String, "category": pl.String, "rank": pl.Int32, "op": pl.String,
            "label": pl.String, "module": pl.String, "layer": pl.Int32, "stage": pl.Int32, "microbatch": pl.Int32,
            "expert": pl.Int32, "phase": pl.String, "step": pl.Int32, "decode_step": pl.Int32, "thread": pl.Int32,
            "stream": pl.Int32, "start_ns": pl.Int64, "end_ns": pl.Int64, "host_start_ns": pl.Int64,
            "host_end_ns": pl.Int64, "timing": pl.String, "flops": pl.Int64,
            "bytes_read": pl.Int64, "bytes_written": pl.Int64, "gradient": pl.String, "inputs": pl.String,
            "outputs": pl.String,
        },
    )  # fmt: skip
    times = ("start_ns", "end_ns", "host_start_ns", "host_end_ns")
    return frame.with_columns(pl.col(name) - origin for name in times).sort("node")


def _kernels(assembly: Assembly, number: NDArray[np.int64], origin: int) -> pl.DataFrame:
    schema = {
        "node": pl.Int64, "rank": pl.Int32, "device": pl.Int32, "stream": pl.Int32, "name": pl.String,
        "kind": pl.String, "start_ns": pl.Int64, "end_ns": pl.Int64, "bytes": pl.Int64, "correlation": pl.Int64,
        "graph": pl.Int64,
    }  # fmt: skip
    frames = [pl.DataFrame(schema=schema)]
    for part in assembly.kernels:
        records = part.records
        columns = {
            "node": number[part.place],
            "rank": np.full(len(records), part.rank),
            "device": records["device"],
            "stream": records["stream"],
            "name": [part.names[name] for name in records["name"].tolist()],
            "kind": [KERNEL_KINDS[kind] for kind in records["kind"].tolist()],
            "start_ns": records["start_ns"] - origin,
            "end_ns": records["end_ns"] - origin,
            "bytes": records["bytes"],
            "correlation": records["correlation"],
            "graph": records["graph"],
        }
        frames.append(pl.DataFrame(columns, schema=schema))
    return pl.concat(frames).sort("rank", "start_ns", "correlation")


def _edges(assembly: Assembly, number: NDArray[np.int64]) -> pl.DataFrame:
    types = pl.DataFrame(
        {
            "layout": np.arange(len(assembly.layouts)),
            "dtype": [layout.dtype for layout in assembly.layouts],
            "shape": [list(layout.sizes) for layout in assembly.layouts],
        },
        schema={"layout": pl.Int64, "dtype": pl.String, "shape": pl.List(pl.Int64)},
    )
    frame = pl.DataFrame(
        {
            "src": number[assembly.src],
            "dst": number[assembly.dst],
            "kind": np.array(EDGE_KINDS)[assembly.edge_kind],
            "bytes": assembly.edge_bytes,
            "layout": assembly.edge_layout,
        }
    )
    joined = frame.join(types, on="layout", how="left").drop("layout")
    return joined.sort("src", "dst", "kind", "bytes", maintain_order=True)


def _participants(
    assembly: Assembly,
    number: NDArray[np.int64],
    origin: int,
    group_numbers: dict[tuple[str, tuple[int, ...]], int],
) -> pl.DataFrame:
    rows = []
    for row in assembly.participants:
        key: Any = row["group"]
        group = group_numbers.setdefault(key, len(group_numbers))
        place: Any = row["node"]
        rows.append({**row, "group": group, "node": int(number[place])})
    names = ("node", "rank", "group", "seq", "arrive_ns", "start_ns", "end_ns", "send_bytes", "recv_bytes", "waited_ns")
    schema = dict.fromkeys(names, pl.Int64) | {"rank": pl.Int32, "group": pl.Int32}
    frame = pl.DataFrame(rows, schema=schema, infer_schema_length=None)
    times = [pl.col(name) - origin for name in ("arrive_ns", "start_ns", "end_ns")]
    return frame.with_columns(times).sort("node", "rank")


def _groups(graphs: Sequence[RankGraph], group_numbers: dict[tuple[str, tuple[int, ...]], int]) -> pl.DataFrame:
    """All groups that any rank told of, used or not; those with communications keep their numbers."""
    axes: dict[tuple[str, tuple[int, ...]], str | None] = {}
    for graph in graphs:
        for told in graph.nodes.trace.group_ranks.values():
            key = (str(told["name"]), tuple(told["ranks"]))
            axes[key] = axes.get(key) or told.get("axis")
    descriptions: dict[tuple[str, tuple[int, ...]], str] = {}
    for graph in graphs:
        for told in graph.nodes.trace.groups.values():
            descriptions[str(told["name"]), tuple(told.get("ranks") or ())] = str(told.get("description") or "")
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


def _ranks(graphs: Sequence[RankGraph], clocks: Mapping[int, Clock]) -> pl.DataFrame:
    classes: dict[str, int] = {}
    rows = []
    for graph in sorted(graphs, key=lambda graph: graph.rank):
        meta = graph.nodes.trace.meta
        coordinates = meta["coordinates"]
        clock = clocks[graph.rank]
        gpu = None if graph.kernels is None else graph.kernels.clock
        rows.append(
            {
                "rank": graph.rank,
                "host": meta["host"],
                "device": meta["device"],
                **{axis: coordinates.get(axis, -1) for axis in AXES},
                "rank_class": classes.setdefault(_program_hash(graph), len(classes)),
                "clock_offset_ns": clock.offset_ns,
                "clock_error_ns": clock.error_ns,
                "gpu_clock_correction_ns": None if gpu is None else gpu.correction_ns,
                "gpu_clock_drift_ns": None if gpu is None else gpu.drift_ns,
                "gpu_clock_error_ns": None if gpu is None else gpu.error_ns,
            }
        )
    schema = {"rank": pl.Int32, "host": pl.String, "device": pl.String}
    schema |= dict.fromkeys(AXES, pl.Int32)
    schema |= {"rank_class": pl.Int32, "clock_offset_ns": pl.Int64, "clock_error_ns": pl.Int64}
    schema |= dict.fromkeys(("gpu_clock_correction_ns", "gpu_clock_drift_ns", "gpu_clock_error_ns"), pl.Int64)
    return pl.DataFrame(rows, schema=schema)


def _program_hash(graph: RankGraph) -> str:
    """Ranks of one class ran the same operators in the same modules; sizes and times may differ."""
    digest = sha256()
    for op, label in zip(graph.nodes.op, graph.nodes.labels, strict=True):
        digest.update(f"{op} {label.module} {label.microbatch} {label.phase}\n".encode())
    return digest.hexdigest()
