"""What a run was and how it spent its time: numbers of the dataset alone, what is unknown said so.

`write_report` writes them for programs (report.json) and people (report.md); `Report.render` is for the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import RenderableType

from truedag.tracer.analysis.communications import CommunicationTotals, total_communications
from truedag.tracer.analysis.critical_path import CriticalPath, find_critical_path
from truedag.tracer.analysis.device_fit import Fit, find_fits
from truedag.tracer.analysis.estimates import Estimates, forget_estimates, read_estimates
from truedag.tracer.analysis.experts import ExpertLoad, ExpertPlace, measure_loads, place_experts
from truedag.tracer.analysis.held_memory import HeldMemory, read_memory
from truedag.tracer.analysis.memory import RankMemory
from truedag.tracer.analysis.report_tables import read_tables
from truedag.tracer.analysis.report_text import render_report, write_html, write_markdown
from truedag.tracer.analysis.shares import RankShares, find_spans, measure_steps, share_time
from truedag.tracer.analysis.spans import length, union
from truedag.tracer.analysis.spread import Spread
from truedag.tracer.analysis.stragglers import Straggler, find_stragglers
from truedag.tracer.analysis.throughput import (
    Generation,
    Throughput,
    find_lookups,
    measure_generations,
    measure_throughput,
)
from truedag.tracer.errors import GraphError
from truedag.tracer.graph import Graph


@dataclass(frozen=True, slots=True, kw_only=True)
class PathTotals:
    """The critical paths of all steps together: ns of each kind, in all and by operator; and why there is none.

    Attributes:
        length_ns: the sum of the steps.
        by_kind: compute, transfer, waiting, host.
        by_op: the same for each operator, with total_ns, the most first.
        reason: why it is unknown; None: it is not.
    """

    length_ns: int
    by_kind: Mapping[str, int]
    by_op: tuple[Mapping[str, Any], ...]
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The run's numbers; the modules they come from say how each is told.

    Attributes:
        steps_ns: for each recorded step the time from the first start to the last end over all ranks; a step without a
            measurement is not in it.
        is_estimated: whether times are estimates, not measurements; num_estimated says of how many nodes. None of them
            enters a figure but `estimates`.
        step_spread: of those; None without any.
        ranks: each rank's time in all steps.
        ranks_by_step: the same, step by step.
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
    num_estimated: int
    is_estimated: bool
    steps_ns: dict[int, int]
    step_spread: Spread | None
    communications: tuple[CommunicationTotals, ...]
    ranks: tuple[RankShares, ...]
    ranks_by_step: tuple[RankShares, ...]
    stragglers: tuple[Straggler, ...]
    critical_path: PathTotals
    throughput: Throughput
    generations: tuple[Generation, ...]
    experts: tuple[ExpertPlace, ...]
    expert_loads: tuple[ExpertLoad, ...]
    memory: tuple[RankMemory, ...]
    held_memory: tuple[HeldMemory, ...]
    fits: tuple[Fit, ...]
    estimates: Estimates | None

    def render(self) -> RenderableType:
        """Return what the terminal shows."""
        return render_report(self)

    def _repr_markdown_(self) -> str:
        return write_markdown(self)

    def _repr_html_(self) -> str:
        return write_html(self)


def make_report(source: Path | Graph, *, peak_flops_per_s: float | None = None) -> Report:
    """Read the numbers off a dataset.

    Args:
        source: the dataset's folder, or its graph.
        peak_flops_per_s: what one rank's device can do; without it MFU is unknown.

    Raises:
        GraphError: there is no dataset, or it is broken.
    """
    graph = source if isinstance(source, Graph) else Graph.open(source)
    tables = read_tables(graph)
    num_estimated = int(tables.nodes.filter(pl.col("timing") == "estimated")["num"].sum())
    nodes, participants = (forget_estimates(frame, tables.nodes) for frame in (tables.nodes, tables.participants))
    groups, ranks, messages = tables.groups, tables.ranks, tables.messages
    meta = graph.meta
    windows = measure_steps(nodes, participants)
    spans = find_spans(nodes, participants, messages, groups, ranks)
    shares, by_step = share_time(spans, ranks, windows)
    paths, reason = _find_paths(graph, list(windows), num_estimated)
    operators = nodes.filter(pl.col("kind") == "compute")
    measured = operators.filter(pl.col("timing") == "measured")
    lookups = find_lookups(tables.nodes_where, ranks)
    span_ns = length(union(np.array(list(windows.values()), np.int64).reshape(-1, 2))) or None
    # What ran between the steps is in none of their times.
    counts = pl.col("step").is_in(list(windows)) if windows else pl.lit(value=True)
    work = operators.filter(counts & (pl.col("flops") > 0)).select("phase", flops=pl.col("flops") * pl.col("num"))
    held = tables.nodes_where((pl.col("kind") == "compute") & (pl.col("expert") >= 0)).filter(pl.col("rank") >= 0)
    memory = read_memory(meta, ranks)
    times = pl.when(pl.col("timing") == "measured").then("end_ns").alias("end_ns")
    return Report(
        deployment=meta.get("deployment"),
        strategy=meta.get("strategy"),
        world_size=int(meta["world_size"]),
        num_ranks=len(ranks),
        torch=str(meta["torch"]),
        recorder=str(meta["recorder"]),
        nodes=_count_kinds(nodes),
        edges=_sort_counts(tables.num_edges),
        num_views_dropped=int(meta["num_views_dropped"]),
        num_unmatched=int(meta["num_unmatched"]),
        unmatched=tuple(meta["unmatched"]),
        num_estimated=num_estimated,
        is_estimated=num_estimated > 0,
        steps_ns={step: end - start for step, (start, end) in windows.items()},
        step_spread=Spread.of([end - start for start, end in windows.values()]),
        communications=tuple(total_communications(nodes, participants, groups, messages, spans)),
        ranks=tuple(shares),
        ranks_by_step=tuple(by_step),
        stragglers=tuple(find_stragglers(operators.with_columns(times), ranks, paths)),
        critical_path=_total_paths(paths, reason),
        throughput=measure_throughput(work, lookups.filter(counts), span_ns, len(ranks), peak_flops_per_s),
        generations=tuple(
            measure_generations(
                measured.drop_nulls("end_ns"), lookups, ranks, {step: start for step, (start, _) in windows.items()}
            )
        ),
        experts=tuple(place_experts(held.select("layer", "expert", "rank").unique().collect())),
        expert_loads=tuple(measure_loads(tables.nodes_where, ranks)),
        memory=tables.memory,
        held_memory=tuple(memory),
        fits=find_fits(memory, meta),
        estimates=read_estimates(meta),
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
    return _sort_counts(dict(frame.group_by("kind").agg(pl.col("num").sum()).iter_rows()))


def _sort_counts(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _find_paths(graph: Graph, steps: list[int], num_estimated: int) -> tuple[list[CriticalPath] | None, str | None]:
    """Return the critical path of each step that has times; or why there is none."""
    if not steps:
        return None, "nothing has a measured time"
    if num_estimated:
        return None, "some times are estimates: truedag critical-path shows what they come to"
    try:
        return [find_critical_path(graph, step if step >= 0 else None) for step in steps], None
    except GraphError as error:
        return None, str(error)


def _total_paths(paths: list[CriticalPath] | None, reason: str | None) -> PathTotals:
    if paths is None:
        return PathTotals(length_ns=0, by_kind={}, by_op=(), reason=reason)
    kinds = pl.concat([path.total() for path in paths]).sum().row(0, named=True)
    by_op = pl.concat([path.total("op") for path in paths]).group_by("op").agg(pl.all().sum())
    return PathTotals(
        length_ns=sum(path.length_ns for path in paths),
        by_kind={name.removesuffix("_ns"): time for name, time in kinds.items() if name != "total_ns"},
        by_op=tuple(by_op.sort("total_ns", "op", descending=[True, False]).to_dicts()),
        reason=None,
    )
