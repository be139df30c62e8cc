"""Communications that are drawn as labels of edges: `a -> b [label="NCCL AllReduce"]` becomes a node between the two.

An edge between parts of different nodes is a communication of what leaves the first: those of one label that lead from
one part to another on several ranks are one collective, seen by each of its ranks. Edges between equal parts on
different ranks (the same operator on GPU 0 and on GPU 1) are an exchange among these ranks: what they connect is one
collective, which reads from all of them and is read by what follows them. An edge at a node that is a communication
itself only repeats what that node says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from truedag.tracer.audit.drawing.document import Document, DrawnEdge, DrawnNode
from truedag.tracer.audit.drawing.grammar import EXCHANGES, Reading, read_label


@dataclass(frozen=True, slots=True, kw_only=True)
class _Labelled:
    edge: DrawnEdge
    reading: Reading
    is_exchange: bool
    """Between equal parts, not from one part to the next."""


def name_communications(
    document: Document, readings: Mapping[str, Reading]
) -> tuple[Document, dict[str, Reading], frozenset[str]]:
    """Return a drawing and its readings with a node for each communication that edges name, and these nodes' names."""
    labelled: dict[tuple[object, ...], list[_Labelled]] = {}
    shapes = {node.id: node for node in document.nodes}
    kept = []
    for edge in document.edges:
        found = _labelled(edge, readings, shapes)
        if found is None:
            kept.append(edge)
        else:
            labelled.setdefault(_key(found, readings), []).append(found)
    if not labelled:
        return document, dict(readings), frozenset()
    nodes, edges, told = list(document.nodes), kept, dict(readings)
    following: dict[str, list[str]] = {}
    for edge in kept:
        following.setdefault(edge.source, []).append(edge.target)
    named = []
    for rows in labelled.values():
        for part in _connected(rows) if rows[0].is_exchange else [rows]:
            edge = part[0].edge
            name = f"{edge.source} -> {edge.target}"
            while name in told:
                name += "'"
            named.append(name)
            told[name] = _reading(part, readings)
            sources = dict.fromkeys(one.edge.source for one in part)
            targets = dict.fromkeys(one.edge.target for one in part)
            if part[0].is_exchange:
                sources |= targets
                targets = dict.fromkeys(reader for one in sources for reader in following.get(one, ()))
            around = shapes[edge.source].clusters if len(sources) == 1 else ()
            nodes.append(DrawnNode(id=name, label=edge.label, shape="", style="", color="", clusters=around))
            edges += [DrawnEdge(source=one, target=name, label="", style="") for one in sources]
            edges += [DrawnEdge(source=name, target=one, label="", style="") for one in targets if one not in sources]
    return replace(document, nodes=tuple(nodes), edges=tuple(edges)), told, frozenset(named)


def _labelled(edge: DrawnEdge, readings: Mapping[str, Reading], shapes: Mapping[str, DrawnNode]) -> _Labelled | None:
    if not edge.label or edge.source == edge.target:
        return None
    source, target = readings.get(edge.source), readings.get(edge.target)
    if source is None or target is None or source.kind is not None or target.kind is not None:
        return None
    reading = read_label(edge.label)
    if reading.kind is None:
        return None
    alike = (source.roles, source.phase, _layers(source)) == (target.roles, target.phase, _layers(target))
    alike = alike and (bool(source.roles) or shapes[edge.source].label == shapes[edge.target].label)
    on = source.numbers.get("ranks"), target.numbers.get("ranks")
    is_exchange = alike and None not in on and on[0] != on[1] and reading.kind not in EXCHANGES
    return _Labelled(edge=edge, reading=reading, is_exchange=is_exchange)


def _layers(reading: Reading) -> tuple[int, ...]:
    return reading.numbers.get("layers", ())


def _key(found: _Labelled, readings: Mapping[str, Reading]) -> tuple[object, ...]:
    """Return what edges of one communication have in common; messages are each by themselves."""
    edge = found.edge
    if found.reading.kind in EXCHANGES:
        return (edge.source, edge.target, edge.label)
    source, target = readings[edge.source], readings[edge.target]
    return (
        found.is_exchange, edge.label, source.phase, source.roles or edge.source, _layers(source),
        source.numbers.get("microbatch"), source.numbers.get("decode_step"), target.roles or edge.target,
        _layers(target),
    )  # fmt: skip


def _connected(rows: Iterable[_Labelled]) -> list[list[_Labelled]]:
    """Return the edges that hang together."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    rows = list(rows)
    for row in rows:
        parent[root(row.edge.target)] = root(row.edge.source)
    parts: dict[str, list[_Labelled]] = {}
    for row in rows:
        parts.setdefault(root(row.edge.source), []).append(row)
    return list(parts.values())


def _reading(rows: list[_Labelled], readings: Mapping[str, Reading]) -> Reading:
    """Return what a communication is: its edge's label has the first word, its ends say layer, ranks and pass."""
    first = rows[0]
    source, target = readings[first.edge.source], readings[first.edge.target]
    numbers = {name: told for name, told in first.reading.numbers.items() if name != "experts"}
    both = first.is_exchange or first.reading.kind in EXCHANGES
    ends = {row.edge.source for row in rows} | ({row.edge.target for row in rows} if both else set())
    ranks = sorted({rank for one in ends for rank in readings[one].numbers.get("ranks", ())})
    if ranks:
        numbers.setdefault("ranks", tuple(ranks))
    for name in ("layers", "microbatch", "decode_step"):
        told = source.numbers.get(name) or target.numbers.get(name)
        if told:
            numbers.setdefault(name, told)
    # An edge is both halves of its message, whichever it names.
    kind = "message" if first.reading.kind in EXCHANGES else first.reading.kind
    return replace(
        first.reading, kind=kind, numbers=numbers, phase=first.reading.phase or source.phase or target.phase,
        everywhere=first.reading.everywhere or source.everywhere,
    )  # fmt: skip
