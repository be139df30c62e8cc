"""What a rank keeps in memory from one step to the next: parameters, gradients, and the state of optimizer or cache."""

from __future__ import annotations

from pathlib import Path

from truedag.tracer.record.trace import read_trace

ROLES = ("parameter", "gradient", "state")


def weigh_kept(path: Path) -> dict[str, int]:
    """Return the bytes of all tensors that a rank's program named, by role; each place in memory counts once.

    What operators make and give back within a step is not in it.

    Raises:
        TraceError: the trace is broken.
    """
    trace = read_trace(path)
    places: dict[str, dict[tuple[int, int], int]] = {role: {} for role in ROLES}
    for told in trace.named_tensors:
        if told["role"] in places and not told.get("final"):
            place = told["storage"], told["offset_bytes"]
            known = places[told["role"]]
            known[place] = max(known.get(place, 0), trace.layouts[told["layout"]].num_bytes)
    return {f"{role}_bytes": sum(sizes.values()) for role, sizes in places.items()}
