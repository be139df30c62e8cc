"""How many GPUs are named in few signs, and none left out: runs, and runs that repeat at a fixed distance."""

from __future__ import annotations

from collections.abc import Sequence

from truedag.tracer.analysis.quantities import write_runs

_MAX_SIGNS = 34


def write_gpus(ranks: Sequence[int]) -> str:
    """Name GPUs: GPU 3; GPUs 0-3,8; GPUs 0-1016 step 8; GPUs 0,1,4 +8k, k=0-127 for 0,1,4,8,9,12 and so on."""
    ordered = sorted(set(ranks))
    noun = "GPU" if len(ordered) == 1 else "GPUs"
    return f"{noun} {_write(ordered)}"


def _write(ordered: Sequence[int]) -> str:
    plain = write_runs(ordered)
    if len(plain) <= _MAX_SIGNS:
        return plain
    repeated = _find_repetition(ordered)
    if repeated is None:
        return plain
    base, distance, times = repeated
    return f"{_write(base)} +{distance}k, k=0-{times - 1}"


def _find_repetition(ordered: Sequence[int]) -> tuple[Sequence[int], int, int] | None:
    """Find the shortest beginning that makes all when it is repeated at a distance: it, the distance, how often."""
    for size in range(1, len(ordered) // 2 + 1):
        if len(ordered) % size:
            continue
        distance = ordered[size] - ordered[0]
        if all(ordered[i] - ordered[i - size] == distance for i in range(size, len(ordered))):
            return ordered[:size], distance, len(ordered) // size
    return None
