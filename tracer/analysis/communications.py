"""Communications by axis and kind: how many, how much, how fast, and what the ranks waited.

Bandwidth is nccl-tests': the algorithm bandwidth is S / t, the bus bandwidth that times a factor which makes it
comparable with the hardware's whatever the number of ranks n: 2(n-1)/n for all-reduce, (n-1)/n for all-gather,
reduce-scatter, all-to-all, gather and scatter, 1 for broadcast, reduce and messages. S is the larger of what a
participant gives and gets: the root's in gather and scatter, else the mean over participants where they differ. t is
from the last arrival to the last end. Over many it is all their bytes by all their time.

Source: nccl-tests, doc/PERFORMANCE.md; src/gather.cu and src/scatter.cu for S there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from truedag.tracer.analysis.shares import RankSpans
from truedag.tracer.analysis.spans import length, spans_of, union

_SCALED = ("all-gather", "reduce-scatter", "all-to-all", "gather", "scatter")
_UNSCALED = ("broadcast", "reduce", "message")
_OF_ROOT = ("gather", "scatter")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommunicationTotals:
    """All communications of one kind over one axis.

    Attributes:
        axis: tp, ep, ...; None if nobody told what the group is.
        kind: all-reduce, ..., message.
        num: how many (a message counts once, not as send and receive).
        num_groups: over how many process groups.
        num_bytes: what all participants gave to them, in bytes.
        wait_ns: from each participant's arrival to the last one's, summed; None is unknown.
        transfer_ns: from the last arrival to each participant's end, summed; None is unknown.
        num_participants: over how many participants the times are summed.
        exposed_ns: the part of the transfer, summed over ranks, in which no operator ran on the rank; None is unknown.
        hidden_ns: the part in which one did. What runs at once on a rank counts once in these two.
        algorithm_bytes_per_s: all sizes by all times from last arrival to last end; None is unknown.
        bus_bytes_per_s: the same with nccl-tests' factors; None for a kind without one (barrier).
        median_bus_bytes_per_s: of the median communication.
    """

    axis: str | None
    kind: str
    num: int
    num_groups: int
    num_bytes: int
    wait_ns: int | None
    transfer_ns: int | None
    num_participants: int
    exposed_ns: int | None
    hidden_ns: int | None
    algorithm_bytes_per_s: float | None
    bus_bytes_per_s: float | None
    median_bus_bytes_per_s: float | None


def total_communications(
    nodes: pl.DataFrame,
    participants: pl.DataFrame,
    groups: pl.DataFrame,
    messages: pl.DataFrame,
    spans: Mapping[int, RankSpans | None],
) -> list[CommunicationTotals]:
    """Total by axis and kind, the most bytes first.

    Args:
        nodes: node, kind, label, and num, how many a row stands for.
        participants: as in the dataset, and num.
        groups: group, axis, size and num.
        messages: src and dst of each message.
        spans: what each rank was at.
    """
    axes = groups.select("group", "axis", "size", num_groups="num")
    told = nodes.select("node", node_kind="kind", label="label", num_nodes="num")
    # A message is a send and a receive, which meet in the receive; one that was not matched stands alone.
    meet = messages.select(node="src", meet="dst")
    met = participants.join(told, on="node").join(axes, on="group", how="left").join(meet, on="node", how="left")
    is_message = pl.col("node_kind").is_in(["send", "recv"])
    met = met.with_columns(
        meet=pl.coalesce("meet", "node"),
        name=pl.when(is_message).then(pl.lit("message")).otherwise(pl.col("label").str.split(" ").list.first()),
    )
    totals = []
    for (axis, name), part in met.partition_by("axis", "name", as_dict=True).items():
        exposed, hidden = _hide(part, spans)
        algorithm, bus, median = _measure_bandwidth(str(name), part)
        totals.append(
            CommunicationTotals(
                axis=None if axis is None else str(axis),
                kind=str(name),
                num=int(part.unique("meet")["num_nodes"].sum()),
                num_groups=int(part.unique("group")["num_groups"].fill_null(1).sum()),
                num_bytes=int((part["send_bytes"] * part["num"]).sum()),
                wait_ns=_sum((part["start_ns"] - part["arrive_ns"]) * part["num"]),
                transfer_ns=_sum((part["end_ns"] - part["start_ns"]) * part["num"]),
                num_participants=int(part["num"].sum()),
                exposed_ns=exposed,
                hidden_ns=hidden,
                algorithm_bytes_per_s=algorithm,
                bus_bytes_per_s=bus,
                median_bus_bytes_per_s=median,
            )
        )
    return sorted(totals, key=lambda one: (-one.num_bytes, one.kind, one.axis or ""))


def bus_factor(kind: str, num_ranks: int) -> float | None:
    """Return what the algorithm bandwidth of a kind is multiplied with over so many ranks; None: it has none."""
    if kind == "all-reduce":
        return 2 * (num_ranks - 1) / num_ranks
    if kind in _SCALED:
        return (num_ranks - 1) / num_ranks
    return 1.0 if kind in _UNSCALED else None


def _sum(times: pl.Series) -> int | None:
    return None if times.null_count() else int(times.sum())


def _hide(part: pl.DataFrame, spans: Mapping[int, RankSpans | None]) -> tuple[int | None, int | None]:
    """Return how much of the ranks' transfer was exposed, and how much ran behind operators."""
    exposed = hidden = 0
    for (rank,), own in part.partition_by("rank", as_dict=True).items():
        at = spans.get(rank)
        if at is None:
            return None, None
        moved = union(spans_of(own, "start_ns", "end_ns"))
        computed = length(union(at.compute))
        alone = length(union(np.concatenate((at.compute, moved)))) - computed
        exposed += alone
        hidden += length(moved) - alone
    return exposed, hidden


def _measure_bandwidth(kind: str, part: pl.DataFrame) -> tuple[float | None, float | None, float | None]:
    """Return algorithm and bus bandwidth over all, and the median's bus bandwidth, in bytes/s."""
    own = pl.col("own")
    each = (
        part.with_columns(own=pl.max_horizontal("send_bytes", "recv_bytes"))
        .group_by("meet")
        .agg(
            size=own.max() if kind in _OF_ROOT else own.mean(),
            time=pl.col("end_ns").max() - pl.col("start_ns").max(),
            known=pl.col("end_ns").is_not_null().all() & pl.col("start_ns").is_not_null().all(),
            ranks=pl.col("size").first(),
        )
    )
    if not len(each) or not each["known"].all():
        return None, None, None
    each = each.filter(pl.col("time") > 0)
    time = int(each["time"].sum()) / 1e9
    if not time:
        return None, None, None
    algorithm = float(each["size"].sum()) / time
    factors = {ranks: bus_factor(kind, ranks) for ranks in each["ranks"].unique().to_list()}
    if None in factors.values():
        return algorithm, None, None
    scaled = each.with_columns(bus=pl.col("size") * pl.col("ranks").replace_strict(factors, return_dtype=pl.Float64))
    median = (scaled["bus"] / scaled["time"] * 1e9).median()
    return algorithm, float(scaled["bus"].sum()) / time, float(median) if isinstance(median, int | float) else None
