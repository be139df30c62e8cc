"""Model Explorer's JSON: nested by rank, then module, with edges and tensor types.

Source: google-ai-edge/model-explorer, the JSON of adapters (label, graphs, nodes, namespace, incomingEdges).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from truedag.tracer.export.network import Network

_NOT_TOLD = ("node", "label", "module", "inputs", "outputs", "ranks")


def write_model_explorer(network: Network, path: Path, show: Callable[[str], None]) -> Mapping[str, int]:
    """Write a graph collection of one graph.

    Raises:
        OSError: it cannot be written.
    """
    incoming: dict[int, list[dict[str, Any]]] = {}
    for row in network.edges.iter_rows(named=True):
        edge = {"sourceNodeId": str(row["src"]), "sourceNodeOutputId": "0", "targetNodeInputId": row["kind"]}
        told = [_attribute(name, value) for name, value in _tell(row, ("src", "dst"))]
        incoming.setdefault(row["dst"], []).append(edge | {"metadata": told})
    show("writing nodes")
    with path.open("w", encoding="utf-8") as file:
        head = {"label": network.name, "graphs": [{"id": network.name}]}
        # The list of nodes is written one by one: the whole need not be in memory as objects.
        file.write(json.dumps(head)[:-3] + ', "nodes": [\n')
        for place, row in enumerate(network.nodes.iter_rows(named=True)):
            file.write(("" if place == 0 else ",\n") + json.dumps(_describe(row, incoming.get(row["node"], []))))
        file.write("\n]}]}\n")
    return {"num_nodes": len(network.nodes), "num_edges": len(network.edges)}


def _describe(row: Mapping[str, Any], incoming: list[dict[str, Any]]) -> dict[str, Any]:
    label = row.get("label") or row.get("module") or str(row["kind"])
    if row.get("layer") is not None and "label" not in row:
        label = row.get("module") or f"layer {row['layer']}"
    node: dict[str, Any] = {
        "id": str(row["node"]),
        "label": label,
        "namespace": "/".join(_place(row)),
        "attrs": [_attribute(name, value) for name, value in _tell(row, _NOT_TOLD)],
        "incomingEdges": incoming,
    }
    if row.get("outputs"):
        types = " ".join(str(row["outputs"]).split())
        node["outputsMetadata"] = [{"id": "0", "attrs": [_attribute("tensor_shape", types)]}]
    if row.get("inputs"):
        node["attrs"].append(_attribute("inputs", row["inputs"]))
    return node


def _place(row: Mapping[str, Any]) -> Iterator[str]:
    """A rank's own are under it, module below module; what spans ranks lies beside them, under its kind."""
    rank = row.get("rank")
    ranks = str(row.get("ranks") or "").split()
    if rank is None and len(ranks) == 1:
        rank = int(ranks[0])
    if rank is None or rank < 0:
        yield str(row["kind"])
        return
    yield f"rank {rank}"
    for name in ("phase", "microbatch"):
        if row.get(name) is not None:
            yield f"{name} {row[name]}" if name == "microbatch" else str(row[name])
    if row.get("module"):
        yield from str(row["module"]).split(".")


def _tell(row: Mapping[str, Any], but: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in row.items() if value is not None and name not in but]


def _attribute(name: str, value: object) -> dict[str, str]:
    return {"key": name, "value": str(value)}
