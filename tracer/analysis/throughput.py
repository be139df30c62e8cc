"""FLOP/s, MFU, tokens, and how long a user waits for them.

FLOPs are those of matrix products, a multiplication and an addition counted as two; what does nothing else is not in
it. A step's model FLOPs are three times those of its forward pass where there is a backward pass (twice the forward's
for it), and the forward's alone where there is none: what is computed again (recomputation) does not count, as in the
usual definition of model FLOPs utilisation. The hardware's utilisation counts all that ran.

Tokens are those looked up in the first embedding, on ranks that are first along tensor parallelism. A prompt has its
first token when the last operator of its prefill has ended; what comes after is decoding.

Source: Chowdhery et al. 2022, "PaLM", appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import polars as pl

from truedag.tracer.graph.tensor_types import read_tensors

_FORWARD = pl.col("phase").ne_missing("backward") & pl.col("phase").ne_missing("optimizer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """What was computed in the steps that have a time, or in all that was recorded where none has one.

    None is unknown, or there was none. Steps that overlap are counted once in their time.

    Attributes:
        flops: of all matrix products of all ranks.
        model_flops: the same without what was computed again.
        flops_per_s: all ranks', by the steps' time.
        model_flops_per_s_per_rank: one rank's, by the steps' time.
        peak_flops_per_s: what one rank's device can do, as it was told.
        mfu, hfu: model and all FLOPs by what the devices could have done in the steps' time.
        num_tokens: tokens that went into the model.
        tokens_per_s: by the steps' time, all ranks.
        tokens_per_s_per_rank: the same by the number of ranks.
    """

    flops: int
    model_flops: int
    flops_per_s: float | None
    model_flops_per_s_per_rank: float | None
    peak_flops_per_s: float | None
    mfu: float | None
    hfu: float | None
    num_tokens: int | None
    tokens_per_s: float | None
    tokens_per_s_per_rank: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Prefill and decoding of one batch of prompts: what the graph calls a microbatch, on one replica.

    Attributes:
        step: of the recording.
        replica: its place along data parallelism.
        microbatch: the prompts that were prefilled together.
        num_prompts, num_prompt_tokens: how many; None is unknown.
        first_token_ns: from the step's beginning to the end of its prefill.
        output_token_ns: from there to the end of the replica's last decode step, by the number of decode steps; None
            without any.
    """

    step: int
    replica: int
    microbatch: int
    num_prompts: int | None
    num_prompt_tokens: int | None
    first_token_ns: int
    output_token_ns: float | None


def measure_throughput(
    work: pl.DataFrame, lookups: pl.DataFrame, span_ns: int | None, num_ranks: int, peak_flops_per_s: float | None
) -> Throughput:
    """Count FLOPs and tokens.

    Args:
        work: phase and flops of operators that have any.
        lookups: as `find_lookups` returns them.
        span_ns: the steps' time, in which all of that ran; None is unknown.
        num_ranks: how many recorded.
        peak_flops_per_s: of one rank's device; None is unknown.
    """
    flops = int(work["flops"].sum() or 0)
    forward = int(work.filter(_FORWARD)["flops"].sum() or 0)
    trains = bool((work["phase"] == "backward").any())
    model_flops = 3 * forward if trains else forward
    seconds = span_ns / 1e9 if span_ns else None
    tokens = int(lookups["tokens"].sum()) if len(lookups) else None
    could = None if seconds is None or peak_flops_per_s is None else seconds * peak_flops_per_s * num_ranks
    return Throughput(
        flops=flops,
        model_flops=model_flops,
        flops_per_s=flops / seconds if seconds else None,
        model_flops_per_s_per_rank=model_flops / seconds / num_ranks if seconds and num_ranks else None,
        peak_flops_per_s=peak_flops_per_s,
        mfu=model_flops / could if could else None,
        hfu=flops / could if could else None,
        num_tokens=tokens,
        tokens_per_s=tokens / seconds if seconds and tokens is not None else None,
        tokens_per_s_per_rank=tokens / seconds / num_ranks if seconds and tokens is not None and num_ranks else None,
    )


def find_lookups(nodes_where: Callable[[pl.Expr], pl.LazyFrame], ranks: pl.DataFrame) -> pl.DataFrame:
    """Return step, phase, microbatch, decode_step, replica, prompts and tokens of each pass's first embedding.

    Args:
        nodes_where: gives the nodes for which a condition holds.
        ranks: rank, dp and tp.
    """
    found = (
        nodes_where((pl.col("op") == "aten::embedding") & _FORWARD)
        .select("node", "rank", "step", "phase", "microbatch", "decode_step", "inputs")
        .collect()
    )
    places = ranks.select("rank", replica=pl.col("dp").clip(0), tp="tp")
    sizes = {text: _sizes(text) for text in found["inputs"].unique().to_list()}
    told = {text: math.prod(size) for text, size in sizes.items() if size is not None}
    rows = {text: size[0] if len(size) > 1 else 1 for text, size in sizes.items() if size is not None}
    over = ["rank", "step", "phase", "microbatch", "decode_step"]
    return (
        found.join(places, on="rank")
        .filter(pl.col("tp") <= 0)
        .sort("node")
        .group_by(over, maintain_order=True)
        .agg(pl.col("inputs", "replica").first())
        .with_columns(
            tokens=pl.col("inputs").replace_strict(told, default=None, return_dtype=pl.Int64),
            prompts=pl.col("inputs").replace_strict(rows, default=None, return_dtype=pl.Int64),
        )
    )


def measure_generations(
    operators: pl.DataFrame, lookups: pl.DataFrame, ranks: pl.DataFrame, begins: Mapping[int, int]
) -> list[Generation]:
    """Return what each batch of prompts waited for; none where nothing was told to be prefill.

    Args:
        operators: rank, step, phase, microbatch, decode_step, end_ns of operators with a measured end.
        lookups: as `find_lookups` returns them.
        ranks: rank and dp.
        begins: when each step began.
    """
    told = operators.join(ranks.select("rank", replica=pl.col("dp").clip(0)), on="rank")
    prefill = told.filter(pl.col("phase") == "prefill").group_by("step", "replica", "microbatch")
    firsts = prefill.agg(pl.col("end_ns").max()).sort("step", "replica", "microbatch")
    decoding = told.filter(pl.col("phase") == "decode").group_by("step", "replica")
    lasts = decoding.agg(last=pl.col("end_ns").max(), num_decode=pl.col("decode_step").n_unique())
    prompts = (
        lookups.filter(pl.col("phase") == "prefill")
        .group_by("step", "replica", "microbatch")
        .agg(pl.col("prompts").first(), pl.col("tokens").first())
    )
    joined = firsts.join(lasts, on=["step", "replica"], how="left").join(
        prompts, on=["step", "replica", "microbatch"], how="left", maintain_order="left"
    )
    return [
        Generation(
            step=row["step"],
            replica=row["replica"],
            microbatch=row["microbatch"],
            num_prompts=row["prompts"],
            num_prompt_tokens=row["tokens"],
            first_token_ns=row["end_ns"] - begins[row["step"]],
            output_token_ns=(row["last"] - row["end_ns"]) / row["num_decode"] if row["num_decode"] else None,
        )
        for row in joined.iter_rows(named=True)
        if row["step"] in begins
    ]


def _sizes(inputs: str) -> tuple[int, ...] | None:
    """Return the sizes of the indices of a look-up."""
    found = [sizes for dtype, sizes in read_tensors(inputs) if dtype in ("int32", "int64")]
    return found[-1] or (1,) if found else None
