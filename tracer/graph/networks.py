"""The graph in the hands of other libraries."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import polars as pl

from truedag.tracer.errors import GraphError

if TYPE_CHECKING:
    import networkx as nx


def to_networkx(nodes: pl.LazyFrame, edges: pl.LazyFrame) -> nx.MultiDiGraph[int]:
    """Return a networkx graph; nodes are the graph's numbers, all other columns attributes."""
    import networkx as nx

    graph: nx.MultiDiGraph[int] = nx.MultiDiGraph()
    graph.add_nodes_from((row.pop("node"), row) for row in nodes.collect().iter_rows(named=True))
    graph.add_edges_from((row.pop("src"), row.pop("dst"), row) for row in edges.collect().iter_rows(named=True))
    return graph


def to_rustworkx(nodes: pl.LazyFrame, edges: pl.LazyFrame) -> Any:
    """Return a `rustworkx.PyDiGraph` whose payloads are rows; see `Graph.to_rustworkx`.

    Raises:
        GraphError: rustworkx is not installed.
    """
    try:
        rustworkx = importlib.import_module("rustworkx")
    except ModuleNotFoundError as error:
        raise GraphError("rustworkx is not installed: pip install 'truedag[rustworkx]'") from error
    known, between = nodes.collect(), edges.collect()
    index = pl.DataFrame({"node": known["node"], "index": range(len(known))})
    ends = [between.select(node=end).join(index, on="node", maintain_order="left")["index"] for end in ("src", "dst")]
    graph = rustworkx.PyDiGraph(multigraph=True, node_count_hint=len(known), edge_count_hint=len(between))
    graph.add_nodes_from(known.to_dicts())
    graph.add_edges_from(list(zip(*(end.to_list() for end in ends), between.to_dicts(), strict=True)))
    return graph
