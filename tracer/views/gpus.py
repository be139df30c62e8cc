"""How many GPUs are named in few signs, and none left out: runs, and runs that repeat at a fixed distance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from truedag.tracer.analysis.quantities import write_runs

_MAX_SIGNS = 34


def write_gpus(ranks: Sequence[int]) -> str:
    """Name GPUs: GPU 3; GPUs 0-3,8; GPUs 1-7 +8k, k=0-127 for 1-7, 9-15 and so on up to 1017-1023."""
    ordered = tuple(sorted(set(ranks)))
    noun = "GPU" if len(ordered) == 1 else "GPUs"
    return f"{noun} {_write(ordered)}"


@lru_cache(maxsize=4096)
def list_gpus(ranks: tuple[int, ...]) -> str:
    """Write the ranks of a class as runs: many boxes are of the same ones."""
    return write_runs(ranks)


@lru_cache(maxsize=4096)
def _write(ordered: tuple[int, ...]) -> str:
    plain = list_gpus(ordered)
    if len(plain) <= _MAX_SIGNS:
        return plain
    repeated = _find_repetition(ordered)
    if repeated is None:
        return plain
    base, distance, times = repeated
    return f"{_write(base)} +{distance}k, k=0-{times - 1}"


def _find_repetition(ordered: tuple[int, ...]) -> tuple[tuple[int, ...], int, int] | None:
    """Find the shortest beginning that makes all when it is repeated at a distance: it, the distance, how often."""
    for size in range(1, len(ordered) // 2 + 1):
        if len(ordered) % size:
            continue
        distance = ordered[size] - ordered[0]
        if all(ordered[i] - ordered[i - size] == distance for i in range(size, len(ordered))):
            return ordered[:size], distance, len(ordered) // size
    return None
