"""How GPUs are named: in few signs, and none left out."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from truedag.tracer.analysis.quantities import write_runs


def write_gpus(ranks: Iterable[int]) -> str:
    """Name GPUs: GPU 3; GPUs 0-3,8; GPUs 0-1016 step 8; GPUs 1-7 to 1017-1023 step 8."""
    ordered = tuple(sorted(set(ranks)))
    return f"GPU{'' if len(ordered) == 1 else 's'} {list_gpus(ordered)}"


@lru_cache(maxsize=4096)
def list_gpus(ranks: tuple[int, ...]) -> str:
    """Write the ranks of a class as runs: many boxes are of the same ones."""
    return write_runs(ranks)
