"""Exports by name: what each is for, how much its readers take, and the way there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from truedag.tracer.errors import GraphError
from truedag.tracer.export.chakra import write_chakra
from truedag.tracer.export.chrome import write_chrome
from truedag.tracer.export.model_explorer import write_model_explorer
from truedag.tracer.export.network import Network, make_network
from truedag.tracer.export.networks import write_graphml, write_node_link
from truedag.tracer.export.perfetto import write_perfetto
from truedag.tracer.export.tables import write_csv
from truedag.tracer.export.timeline import COMMUNICATIONS, count_slices
from truedag.tracer.graph import Graph
from truedag.tracer.graph.levels import Level

Show = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format that a graph is written in; exactly one of the writers is there.

    Attributes:
        name: what `--to` takes.
        summary: what it is for.
        file: what the file is called; of a folder, the folder.
        is_folder: whether it is several files.
        most: how many slices or nodes its readers take; None: any.
        write_graph: of a timeline, or of all tables.
        write_network: of nodes and edges, which may be a fold's.
        is_timeline: whether what it holds are slices of time.
    """

    name: str
    summary: str
    file: str
    is_folder: bool = False
    most: int | None = None
    write_graph: Callable[[Graph, Path, Show], Mapping[str, int]] | None = None
    write_network: Callable[[Network, Path, Show], Mapping[str, int]] | None = None
    is_timeline: bool = False


FORMATS: Mapping[str, Format] = {
    one.name: one
    for one in (
        Format(
            name="perfetto", summary="timeline for ui.perfetto.dev: ranks, streams, flows of communications",
            file="timeline.perfetto-trace", most=20_000_000, write_graph=write_perfetto, is_timeline=True,
        ),
        Format(
            name="chrome", summary="the same timeline as trace event JSON, for chrome://tracing and others",
            file="timeline.json", most=1_000_000, write_graph=write_chrome, is_timeline=True,
        ),
        Format(
            name="chakra", summary="Chakra execution traces, one a rank, for its tools and ASTRA-sim", file="chakra",
            is_folder=True, write_graph=write_chakra,
        ),
        Format(
            name="graphml", summary="GraphML for yEd, Gephi, Cytoscape, igraph", file="graph.graphml", most=500_000,
            write_network=write_graphml,
        ),
        Format(
            name="node-link", summary="node-link JSON for networkx and D3", file="graph.json", most=500_000,
            write_network=write_node_link,
        ),
        Format(
            name="model-explorer", summary="nested graph for Google's Model Explorer", file="model-explorer.json",
            most=150_000, write_network=write_model_explorer,
        ),
        Format(
            name="csv", summary="all tables as CSV", file="csv", is_folder=True, write_graph=write_csv,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written: where, how much, what of the part is on no timeline, having no time, and how many estimates.

    Attributes:
        path: the file or folder.
        counts: of what is in it.
        num_untimed: operators and parts in communications that a timeline leaves out.
        num_estimated: nodes whose times are estimates; what was written says so of each.
    """

    path: Path
    counts: Mapping[str, int]
    num_untimed: int
    num_estimated: int


def export(
    graph: Graph, to: Format, path: Path, *, fold: Level | None = None, order: bool = False, most: int | None = None,
    replace: bool = False, show: Show,
) -> Exported:  # fmt: skip
    """Write a graph, or a part of one, in a format.

    Args:
        graph: what is written.
        to: the format.
        path: the file or folder.
        fold: to which level, of formats of nodes and edges.
        order: keep program order's edges in those.
        most: refuse more than so many slices or nodes; None: what the format's readers take.
        replace: whether what is there may be replaced.
        show: is told what goes on.

    Raises:
        GraphError: nothing is in it, it is more than the reader takes, cannot be folded, has no times, or cannot
            be written.
    """
    if path.exists() and not replace:
        raise GraphError(f"{path} is there already: name another with --out, or replace it with --force")
    if fold is not None and to.write_network is None:
        folding = ", ".join(one.name for one in FORMATS.values() if one.write_network is not None)
        raise GraphError(f"{to.name} is not a format of nodes and edges and takes no fold: {folding} do")
    num_nodes = graph.nodes.select(pl.len()).collect().item()
    if not num_nodes:
        raise GraphError(_describe_nothing(graph))
    bound = to.most if most is None else most
    network = None
    if to.write_network is not None:
        if fold is None:
            _check(graph, to, num_nodes, bound)
        show("reading the graph" if fold is None else f"folding by {fold}")
        network = make_network(graph, fold, order=order)
        _check(graph, to, len(network.nodes), bound)
    elif to.is_timeline:
        _check(graph, to, count_slices(graph), bound)
    # Written beside its place first: what is there is whole, also when writing fails.
    part = path.with_name(f"{path.name}.part")
    try:
        _remove(part)
        part.parent.mkdir(parents=True, exist_ok=True)
        if to.is_folder:
            part.mkdir()
        if network is not None and to.write_network is not None:
            counts = to.write_network(network, part, show)
        elif to.write_graph is not None:
            counts = to.write_graph(graph, part, show)
        _remove(path)
        part.replace(path)
    except OSError as error:
        raise GraphError(f"cannot write {path}: {error}") from error
    is_estimated = pl.col("timing") == "estimated"
    return Exported(
        path=path,
        counts=counts,
        num_untimed=_count_untimed(graph) if to.is_timeline else 0,
        num_estimated=graph.nodes.select(is_estimated.sum()).collect().item(),
    )


def _describe_nothing(graph: Graph) -> str:
    nodes = graph.whole.nodes
    steps = nodes.select("step").unique().collect()["step"].sort().to_list()
    begin, end = nodes.select(pl.col("start_ns").min(), end=pl.col("end_ns").max()).collect().row(0)
    told = [f"its steps are {', '.join(str(step) for step in steps if step >= 0) or 'not told'}"]
    if begin is not None and end is not None:
        told.append(f"a window lies between 0ms and {(end - begin) / 1e6:,.0f}ms")
    return f"there is nothing in the part of {graph.path} that was asked for: {', '.join(told)}"


def _check(graph: Graph, to: Format, num: int, bound: int | None) -> None:
    if bound is None or num <= bound:
        return
    what = "slices" if to.is_timeline else "nodes"
    ranks = graph.ranks.select(pl.len()).collect().item()
    ways = [f"fewer --ranks ({what} of a rank: about {num // ranks:,})"] if ranks > 1 else []
    if graph.nodes.select(pl.col("start_ns").is_not_null().any()).collect().item():
        ways.append("a --window of time")
    if to.write_network is not None:
        ways.append("--fold module, layer or stage")
    raise GraphError(
        f"{graph.path} has {num:,} {what} in the part that was asked for, and readers of {to.name} take about "
        f"{bound:,}: choose {', '.join(ways)}; or raise the bound with --max"
    )


def _count_untimed(graph: Graph) -> int:
    late = (pl.col("kind") == "compute") & pl.col("end_ns").is_null()
    untold = pl.col("arrive_ns").is_null()
    operators = graph.nodes.select(late.sum()).collect().item()
    met = graph.nodes.filter(pl.col("kind").is_in(COMMUNICATIONS)).select("node")
    missing = graph.participants.filter(untold).join(met, on="node", how="semi").select(pl.len()).collect().item()
    return int(operators + missing)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
