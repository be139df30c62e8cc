"""GraphML and node-link JSON, both written by networkx and read back by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from truedag.tracer.export.network import Network

if TYPE_CHECKING:
    import networkx as nx


def write_graphml(network: Network, path: Path, show: Callable[[str], None]) -> Mapping[str, int]:
    """Write GraphML: for yEd, Gephi, igraph, Cytoscape.

    Raises:
        OSError: it cannot be written.
    """
    import networkx as nx

    graph = _to_networkx(network)
    show("writing GraphML")
    nx.write_graphml(graph, path)
    return _count(graph)


def write_node_link(network: Network, path: Path, show: Callable[[str], None]) -> Mapping[str, int]:
    """Write node-link JSON: for networkx itself, and D3.

    Raises:
        OSError: it cannot be written.
    """
    import networkx as nx

    graph = _to_networkx(network)
    show("writing JSON")
    with path.open("w", encoding="utf-8") as file:
        json.dump(nx.node_link_data(graph, edges="links"), file)
    return _count(graph)


def _to_networkx(network: Network) -> nx.MultiDiGraph[int]:
    """Attributes are those that are known: GraphML has no null."""
    import networkx as nx

    graph: nx.MultiDiGraph[int] = nx.MultiDiGraph(name=network.name)
    for row in _rows(network.nodes):
        graph.add_node(row.pop("node"), **row)
    for row in _rows(network.edges):
        graph.add_edge(row.pop("src"), row.pop("dst"), **row)
    return graph


def _rows(frame: pl.DataFrame) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if value is not None} for row in frame.iter_rows(named=True)]


def _count(graph: nx.MultiDiGraph[int]) -> Mapping[str, int]:
    return {"num_nodes": graph.number_of_nodes(), "num_edges": graph.number_of_edges()}
