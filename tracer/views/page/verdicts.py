"""What was found out elsewhere, brought to places in the page: the critical path, stragglers, an audit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from truedag.tracer.analysis.critical_path import CriticalPath, find_critical_path
from truedag.tracer.errors import GraphError
from truedag.tracer.graph import Graph
from truedag.tracer.views.page.leaves import Leaves

MOST_NODES = 3_000_000  # read one by one; above, the critical path takes minutes: `truedag critical-path` says it
_MOST_STRAGGLERS = 500
_MOST_SHOWN_NODES = 40
_NUMBER = re.compile(r"^(\d+)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Critical paths of all recorded steps.

    Attributes:
        steps: step, start_ns, end_ns, error_ns, is_estimated.
        pieces: step, start_ns, end_ns, spent, rank, node, leaf; what follows on one rank, leaf and kind is one piece.
        stragglers: node, leaf, label, group, phase, layer, rank, late_ns, waited_ns, held_spent, held_ns, held_rank,
            held_node, held_label; start_ns, end_ns, from the first arrival to the last end.
        num_stragglers: how many there are; of each step the first of them, the most waited for, are listed.
        why_not: why there is none; "" if there is.
    """

    steps: list[dict[str, Any]]
    pieces: pl.DataFrame
    stragglers: pl.DataFrame
    num_stragglers: int
    why_not: str


def find_paths(graph: Graph, leaves: Leaves) -> Paths:
    """Find them, where there are times and the graph is not too large for that."""
    if not leaves.has_times:
        dry = ", as this is a dry run: truedag dry --device NAME estimates times" if graph.meta.get("dry") else ""
        return _none(f"no operator and no communication has a time{dry}")
    if graph.one_of_each is None and leaves.num_nodes > MOST_NODES:
        return _none(
            f"not computed for this page, which has {leaves.num_nodes:,} nodes: truedag critical-path prints it"
        )
    told = leaves.table["step"].unique().sort().to_list()
    steps: list[int | None] = [step for step in told if step is not None and step >= 0] or [None]
    found: list[CriticalPath] = []
    try:
        found += [find_critical_path(graph, step) for step in steps]
    except GraphError as error:
        return _none(str(error))
    rows = [
        {"step": path.step, "start_ns": path.start_ns, "end_ns": path.end_ns, "error_ns": path.error_ns,
         "is_estimated": path.is_estimated, "num_untimed": path.num_untimed}
        for path in found
    ]  # fmt: skip
    return Paths(
        steps=rows,
        pieces=pl.concat([_join_pieces(path, leaves) for path in found]),
        stragglers=pl.concat([_stragglers(path, leaves) for path in found]),
        num_stragglers=sum(len(path.stragglers) for path in found),
        why_not="",
    )


def place_findings(audit: Mapping[str, Any] | None, leaves: Leaves) -> Sequence[Mapping[str, Any]]:
    """Return an audit's findings (`audit.report.to_json`), each with the leaves and nodes that it is about."""
    findings = [] if audit is None else audit["findings"]
    placed = []
    for finding in findings:
        told = [int(found[1]) for name in finding["nodes"] if (found := _NUMBER.match(str(name)))]
        found_leaves = leaves.leaf_of(told).tolist()
        nodes = [node for node, leaf in zip(told, found_leaves, strict=True) if leaf >= 0]
        placed.append(
            {key: finding[key] for key in ("check", "severity", "title", "expected", "found", "fix", "num_nodes")}
            | {"ranks": finding["ranks"], "layers": finding["layers"], "nodes": nodes[:_MOST_SHOWN_NODES]}
            | {"leaves": sorted({leaf for leaf in found_leaves if leaf >= 0})}
            | {"follows": finding.get("follows")}  # from which, counted from 1; None: from none
        )
    return placed


def _join_pieces(path: CriticalPath, leaves: Leaves) -> pl.DataFrame:
    pieces = path.pieces.select("start_ns", "end_ns", "spent", "rank", "node").with_columns(
        leaf=pl.Series(leaves.leaf_of(path.pieces["node"])), step=pl.lit(-1 if path.step is None else path.step)
    )
    return (
        pieces.with_columns(run=pl.struct("leaf", "rank", "spent").rle_id())
        .group_by("run", maintain_order=True)
        .agg(
            pl.col("step", "spent", "rank", "node", "leaf").first(),
            pl.col("start_ns").min(),
            pl.col("end_ns").max(),
        )
        .drop("run")
    )


def _stragglers(path: CriticalPath, leaves: Leaves) -> pl.DataFrame:
    most = path.stragglers.head(_MOST_STRAGGLERS)
    columns = ("node", "label", "group", "phase", "layer", "rank", "late_ns", "waited_ns", "held_spent", "held_ns",
               "held_rank", "held_node", "held_label")  # fmt: skip
    told = most.select(columns).with_columns(
        leaf=pl.Series(leaves.leaf_of(most["node"])), row=pl.Series(leaves.find(most["node"].to_numpy()))
    )
    # By rows: a part's node is its class's, which in another of its groups has another number.
    spans = (
        leaves.parts.join(told.select("row").unique(), on="row", how="semi")
        .group_by("row")
        .agg(start_ns=pl.min_horizontal("arrive_ns", "start_ns").min(), end_ns=pl.col("end_ns").max())
    )
    return told.join(spans, on="row", how="left", maintain_order="left").drop("row")


def _none(why: str) -> Paths:
    return Paths(steps=[], pieces=pl.DataFrame(), stragglers=pl.DataFrame(), num_stragglers=0, why_not=why)
