"""Takes the times out of a dataset whose program ran on tensors without memory, and says in it what the run was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from truedag.tracer.graph.dataset import Dataset

_TIMES: Mapping[str, tuple[str, ...]] = {
    "nodes": ("start_ns", "end_ns", "host_start_ns", "host_end_ns"),
    "participants": ("arrive_ns", "start_ns", "end_ns", "waited_ns"),
}


def forget_times(folder: Path, *, told: Mapping[str, Any]) -> None:
    """Replace all times of a merged dataset by null: they are of shapes being found out, and of no run.

    Args:
        folder: the dataset.
        told: what `meta.json` says under "dry".
    """
    files = [(path, columns) for table, columns in _TIMES.items() for path in Dataset.open(folder).files(table)]
    for path, columns in files:
        frame = pl.read_parquet(path)
        frame = frame.with_columns(
            pl.lit(None, frame.schema[column]).alias(column) for column in columns if column in frame.columns
        )
        if "timing" in frame.columns:
            frame = frame.with_columns(pl.lit("none", frame.schema["timing"]).alias("timing"))
        fresh = path.with_suffix(".new")
        frame.write_parquet(fresh, compression="zstd", statistics=True)
        fresh.rename(path)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | {"dry": dict(told)}, indent=2) + "\n", encoding="utf-8")
