"""What a node of a drawing is where only its neighbours say it: which norm or residual, what a communication is for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from truedag.tracer.audit.drawing.grammar import EXCHANGES, Reading

EXPERT = ("expert first layer", "expert activation", "expert second layer")
_DENSE = ("first layer", "activation", "second layer")
_ATTENTION = ("attention scores", "attention softmax", "attention context", "output projection", "fused attention")
_AXIS_OF = {
    "dispatch": "ep", "dispatch of weights": "ep", "combine": "ep", "token counts": "ep", "expert input": "etp",
    "expert input of weights": "etp", "expert output": "etp", "dense gradients": "dp", "expert gradients": "edp",
    "dense parameters": "dp", "expert parameters": "edp", "keys and values": "cp",
}  # fmt: skip


def settle(readings: dict[str, Reading], into: Mapping[str, Sequence[str]], out: Mapping[str, Sequence[str]]) -> None:
    """Settle by neighbours which norm, which residual and which communication a node is."""
    for name, reading in readings.items():
        before = _roles_near(name, into, readings)
        after = _roles_near(name, out, readings)
        if reading.roles == ("attention output",):
            is_context = "output projection" in after and "output projection" not in before
            reading.roles = ("attention context" if is_context else "output projection",)
        elif reading.roles == ("norm",):
            reading.roles = (_which_norm(before, after),)
        elif reading.roles == ("residual",):
            late = before & {*_DENSE, *EXPERT, "expert aggregation"}
            reading.roles = ("feed-forward residual" if late else "attention residual",)
        elif reading.kind is not None:
            if reading.purpose is None:
                reading.purpose = _which_purpose(reading, before, after)
            if reading.purpose is not None and reading.axis in (None, "pp"):
                reading.axis = _AXIS_OF.get(reading.purpose, reading.axis)
            if reading.kind in EXCHANGES and reading.purpose == "dense gradients":
                reading.purpose = "activation gradients"


def _roles_near(name: str, edges: Mapping[str, Sequence[str]], readings: Mapping[str, Reading]) -> set[str]:
    """Return the roles of the nearest nodes with one, through communications and what has no role."""
    found: set[str] = set()
    seen = {name}
    frontier = [name]
    for _ in range(3):
        following = [other for one in frontier for other in edges.get(one, ()) if other not in seen]
        frontier = []
        for other in itertools.islice(dict.fromkeys(following), 64):
            seen.add(other)
            if other in readings and readings[other].roles:
                found.update(readings[other].roles)
            else:
                frontier.append(other)
        if not frontier:
            break
    return found


def _which_norm(before: set[str], after: set[str]) -> str:
    if after & {"QKV projection", "Q projection", "K projection", "V projection", *_ATTENTION}:
        return "attention norm"
    if after & {"router", "top-k choice", *_DENSE, *EXPERT}:
        return "feed-forward norm"
    if after & {"head"}:
        return "final norm"
    return "feed-forward norm" if before & {"attention residual", "output projection"} else "attention norm"


def _which_purpose(reading: Reading, before: set[str], after: set[str]) -> str | None:
    if reading.kind in EXCHANGES:
        return "activation gradients" if reading.phase == "backward" else "activations"
    if reading.axis in ("dp", "edp") and reading.kind == "all-gather":  # gathering sums nothing
        return "expert parameters" if reading.axis == "edp" else "dense parameters"
    if reading.axis in ("dp", "edp"):
        return "expert gradients" if reading.axis == "edp" else "dense gradients"
    if reading.kind == "all-to-all":
        if after & set(EXPERT):
            return "dispatch"
        return "combine" if before & {*EXPERT, "expert aggregation"} else "dispatch"
    enters = reading.kind == "all-gather"
    near = after if enters else before
    if near & {"QKV projection", *_ATTENTION}:
        return "attention input" if enters else "attention output"
    if near & set(EXPERT):
        return "expert input" if enters else "expert output"
    if near & set(_DENSE):
        return "feed-forward input" if enters else "feed-forward output"
    if before & {"embedding"}:
        return "embedding"
    if (before | after) & {"head"}:
        return "head"
    return None
