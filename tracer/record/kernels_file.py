"""Where a rank's kernels lie."""

from __future__ import annotations

from pathlib import Path


def kernels_path(trace: Path) -> Path:
    """Name the file beside a rank's trace that holds what ran on its GPUs: `rank-00003.kernels.json.gz`."""
    return trace.with_name(trace.name.removesuffix(".gz").removesuffix(".trace") + ".kernels.json.gz")
