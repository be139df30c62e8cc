"""How GPUs are named: in few signs, and none left out."""

from __future__ import annotations

from collections.abc import Iterable

from truedag.tracer.analysis.quantities import write_runs


def write_gpus(ranks: Iterable[int]) -> str:
    """Name GPUs: GPU 3; GPUs 0-3,8; GPUs 0-1016 step 8; GPUs 1-7 to 1017-1023 step 8."""
    there = set(ranks)
    return f"GPU{'' if len(there) == 1 else 's'} {write_runs(there)}"
