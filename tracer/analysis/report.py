"""What a run was and how it spent its time: numbers of the dataset alone, what is unknown said so.

`write_report` writes them for programs (report.json) and people (report.md); `Report.render` is for the terminal.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl
from rich.console import RenderableType

from truedag.tracer.analysis.report_text import render_report, write_markdown
from truedag.tracer.analysis.shares import RankShares, measure_steps, share_time
from truedag.tracer.errors import GraphError
from truedag.tracer.graph import Graph


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
    """

    axis: str | None
    kind: str
    num: int
    num_groups: int
    num_bytes: int
    wait_ns: int | None
    transfer_ns: int | None
    num_participants: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPlace:
    """Which ranks ran which experts, in layers that agree in it."""

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The run's numbers; see `CommunicationTotals` and `shares.RankShares` for how times are told apart.

    Attributes:
        steps_ns: for each recorded step the time from the first start to the last end over all ranks; a step without a
            measurement is not in it.
        is_estimated: whether times are estimates, not measurements.
    """

    deployment: str | None
    strategy: str | None
    world_size: int
    num_ranks: int
    torch: str
    recorder: str
    nodes: dict[str, int]
    edges: dict[str, int]
    num_views_dropped: int
    num_unmatched: int
    unmatched: tuple[str, ...]
    steps_ns: dict[int, int]
    is_estimated: bool
    communications: tuple[CommunicationTotals, ...]
    ranks: tuple[RankShares, ...]
    experts: tuple[ExpertPlace, ...]

    def render(self) -> RenderableType:
        """Return what the terminal shows."""
        return render_report(self)


def make_report(dag_dir: Path) -> Report:
    """Read the numbers off a dataset.

    Raises:
        GraphError: there is no dataset, or it is broken.
    """
    graph = Graph.open(dag_dir)
    nodes, edges = graph.nodes.collect(), graph.edges.select("kind").collect()
    participants, groups, ranks = graph.participants.collect(), graph.groups.collect(), graph.ranks.collect()
    meta = graph.meta
    return Report(
        deployment=meta.get("deployment"),
        strategy=meta.get("strategy"),
        world_size=int(meta["world_size"]),
        num_ranks=len(ranks),
        torch=str(meta["torch"]),
        recorder=str(meta["recorder"]),
        nodes=_count_kinds(nodes),
        edges=_count_kinds(edges),
        num_views_dropped=int(meta["num_views_dropped"]),
        num_unmatched=int(meta["num_unmatched"]),
        unmatched=tuple(meta["unmatched"]),
        steps_ns={step: end - start for step, (start, end) in measure_steps(nodes, participants).items()},
        is_estimated=bool((nodes["timing"] == "estimated").any()),
        communications=tuple(_total_communications(nodes, participants, groups)),
        ranks=tuple(share_time(nodes, participants, ranks)),
        experts=tuple(_place_experts(nodes)),
    )


def write_report(dag_dir: Path, out: Path) -> Report:
    """Write `out`/report.json and `out`/report.md of a dataset, and return what is in them.

    Raises:
        GraphError: there is no dataset, it is broken, or the files cannot be written.
    """
    report = make_report(dag_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
        (out / "report.md").write_text(write_markdown(report), encoding="utf-8")
    except OSError as error:
        raise GraphError(f"cannot write the report into {out}: {error}") from error
    return report


def _count_kinds(frame: pl.DataFrame) -> dict[str, int]:
    rows = frame.group_by("kind").len().sort(["len", "kind"], descending=[True, False])
    return dict(rows.iter_rows())


def _total_communications(
    nodes: pl.DataFrame, participants: pl.DataFrame, groups: pl.DataFrame
) -> list[CommunicationTotals]:
    """Total by axis and kind, the most bytes first."""
    axes = groups.select("group", "axis")
    met = participants.join(nodes.select("node", node_kind="kind", label="label"), on="node").join(
        axes, on="group", how="left"
    )
    is_message = pl.col("node_kind").is_in(["send", "recv"])
    name = pl.when(is_message).then(pl.lit("message")).otherwise(pl.col("label").str.split(" ").list.first())
    wait, transfer = pl.col("start_ns") - pl.col("arrive_ns"), pl.col("end_ns") - pl.col("start_ns")
    # A message is a send and a receive: the receives are counted, and the sends that found none.
    alone = pl.col("node").filter(pl.col("node_kind") != "send").n_unique()
    rows = (
        met.with_columns(name=name)
        .group_by("axis", "name")
        .agg(
            num=alone,
            sends=pl.col("node").filter(pl.col("node_kind") == "send").n_unique(),
            groups=pl.col("group").n_unique(),
            bytes=pl.col("send_bytes").sum(),
            wait=pl.when(wait.is_not_null().all()).then(wait.sum()),
            transfer=pl.when(transfer.is_not_null().all()).then(transfer.sum()),
            participants=pl.len(),
        )
        .sort(["bytes", "name", "axis"], descending=[True, False, False])
    )
    return [
        CommunicationTotals(
            axis=row["axis"],
            kind=row["name"],
            num=max(row["num"], row["sends"]),
            num_groups=row["groups"],
            num_bytes=row["bytes"],
            wait_ns=row["wait"],
            transfer_ns=row["transfer"],
            num_participants=row["participants"],
        )
        for row in rows.to_dicts()
    ]


def _place_experts(nodes: pl.DataFrame) -> list[ExpertPlace]:
    """Say where each expert's operators ran, layers and experts that agree together."""
    held = (
        nodes.filter((pl.col("expert") >= 0) & (pl.col("kind") == "compute") & (pl.col("rank") >= 0))
        .group_by("layer", "expert")
        .agg(pl.col("rank").unique().sort())
        .sort("layer", "expert")
    )
    places: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for layer, expert, ranks in held.iter_rows():
        places.setdefault((layer, tuple(ranks)), []).append(expert)
    layers: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for (layer, ranks), experts in places.items():
        layers.setdefault((tuple(experts), ranks), []).append(layer)
    return [
        ExpertPlace(layers=tuple(found), experts=experts, ranks=ranks) for (experts, ranks), found in layers.items()
    ]
