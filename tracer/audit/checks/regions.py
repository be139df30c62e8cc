"""Regions that a drawing sums with an all-reduce where the deployment scatters and gathers: equal in bytes.

Under sequence parallelism a tensor-parallel region ends in a reduce-scatter, and the next one begins with an
all-gather; together they move what one all-reduce does, 2 (n - 1) / n of the activation a rank. A drawing that draws
all-reduces, and none of the two in any region, means the same and is judged right; one that has both is compared with
what the deployment runs.
Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, section 4.2.2.
"""

from __future__ import annotations

import polars as pl

from truedag.tracer.audit.roles import UNTOLD_KIND
from truedag.tracer.audit.subject import Subject

_DENSE = (
    "attention input", "attention output", "feed-forward input", "feed-forward output", "shared expert input",
    "shared expert output", "embedding", "head",
)  # fmt: skip
_OF_EXPERTS = ("expert input", "expert input of weights", "expert output")
# Norms see all tokens where nothing is scattered, so their gradients need no sum over TP.
_SCATTERED_ALONE = "sequence gradients"


def summed_purposes(subject: Subject) -> tuple[str, ...]:
    """Return the purposes of the regions that a drawing sums instead of scattering and gathering."""
    if subject.form != "drawing":
        return ()
    purposes: list[str] = []
    for region in (_DENSE, _OF_EXPERTS):
        told = subject.communications.filter(pl.col("purpose").is_in(region))
        # Logits are gathered at the head either way.
        inside = told.filter(~pl.col("purpose").is_in(["embedding", "head"]))
        kinds = set((told if inside.is_empty() else inside)["kind"])
        if kinds & {"all-reduce", UNTOLD_KIND} and not kinds & {"reduce-scatter", "all-gather"}:
            purposes += region
    return tuple(purposes)


def as_summed(needed: pl.DataFrame, purposes: tuple[str, ...]) -> pl.DataFrame:
    """Return what is needed where some regions are summed: all-reduces for reduce-scatters, and no all-gathers."""
    if not purposes:
        return needed
    inside = pl.col("purpose").is_in(purposes)
    alone = pl.lit("embedding" in purposes) & (pl.col("purpose") == _SCATTERED_ALONE)
    rows = needed.filter(~alone & ~(inside & (pl.col("kind") == "all-gather")))
    scatters = inside & (pl.col("kind") == "reduce-scatter")
    if "recv_bytes" in rows.columns:
        got = pl.when(scatters).then("send_bytes").otherwise("recv_bytes")
        rows = rows.with_columns(recv_bytes=got)
    return rows.with_columns(kind=pl.when(scatters).then(pl.lit("all-reduce")).otherwise("kind"))
