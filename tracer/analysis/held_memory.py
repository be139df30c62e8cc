"""Memory that a rank's program had: each storage from the operator that made it until it was given back.

The recorder saw both, in a real run on the CPU, and in a dry run, whose storages have a size and no memory. Not in it:
what operators and communications take and give back inside, the rounding of allocators, and what the allocator keeps.
Where the frees of memory are not recorded (on a GPU, by the Python recorder), nothing is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from truedag.tracer.analysis.quantities import write_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A part of what is alive: `num` storages of `num_bytes` together.

    `what`: parameter, gradient, state; before, other memory that was there when the recording began; or the module that
    made it, with `*` for the number of its layer. `op` made it, in these `layers`.
    """

    what: str
    op: str | None
    layers: tuple[int, ...]
    num: int
    num_bytes: int

    def describe(self) -> str:
        """Return what it is, in words."""
        made = "" if self.op is None else f" made by {self.op.removeprefix('aten::')}"
        layers = f" in layer{'s' if len(self.layers) > 1 else ''} {write_runs(self.layers)}" if self.layers else ""
        return f"{self.what}{made}{layers}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldMemory:
    """What some ranks had in memory, each of them, in bytes.

    Attributes:
        ranks: the ranks.
        parameter_bytes, gradient_bytes, state_bytes: tensors that the program named so.
        activation_bytes: what was made while recording, and not yet given back, at most.
        peak_bytes: all memory together, at most.
        peak_node: the operator at whose end that was, on the first of the ranks; -1: there was none.
        peak_op, peak_module, peak_phase, peak_microbatch: what that operator is; None is unknown.
        alive: what was in memory then, the largest first.
    """

    ranks: tuple[int, ...]
    parameter_bytes: int
    gradient_bytes: int
    state_bytes: int
    activation_bytes: int
    peak_bytes: int
    peak_node: int
    peak_op: str | None
    peak_module: str | None
    peak_phase: str | None
    peak_microbatch: int | None
    alive: tuple[Held, ...]


def read_memory(meta: Mapping[str, Any], ranks: pl.DataFrame) -> list[HeldMemory]:
    """Return what a dataset says of its ranks' memory; those that agree but for the node are one.

    Args:
        meta: of the dataset; one that an earlier version wrote says nothing.
        ranks: rank and rank_class.
    """
    found: dict[HeldMemory, tuple[list[int], int]] = {}
    for told in meta.get("memory", ()):
        one = dict(told)
        number = one.pop("rank_class", None)
        if "ranks" in one:
            members = one.pop("ranks")
        elif number is not None:
            members = ranks.filter(pl.col("rank_class") == number)["rank"].sort().to_list()
        else:
            members = [int(one.pop("rank"))]
        alive = tuple(
            Held(
                what=row["what"], op=row["op"], layers=tuple(row["layers"]), num=row["num"], num_bytes=row["bytes"]
            )
            for row in one.pop("alive")
        )  # fmt: skip
        node = int(one.pop("peak_node"))
        alike = HeldMemory(ranks=(), alive=alive, peak_node=-1, **one)
        found.setdefault(alike, ([], node))[0].extend(members)
    return [replace(one, ranks=tuple(members), peak_node=node) for one, (members, node) in found.items()]
