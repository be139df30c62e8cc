"""How fast a recorded run answered its prompts: what the report says, for the drawing of the world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from truedag.tracer.analysis.shares import measure_steps
from truedag.tracer.analysis.spans import length, union
from truedag.tracer.analysis.throughput import find_lookups, measure_generations
from truedag.tracer.views.scope import Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Measured times of prefill and decoding, means over steps, replicas and microbatches.

    Attributes:
        first_token_ns: from a step's beginning to the end of its prefill.
        output_token_ns: from there to the last decode step's end, by the number of decode steps; None without any.
        tokens_per_s_per_rank: tokens of prompts and answers by the steps' time and the number of GPUs; steps that
            overlap are counted once in it; None is unknown.
    """

    first_token_ns: float
    output_token_ns: float | None
    tokens_per_s_per_rank: float | None


def measure_speed(scope: Scope, nodes: pl.DataFrame, participants: pl.DataFrame) -> Speed | None:
    """Measure it; None where nothing was told to be prefill, was measured, or was read of every rank."""
    measured = nodes.filter((pl.col("timing") == "measured") & (pl.col("kind") == "compute")).drop_nulls("end_ns")
    is_estimated = (nodes["timing"] == "estimated").any()
    if scope.is_folded or is_estimated or measured.filter(pl.col("phase") == "prefill").is_empty():
        return None
    windows = measure_steps(nodes, participants)
    ranks = scope.whole.ranks.collect()
    lookups = find_lookups(scope.whole.nodes.filter, ranks)
    found = measure_generations(measured, lookups, ranks, {step: begin for step, (begin, _) in windows.items()})
    if not found:
        return None
    tokens = int(lookups.filter(pl.col("step").is_in(list(windows)))["tokens"].sum())
    seconds = length(union(np.array(list(windows.values()), np.int64).reshape(-1, 2))) / 1e9
    outputs = [one.output_token_ns for one in found if one.output_token_ns is not None]
    return Speed(
        first_token_ns=sum(one.first_token_ns for one in found) / len(found),
        output_token_ns=sum(outputs) / len(outputs) if outputs else None,
        tokens_per_s_per_rank=tokens / seconds / len(ranks) if tokens and seconds else None,
    )
