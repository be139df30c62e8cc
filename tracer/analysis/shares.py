"""How each rank spent a step: computing, moving data, waiting for others, in the pipeline's bubble, and at the host's.

Theory of operation. All from unions of intervals on a rank, over all its threads and streams, within the step: from
the first start to the last end of any rank. Communication runs beside computation, so a moment counts once, as the
first of these that it is:

- compute, if an operator runs (on a GPU: its kernels);
- transfer, if all participants of a communication that the rank is in have arrived: exposed communication;
- waiting, if another rank of its own pipeline stage has not arrived at one;
- bubble, if a rank of another stage has not; where the model is in stages, also before the rank's first and after its
  last activity of the step (the pipeline fills and drains);
- host otherwise: between operators the program itself runs (Python, the framework, data loading).

The five add up to the step. Where it was seen how long the program was inside of a wait for a communication, only that
counts as waiting: a receive that is posted early and waited for late kept nobody waiting before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from truedag.tracer.analysis.spans import Spans, clip, length, spans_of, union

PARTS = ("compute", "transfer", "waiting", "bubble", "host")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShares:
    """One rank's time, in ns; None is unknown.

    Attributes:
        rank: the rank.
        step: which step; None is all that were recorded.
        stage: its pipeline stage, None if none was told.
        compute_ns: an operator ran.
        transfer_ns: no operator ran, and data could move: exposed communication.
        waiting_ns: neither, and it waited in a communication for a rank of its own stage.
        bubble_ns: none of these, and it waited for another stage.
        host_ns: none of these.
        overlap_ns: data could move while an operator ran: hidden communication, a part of compute_ns.
    """

    rank: int
    step: int | None
    stage: int | None
    compute_ns: int | None
    transfer_ns: int | None
    waiting_ns: int | None
    bubble_ns: int | None
    host_ns: int | None
    overlap_ns: int | None

    @property
    def fractions(self) -> tuple[float, ...] | None:
        """The five as parts of one; None if they are unknown, or the step took no time."""
        parts = self.parts
        total = 0 if parts is None else sum(parts)
        return None if parts is None or not total else tuple(part / total for part in parts)

    @property
    def parts(self) -> tuple[int, ...] | None:
        """The five in the order of PARTS; None if they are unknown."""
        told = (self.compute_ns, self.transfer_ns, self.waiting_ns, self.bubble_ns, self.host_ns)
        return tuple(part for part in told if part is not None) if None not in told else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpans:
    """What a rank was at, before moments are counted once.

    Attributes:
        compute, transfer, waiting, bubble: spans, which may overlap.
        is_staged: whether the model is in several pipeline stages.
    """

    compute: Spans
    transfer: Spans
    waiting: Spans
    bubble: Spans
    is_staged: bool

    def split(self, low: int, high: int) -> tuple[int, int, int, int, int, int]:
        """Return the time of each of PARTS from `low` to `high`, which add up to it, and what was hidden."""
        reached = self.layers(low, high)
        computed, active_ns, waited, bubbled = (length(spans) for spans in reached)
        hidden = computed + length(union(clip(self.transfer, low, high))) - active_ns
        parts = (computed, active_ns - computed, waited - active_ns, bubbled - waited, high - low - bubbled)
        return (*parts, hidden)

    def layers(self, low: int, high: int) -> list[Spans]:
        """Return what of `low` to `high` is compute; that or transfer; also waiting; also bubble: disjoint, sorted."""
        compute, transfer, waiting, bubble = (
            clip(spans, low, high) for spans in (self.compute, self.transfer, self.waiting, self.bubble)
        )
        if self.is_staged:
            active = union(np.concatenate((compute, transfer, waiting, bubble)))
            edges = [[low, active[0, 0]], [active[-1, 1], high]] if len(active) else [[low, high]]
            bubble = np.concatenate((bubble, np.array(edges, np.int64)))
        found = [union(compute)]
        for spans in (transfer, waiting, bubble):
            found.append(union(np.concatenate((found[-1], spans))))
        return found


def measure_steps(
    nodes: pl.DataFrame, participants: pl.DataFrame, *, with_rest: bool = False
) -> dict[int, tuple[int, int]]:
    """Return each step's first start and last end over all ranks, in ns; a step without a measurement is left out.

    What ran between the steps is of none: its stretch (-1) is told where there are no steps, or if asked for.
    """
    spans = _measured(nodes).select("step", "start_ns", "end_ns")
    ends = participants.join(nodes.select("node", "step"), on="node").select("step", "arrive_ns", "end_ns")
    both = pl.concat([spans, ends.rename({"arrive_ns": "start_ns"})]).drop_nulls()
    rows = both.group_by("step").agg(pl.col("start_ns").min(), pl.col("end_ns").max()).sort("step")
    windows = {step: (start, end) for step, start, end in rows.iter_rows()}
    if len(windows) > 1 and not with_rest:
        windows.pop(-1, None)
    return windows


def find_spans(
    nodes: pl.DataFrame,
    participants: pl.DataFrame,
    messages: pl.DataFrame,
    groups: pl.DataFrame,
    ranks: pl.DataFrame,
    *,
    in_part: bool = False,
) -> dict[int, RankSpans | None]:
    """Return what each rank was at; None where an operator or a communication has no known time.

    Args:
        nodes: node, kind, rank, start_ns, end_ns, timing.
        participants: as in the dataset.
        messages: src and dst of each message.
        groups: group and ranks.
        ranks: rank and pp.
        in_part: return what is known of ranks of which not all is.
    """
    stages = dict(ranks.select("rank", "pp").iter_rows())
    is_staged = len({stage for stage in stages.values() if stage is not None and stage >= 0}) > 1
    operators = nodes.filter(pl.col("kind") == "compute").partition_by("rank", as_dict=True)
    parts = _mark_stages(nodes, participants, messages, groups, stages)
    met = parts.partition_by("rank", as_dict=True)
    found: dict[int, RankSpans | None] = {}
    for rank in ranks["rank"].sort():
        own, talk = operators.get((rank,), nodes.clear()), met.get((rank,), parts.clear())
        if in_part:
            own = _measured(own)
        elif len(_measured(own)) < len(own) or len(talk.drop_nulls(["start_ns", "end_ns"])) < len(talk):
            found[rank] = None
            continue
        waits = talk.filter(pl.col("start_ns") > pl.col("since_ns"))
        found[rank] = RankSpans(
            compute=spans_of(own, "start_ns", "end_ns"),
            transfer=spans_of(talk, "start_ns", "end_ns"),
            waiting=spans_of(waits.filter(~pl.col("is_across")), "since_ns", "start_ns"),
            bubble=spans_of(waits.filter("is_across"), "since_ns", "start_ns"),
            is_staged=is_staged,
        )
    return found


def share_time(
    spans: Mapping[int, RankSpans | None], ranks: pl.DataFrame, windows: Mapping[int, tuple[int, int]]
) -> tuple[list[RankShares], list[RankShares]]:
    """Split each rank's time: in all recorded steps together, and in each step.

    Args:
        spans: what each rank was at.
        ranks: rank and pp.
        windows: each step's first start and last end; steps that overlap are counted once in the first list.
    """
    stretches = union(np.array(sorted(windows.values()), np.int64).reshape(-1, 2)).tolist()
    total, by_step = [], []
    for rank, stage in ranks.sort("rank").select("rank", "pp").iter_rows():
        own = spans[rank] if stretches else None
        told = stage if stage is not None and stage >= 0 else None
        if own is None:
            total.append(_shares(rank, None, told, None))
            continue
        times = [own.split(low, high) for low, high in stretches]
        total.append(_shares(rank, None, told, [sum(column) for column in zip(*times, strict=True)]))
        by_step += [_shares(rank, step, told, own.split(*window)) for step, window in windows.items()]
    return total, by_step


def _shares(rank: int, step: int | None, stage: int | None, times: Sequence[int] | None) -> RankShares:
    compute, transfer, waiting, bubble, host, hidden = times if times is not None else (None,) * 6
    return RankShares(
        rank=rank, step=step, stage=stage, compute_ns=compute, transfer_ns=transfer, waiting_ns=waiting,
        bubble_ns=bubble, host_ns=host, overlap_ns=hidden,
    )  # fmt: skip


def _mark_stages(
    nodes: pl.DataFrame,
    participants: pl.DataFrame,
    messages: pl.DataFrame,
    groups: pl.DataFrame,
    stages: Mapping[int, int | None],
) -> pl.DataFrame:
    """Add to participants: is_across (it meets another stage there) and since_ns (when it began to wait)."""
    of_group = {
        group: len({stage for rank in members if (stage := stages.get(rank)) is not None and stage >= 0}) > 1
        for group, members in groups.select("group", "ranks").iter_rows()
    }
    # A message goes to one rank of its group, which may be of the same stage as the sender.
    own = nodes.filter(pl.col("kind").is_in(["send", "recv"])).select("node", "rank")
    ends = messages.join(own.rename({"node": "src", "rank": "from"}), on="src").join(
        own.rename({"node": "dst", "rank": "to"}), on="dst"
    )
    pairs = [
        (node, stages.get(one) != stages.get(other))
        for src, dst, one, other in ends.select("src", "dst", "from", "to").iter_rows()
        for node in (src, dst)
    ]
    of_message = pl.DataFrame(pairs, schema={"node": pl.Int64, "is_message": pl.Boolean}, orient="row").unique("node")
    of_groups = pl.DataFrame(
        list(of_group.items()), schema={"group": participants.schema["group"], "is_group": pl.Boolean}, orient="row"
    )
    # How long the program was in a wait is known of some; the wait ended when the communication did.
    seen = pl.col("waited_ns") if "waited_ns" in participants.columns else pl.lit(None, pl.Int64)
    return (
        participants.join(of_message, on="node", how="left")
        .join(of_groups, on="group", how="left")
        .with_columns(
            is_across=pl.coalesce("is_message", "is_group", pl.lit(value=False)),
            since_ns=pl.max_horizontal("arrive_ns", pl.when(seen.is_not_null()).then(pl.col("end_ns") - seen)),
        )
    )


def _measured(nodes: pl.DataFrame) -> pl.DataFrame:
    return nodes.filter(pl.col("timing") == "measured").drop_nulls(["start_ns", "end_ns"])
