"""Hold the graph of a dry run against the graph of the real run, node by node and edge by edge.

A node is named by what it is, not by its id, which follows the clock: an operator by its rank and its place in that
rank's program, a collective by its group and its place there, a message by its rank, group and microbatch and its place
among these, what goes in or out by what it feeds or is fed by. All that the tables say is compared but times, threads
and devices: a dry run has none that mean anything.

Four differences are right, and named here; anything else is listed.

- **Gloo's copies.** Gloo has no reduce-scatter: it reduces everything into memory of its own and copies the rank's part
  out of it when the program waits. That copy is an operator of the real run only; who reads it reads the
  reduce-scatter.
- **Gloo's reduce.** It leaves partial sums in the tensors of those that are not its root, and so they are written;
  other backends write the root's alone.
- **Numbers.** A Python number that is written into chosen elements of a tensor is made a tensor first; on the CPU torch
  does that without an operator, on every other device by `scalar_tensor`.
- **Out of place.** Where nobody else can see it autograd adds gradients up in place, and writes them into zeros; on
  tensors without memory, as under a TorchDispatchMode, it does so out of place (`_IN_PLACE`). The data flows along the
  same edges, but for those that tell `_ALIKE` which tensor to be like: they carry nothing, and come from where the
  memory was taken, which in place was earlier.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from truedag.tracer.graph import Graph

Name: TypeAlias = tuple[Any, ...]

_SAID = (
    "kind",
    "category",
    "op",
    "label",
    "module",
    "layer",
    "stage",
    "microbatch",
    "expert",
    "phase",
    "step",
    "decode_step",
    "flops",
    "bytes_read",
    "bytes_written",
    "gradient",
    "inputs",
    "outputs",
)
_REDUCE = "c10d::reduce_"
_UNKNOWN = ("input", "")
_IN_PLACE = {
    "aten::add_": "add",
    "aten::scatter_": "scatter",
    "aten::masked_scatter_": "masked_scatter",
    "aten::index_add_": "index_add",
    "aten::scatter_add_": "scatter_add",
    "aten::new_zeros": "zeros",
}
_ALIKE = ("aten::new_zeros", "aten::new_empty_strided")
_ENDS = ("parameter", "input", "output")


@dataclass(slots=True)
class NamedGraph:
    """A graph by names that do not depend on when anything ran."""

    nodes: dict[Name, dict[str, Any]]
    edges: Counter[Name]
    participants: dict[Name, list[Name]]
    groups: Counter[Name]
    ranks: list[Name]


def name_graph(graph: Graph) -> NamedGraph:
    """Name all nodes, and leave out what is rightly different."""
    nodes = {row["node"]: row for row in graph.nodes.sort("node").collect().iter_rows(named=True)}
    edges = [
        (src, dst, kind, count, dtype, None if shape is None else tuple(shape))
        for src, dst, kind, count, dtype, shape in graph.edges.select("src", "dst", "kind", "bytes", "dtype", "shape")
        .collect()
        .iter_rows()
    ]
    left_out = _find_copies_of_gloo(nodes, edges) | _find_numbers(nodes, edges)
    edges = [
        edge for edge in _bypass(nodes, edges, left_out) if not (nodes[edge[1]]["op"] in _ALIKE and edge[2] == "data")
    ]
    parts = _participants(graph)
    names = _name_operators(nodes, parts, left_out)
    _name_ends(nodes, edges, names)
    ranks = graph.ranks.drop("host", "device", "clock_offset_ns", "clock_error_ns").sort("rank").collect()
    return NamedGraph(
        nodes={names[node]: _say(row) for node, row in nodes.items() if node not in left_out},
        edges=Counter((names[src], names[dst], *what) for src, dst, *what in edges),
        participants={names[node]: part for node, part in parts.items()},
        groups=Counter(
            (axis, name, description, tuple(members))
            for axis, name, description, members in graph.groups.select("axis", "name", "description", "ranks")
            .collect()
            .iter_rows()
        ),
        ranks=list(ranks.iter_rows()),
    )


def _find_copies_of_gloo(nodes: dict[int, dict[str, Any]], edges: list[Any]) -> set[int]:
    return {
        dst
        for src, dst, kind, *_ in edges
        if kind == "data" and nodes[dst]["op"] == "aten::copy_" and "reduce_scatter" in nodes[src]["op"]
    }


def _find_numbers(nodes: dict[int, dict[str, Any]], edges: list[Any]) -> set[int]:
    numbers = {
        node
        for node, row in nodes.items()
        if row["outputs"].endswith("[]")
        and (row["op"] == "aten::scalar_tensor" or (row["op"], row["label"]) == _UNKNOWN)
    }
    return {src for src, dst, *_ in edges if src in numbers and nodes[dst]["op"].startswith("aten::index_put")}


def _bypass(nodes: dict[int, dict[str, Any]], edges: list[Any], left_out: set[int]) -> Iterator[Any]:
    """Lead what comes out of a copy that is left out from its reduce-scatter, and program order past what is left out.

    Edges into what is left out go with it.
    """
    before: dict[int, int] = {}
    source: dict[int, int] = {}
    for src, dst, kind, *_ in edges:
        if dst in left_out and kind == "order":
            before[dst] = src
        if dst in left_out and kind == "data" and "reduce_scatter" in nodes[src]["op"]:
            source[dst] = src
    for src, dst, kind, *what in edges:
        if dst in left_out:
            continue
        first = src
        while first in left_out:
            first = (before if kind == "order" else source).get(first, -1)
        if first >= 0:
            yield first, dst, kind, *what


def _participants(graph: Graph) -> dict[int, list[Name]]:
    """Each rank's part, by node. Backends number from different points on: the place in the recording counts.

    Which message is which, the edges between sends and receives say.
    """
    parts = graph.participants.join(graph.groups, on="group").join(graph.nodes.select("node", "kind", "op"), on="node")
    place: Counter[Name] = Counter()
    by_node: dict[int, list[Name]] = {}
    for row in parts.sort("seq").collect().iter_rows(named=True):
        group = (row["axis"], row["name"], tuple(row["ranks"]))
        lane = (*group, row["rank"], row["kind"])
        place[lane] += 1
        number = place[lane] if row["kind"] == "collective" else 0
        received = None if row["op"] == _REDUCE else row["recv_bytes"]
        part = (*group, row["rank"], number, row["send_bytes"], received)
        by_node.setdefault(row["node"], []).append(part)
    return {node: sorted(part) for node, part in by_node.items()}


def _name_operators(
    nodes: dict[int, dict[str, Any]], parts: dict[int, list[Name]], left_out: set[int]
) -> dict[int, Name]:
    names: dict[int, Name] = {}
    place: Counter[Name] = Counter()
    ran = [row for node, row in nodes.items() if row["kind"] not in _ENDS and node not in left_out]
    for row in sorted(ran, key=lambda row: (row["rank"], row["host_start_ns"] or 0)):
        if row["kind"] == "collective":
            axis, group, members, _, number, *_ = parts[row["node"]][0]
            names[row["node"]] = ("collective", axis, group, members, number)
        elif row["kind"] == "compute":
            name = ("operator", row["rank"])
            place[name] += 1
            names[row["node"]] = (*name, place[name])
    # Nothing waits for a message that was only begun: which of two in different directions comes first is no matter.
    for node, part in parts.items():
        row = nodes[node]
        if row["kind"] in ("send", "recv"):
            name = (row["kind"], row["rank"], part[0][:3], row["phase"], row["microbatch"])
            place[name] += 1
            names[node] = (*name, place[name])
    return names


def _name_ends(nodes: dict[int, dict[str, Any]], edges: list[Any], names: dict[int, Name]) -> None:
    """What goes in is named by what it feeds, what comes out by what feeds it."""
    neighbours: dict[int, list[Name]] = {}
    for src, dst, *_ in edges:
        if src not in names and dst in names:
            neighbours.setdefault(src, []).append(names[dst])
        elif dst not in names and src in names:
            neighbours.setdefault(dst, []).append(names[src])
    seen: Counter[Name] = Counter()
    for node, row in nodes.items():
        if row["kind"] in _ENDS:
            first = min(neighbours.get(node, [()]), key=repr)
            name = (row["kind"], row["rank"], row["label"], row["outputs"], row["inputs"], first)
            seen[name] += 1
            names[node] = (*name, seen[name])


def _say(row: dict[str, Any]) -> dict[str, Any]:
    said = {column: row[column] for column in _SAID}
    if said["phase"] == "backward" and (same := _IN_PLACE.get(said["op"])):
        said |= {"op": f"aten::{same}", "label": same}
    if said["op"] == _REDUCE:
        said["bytes_written"] = None
    return said


def list_differences(dry: Graph, real: Graph) -> list[str]:
    """Return every difference between the two graphs that is not right, in words; [] where they are the same."""
    ours, theirs = name_graph(dry), name_graph(real)
    found: list[str] = []
    for name in ours.nodes.keys() | theirs.nodes.keys():
        here, there = ours.nodes.get(name), theirs.nodes.get(name)
        if here is None or there is None:
            found.append(f"{name}: only in the {'real' if here is None else 'dry'} graph: {here or there}")
            continue
        found.extend(
            f"{name} ({here['op']}, {here['module']}): {column} is {here[column]!r} in the dry graph, "
            f"{there[column]!r} in the real one"
            for column in _SAID
            if here[column] != there[column]
        )
        if ours.participants.get(name) != theirs.participants.get(name):
            found.append(f"{name}: participants {ours.participants.get(name)}, {theirs.participants.get(name)}")
    found.extend(
        f"edge {edge}: {ours.edges[edge]} in the dry graph, {theirs.edges[edge]} in the real one"
        for edge in ours.edges.keys() | theirs.edges.keys()
        if ours.edges[edge] != theirs.edges[edge]
    )
    if ours.groups != theirs.groups:
        found.append(f"groups: only dry {ours.groups - theirs.groups}, only real {theirs.groups - ours.groups}")
    if ours.ranks != theirs.ranks:
        found.append(f"ranks: {ours.ranks} dry, {theirs.ranks} real")
    return sorted(found)
