"""What is asked of a class graph with times is what its whole graph says, and is told without making it."""

from __future__ import annotations

from dataclasses import asdict
from io import StringIO
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from rich.console import Console
from small_classes import write_classes

from truedag.tracer.analysis.critical_path import find_critical_path
from truedag.tracer.analysis.critical_path_text import render_critical_path
from truedag.tracer.analysis.report import make_report
from truedag.tracer.analysis.report_text import write_markdown
from truedag.tracer.graph import Graph
from truedag.tracer.views.page.clock import occupy
from truedag.tracer.views.page.figures import measure, on_ranks
from truedag.tracer.views.page.leaves import find_leaves
from truedag.tracer.views.page.slices import Slices, cut_slices
from truedag.tracer.views.page.traffic import collective_traffic, message_traffic, stage_matrix
from truedag.tracer.views.page.tree import build_tree
from truedag.tracer.views.page.verdicts import find_paths

_ORDER = ("rank", "lane", "start", "node")


@pytest.fixture
def graphs(tmp_path: Path) -> tuple[Graph, Graph]:
    """The class graph, and what it stands for: read node by node."""
    graph = Graph.open(write_classes(tmp_path / "dag"))
    whole = graph.subgraph(where=pl.lit(value=True))
    assert (graph.classes is None, whole.classes is None) == (False, True)
    assert len(whole.nodes.collect()) == graph.meta["num_nodes"]
    assert len(whole.edges.collect()) == graph.meta["num_edges"]
    return graph, whole


def slices_of(graph: Graph) -> Slices:
    leaves = find_leaves(graph)
    spent = occupy(graph, leaves)
    assert spent is not None
    return cut_slices(leaves, build_tree(leaves), spent.start_ns, spent.end_ns)


def test_slices_of_a_class_become_those_of_every_rank(graphs: tuple[Graph, Graph]) -> None:
    repeated, listed = map(slices_of, graphs)
    assert (len(repeated.table), repeated.num_slices) == (12, 24)
    assert repeated.leaves["alike"].unique().to_list() == [1, 3], "ranks whose experts have other names"
    assert_frame_equal(repeated.spread().sort(_ORDER), listed.spread().sort(_ORDER), check_dtypes=False)


def test_figures_of_the_page_are_those_of_every_node(graphs: tuple[Graph, Graph]) -> None:
    found = []
    for graph in graphs:
        leaves = find_leaves(graph)
        spent = on_ranks(leaves)
        tree = build_tree(leaves)
        found.append((leaves.table, leaves.edges, measure(leaves, tree, spent).table, stage_matrix(leaves, spent),
                      collective_traffic(leaves), *message_traffic(graph)))  # fmt: skip
    for one, other in zip(*found, strict=True):
        assert_frame_equal(one, other, check_dtypes=False)
    lazy, read = (occupy(graph, find_leaves(graph)) for graph in graphs)
    assert lazy is not None
    assert read is not None
    np.testing.assert_array_equal(lazy.bins, read.bins)
    np.testing.assert_array_equal(lazy.spent_ns, read.spent_ns)
    assert lazy.is_estimated


def test_the_report_is_that_of_every_node(graphs: tuple[Graph, Graph]) -> None:
    lazy, read = map(make_report, graphs)
    assert asdict(lazy) == asdict(read)
    assert lazy.num_estimated == sum(lazy.nodes.values()) - lazy.nodes["parameter"]
    assert [(one.axis, one.kind, one.num, one.num_groups, one.num_bytes) for one in lazy.communications] == [
        ("pp", "all-reduce", 2, 2, 128), ("ep", "all-to-all", 2, 2, 128), ("pp", "message", 2, 2, 128),
    ]  # fmt: skip
    assert [(place.experts, place.ranks) for place in lazy.experts] == [((0,), (0,)), ((1,), (1,)), ((0,), (2,)),
                                                                        ((1,), (3,))]  # fmt: skip


def test_the_critical_path_of_estimates_has_no_clock_error(graphs: tuple[Graph, Graph]) -> None:
    lazy, read = map(find_critical_path, graphs)
    assert lazy.length_ns == read.length_ns == lazy.total()["total_ns"].item()
    assert lazy.total().equals(read.total())
    assert lazy.error_ns is read.error_ns is None
    assert (lazy.is_of_classes, read.is_of_classes) == (True, False)
    told = ["node", "group", "rank", "late_ns", "waited_ns"]
    assert lazy.stragglers.select(told).join(read.stragglers.select(told), on=told, how="anti").is_empty()
    assert set(lazy.slack["node"]) <= set(read.slack["node"])
    console = Console(width=100, file=StringIO())
    console.print(render_critical_path(lazy, title="small", top=3))
    said = " ".join(console.file.getvalue().split())
    assert "estimated: on one clock" in said
    assert "clock error" not in said
    assert "Each rank stands for all of its class" in said
    told = [find_paths(graph, find_leaves(graph)) for graph in graphs]
    assert told[0].steps[0]["is_estimated"]
    own, every = (one.stragglers.select("node", "start_ns", "end_ns") for one in told)
    assert own.null_count().sum_horizontal().item() == 0
    assert own.join(every, on=own.columns, how="anti").is_empty()


def test_a_rank_that_does_not_fit_is_told_first(graphs: tuple[Graph, Graph]) -> None:
    report = make_report(graphs[0])
    assert [(fit.ranks, fit.peak_bytes, fit.fits) for fit in report.fits] == [((2, 3), 1100, False),
                                                                              ((0, 1), 900, True)]  # fmt: skip
    text = write_markdown(report)
    facts = [line for line in text.splitlines() if line.startswith("- ")]
    assert facts[0].startswith(
        "- ranks 2,3: DOES NOT FIT: 110.0% of h100's 1000 B, 100 B too much at the peak; not coun"
    )
    assert "(90.0% of h100's 1000 B, 100 B left)" in text
    estimates = text.partition("## Estimated on h100, 8 of them a node, not measured")[2].partition("##")[0]
    assert "| MFU | 25.00 % |" in estimates
    assert "| are in the pipeline's bubble | 12.5 % |" in estimates
    assert "| assumed | links are free |" in estimates
    assert "| assumed | nothing is computed |" in estimates
