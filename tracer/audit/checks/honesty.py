"""Checks of whether a drawing shows what it claims to show: dots, representatives, far too few nodes."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.drawing.reading import DrawnSubject
from truedag.tracer.audit.findings import Audit, Finding, pick_nodes, write_count
from truedag.tracer.audit.plan import Plan

_AFTER = ("backward", "optimizer")


def check_honesty(drawn: DrawnSubject, plan: Plan | None, audit: Audit) -> None:
    """Check what a drawing hides."""
    number = len(drawn.document.nodes)
    audit.judge("honesty.ellipsis", _ellipses(drawn), f"{number:,} labels")
    audit.judge("honesty.sampling", _samples(drawn, plan), f"{number:,} labels")
    if plan is not None:
        audit.judge("honesty.node-count", _count(drawn, plan), f"{number:,} nodes")


def _finding(check: str, title: str, expected: str, found: str, nodes: list[str]) -> Finding:
    return Finding(
        check=check, title=title, expected=expected, found=found, fix=CHECKS[check].fix,
        severity=CHECKS[check].severity, nodes=pick_nodes(nodes), num_nodes=len(nodes),
    )  # fmt: skip


def _ellipses(drawn: DrawnSubject) -> Iterator[Finding]:
    hidden = [name for name, reading in drawn.readings.items() if reading.is_ellipsis]
    if hidden:
        yield _finding(
            "honesty.ellipsis", f"{write_count(len(hidden), 'node')} hide{'s' if len(hidden) == 1 else ''} something "
            "behind dots, 'same as' or a count", "every operator drawn, or folded with what it stands for",
            write_count(len(hidden), "such node"), hidden,
        )  # fmt: skip
    # The backward pass of a layer that is drawn in full may be one node.
    full = set(drawn.subject.covers.filter(pl.col("role").is_not_null())["layer"])
    whole = [
        name
        for name, reading in drawn.readings.items()
        if reading.is_whole and not (reading.phase in _AFTER and full.issuperset(reading.numbers["layers"]))
    ]
    if whole:
        layers = {layer for name in whole for layer in drawn.readings[name].numbers["layers"]}
        yield _finding(
            "honesty.ellipsis", f"{write_count(len(layers), 'layer')} {'is' if len(layers) == 1 else 'are'} drawn as "
            f"{'a whole' if len(layers) == 1 else 'wholes'}, with nothing of what is inside: {write_runs(layers)}",
            "the operators and communications of each layer", write_count(len(whole), "such node"), whole,
        )  # fmt: skip


def _samples(drawn: DrawnSubject, plan: Plan | None) -> Iterator[Finding]:
    told = [name for name, reading in drawn.readings.items() if reading.is_sampled]
    if told:
        yield _finding(
            "honesty.sampling", f"{write_count(len(told), 'node')} stand{'s' if len(told) == 1 else ''} for others as "
            "examples",
            "all of them, or a fold that says which", write_count(len(told), "representative"), told,
        )  # fmt: skip
    if plan is None:
        return
    world = plan.expectation.world_size
    shown = sorted(set(drawn.subject.where["rank"]))
    if shown and len(shown) <= world // 4:
        yield _finding(
            "honesty.sampling", f"{len(shown)} of {world} GPUs are drawn, as if they stood for all: "
            f"{write_runs(shown)}",
            f"{world} GPUs, one by one or as ranges", f"{len(shown)}",
            [],
        )  # fmt: skip


def _count(drawn: DrawnSubject, plan: Plan) -> Iterator[Finding]:
    expectation = plan.expectation
    number = len(drawn.document.nodes)
    folded = sum(len(row.layers) for row in expectation.operators)
    # A node that says of which layers it is stands for one operator in each of them.
    told = drawn.subject.covers.filter(pl.col("layer") >= 0).select("role", "layer").unique()
    nodes = drawn.subject.covers.filter(pl.col("layer") >= 0)["node"].n_unique()
    if number - nodes + max(nodes, len(told)) < folded // 2:
        yield _finding(
            "honesty.node-count",
            f"{number:,} nodes for {expectation.world_size:,} GPUs: one pass forward alone has "
            f"{expectation.num_nodes or 0:,} operators, and {folded:,} where all ranks and experts are folded",
            f"at least {folded:,} nodes, folded", f"{number:,}", [],
        )  # fmt: skip
