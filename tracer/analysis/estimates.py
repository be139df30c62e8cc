"""Estimates apart from measurements (DESIGN rule 6): what they come to, what that rests on, and times without them.

Where no time was measured a dry run may have estimated some for a device: each operator and communication takes what
its operations and bytes would take there at best, and the graph is simulated on its resources. What comes out is told
in a place of its own, with everything that was assumed; no figure of a run has it in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """What the estimated times of a graph come to; none of it is measured.

    Attributes:
        device: what it would run on.
        gpus_per_node: how many of them are in a node.
        step_ns: the time of a step, or of a generation.
        prefill_ns: until all prompts have their first token; None: nothing is generated.
        tokens_per_s: that a step trains on, or that are generated, all ranks.
        mfu, hfu: model FLOPs, and all, by what the devices could do in that time at the peaks of the products' types.
        compute_share: of the time, mean over ranks: an operator runs.
        exposed_communication_share: a communication runs and no operator.
        bubble_share: neither, and the rank waits for another pipeline stage, or has not begun or has ended.
        waiting_share: none of these.
        assumptions: what all of it rests on.
    """

    device: str
    gpus_per_node: int
    step_ns: int
    prefill_ns: int | None
    tokens_per_s: float
    mfu: float
    hfu: float
    compute_share: float
    exposed_communication_share: float
    bubble_share: float
    waiting_share: float
    assumptions: tuple[str, ...]


def read_estimates(meta: Mapping[str, Any]) -> Estimates | None:
    """Return what a dataset's `meta.json` says of its estimates; None: it has none, or an earlier version's."""
    told = meta.get("estimate")
    if told is None or "bubble_share" not in told:
        return None
    names = ("device", "gpus_per_node", "step_ns", "prefill_ns", "tokens_per_s", "compute_share",
             "exposed_communication_share", "bubble_share")  # fmt: skip
    return Estimates(
        mfu=told["model_flops_utilization"],
        hfu=told["flops_utilization"],
        waiting_share=max(told["idle_share"] - told["bubble_share"], 0.0),
        assumptions=(*told["assumptions"], *(meta.get("dry") or {}).get("assumed", ())),
        **{name: told[name] for name in names},
    )


_TIMES = ("arrive_ns", "start_ns", "end_ns")


def forget_estimates(frame: pl.DataFrame, nodes: pl.DataFrame) -> pl.DataFrame:
    """Return a frame in which times that are estimates are unknown.

    Args:
        frame: node, and any of arrive_ns, start_ns and end_ns.
        nodes: node and timing.
    """
    estimated = nodes.filter(pl.col("timing") == "estimated").select("node", is_estimated=True)
    if estimated.is_empty():
        return frame
    told = frame.join(estimated, on="node", how="left", maintain_order="left")
    names = [name for name in _TIMES if name in frame.columns]
    known = (pl.when(pl.col("is_estimated").is_null()).then(name).alias(name) for name in names)
    return told.with_columns(known).drop("is_estimated")
