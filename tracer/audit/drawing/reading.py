"""A drawing as a subject: what each node stands for, from its label, its id, its clusters and its neighbours."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import polars as pl

from truedag.tracer.audit.drawing.document import Document, DrawnNode
from truedag.tracer.audit.drawing.edge_labels import name_communications
from truedag.tracer.audit.drawing.grammar import Reading, read_label
from truedag.tracer.audit.drawing.legend import is_legend, ranks_of_colors
from truedag.tracer.audit.drawing.neighbours import EXCHANGES, EXPERT, settle
from truedag.tracer.audit.expectation import Expectation
from truedag.tracer.audit.subject import (
    COMMUNICATIONS,
    COVERS,
    EDGES,
    GROUPS,
    NODES,
    PARTS,
    WHERE,
    Subject,
    write_members,
)

# Ids that only count.
_COUNTED = re.compile(r"[A-Za-z]?_?\d+")
_MOST_COVERED = 200_000
_MOST_TOLD = 32_000_000
# Numbers that labels may name in all: beyond them somebody only wants to fill the memory.
_MOST_NUMBERS = 16_000_000
_KINDS = {"send": "send", "recv": "recv", "message": "send"}
# Shapes of titles, legends and notes.
_REMARKS = ("plaintext", "plain", "none", "note", "underline")
# Over several axes at once.
_MIXED = ("token counts", "score corrections")
_PRODUCTS = {
    "QKV projection": "aten::mm", "output projection": "aten::mm", "router": "aten::mm", "head": "aten::mm",
    "attention scores": "aten::bmm", "attention context": "aten::bmm",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnSubject:
    """A drawing that was read."""

    subject: Subject
    document: Document
    readings: Mapping[str, Reading]
    """By the node's id."""

    not_understood: tuple[str, ...]
    certainty: Mapping[str, int]
    """How many nodes were read how surely."""

    by_edges: tuple[str, ...] = ()
    """Communications that only labels of edges name."""

    overflow: tuple[str, ...] = ()
    """Nodes that claim to stand for more than there can be."""

    notes: tuple[str, ...] = ()


def read_drawing(document: Document, expectation: Expectation | None) -> DrawnSubject:
    """Read a drawing; with an expectation, groups are told from what a communication's ranks are."""
    drawn = document
    legend = {node.id for node in document.nodes if is_legend(node)}
    readings, endless = _read_all(document)
    _use_legend(document, readings, legend, expectation)
    document, readings, by_edges = name_communications(document, readings)
    into: dict[str, list[str]] = {}
    out: dict[str, list[str]] = {}
    for edge in document.edges:
        into.setdefault(edge.target, []).append(edge.source)
        out.setdefault(edge.source, []).append(edge.target)
    settle(readings, into, out)
    numbers = {node.id: number for number, node in enumerate(document.nodes)}
    world = expectation.world_size if expectation is not None else None
    ranks = {name: _ranks_of(reading, world) for name, reading in readings.items()}
    places = _places(readings, numbers, ranks)
    covers, too_much = _covers(document, readings, places)
    not_understood = tuple(
        _first_line(node) for node in document.nodes if readings[node.id].certainty == "unknown"
        and not readings[node.id].is_ellipsis and node.id not in legend
    )  # fmt: skip
    subject = Subject(
        name=str(document.path),
        form="drawing",
        nodes=_nodes(document, readings, numbers, legend),
        covers=covers,
        where=_where(readings, places),
        communications=_communications(document, readings, numbers, ranks, out, expectation),
        parts=pl.DataFrame(
            [
                (numbers[name], rank, reading.bytes, None)
                for name, reading in readings.items()
                if reading.bytes is not None and reading.kind is not None
                for rank in ranks[name]
            ],
            schema=PARTS,
            orient="row",
        ),
        edges=_edges(document, readings, numbers),
        groups=pl.DataFrame(schema=GROUPS),
        ranks=pl.DataFrame(schema={"rank": pl.Int32}),
        names={place.number: name for name, told in places.items() for place in told},
        dangling=tuple(
            f"{edge.source} -> {edge.target}"
            for edge in document.edges
            if edge.source not in numbers or edge.target not in numbers
        ),
    )
    return DrawnSubject(
        subject=subject,
        document=drawn,
        readings=readings,
        not_understood=not_understood,
        certainty=Counter(
            str(reading.certainty) for name, reading in readings.items() if name not in legend and name not in by_edges
        ),
        by_edges=tuple(sorted(by_edges)),
        overflow=(*endless, *too_much),
    )


def _use_legend(
    document: Document, readings: dict[str, Reading], legend: set[str], expectation: Expectation | None
) -> None:
    """Forget what a legend's nodes seem to be, give its colours' ranks to the others, and "all layers" its numbers."""
    colors = ranks_of_colors((node for node in document.nodes if node.id in legend), readings)
    num_layers = 0 if expectation is None else len(expectation.stage_of_layer)
    for node in document.nodes:
        reading = readings[node.id]
        if node.id in legend:
            readings[node.id] = Reading()
            continue
        if node.color in colors and not reading.everywhere:
            reading.numbers.setdefault("ranks", colors[node.color])
        if reading.in_every_layer and num_layers:
            reading.numbers["layers"] = tuple(range(num_layers))


def _read_all(document: Document) -> tuple[dict[str, Reading], tuple[str, ...]]:
    """Return the reading of each node, and the nodes whose numbers were too many to be kept."""
    readings: dict[str, Reading] = {}
    endless = []
    total = 0
    for node in document.nodes:
        if total > _MOST_NUMBERS:
            readings[node.id] = Reading()
            endless.append(node.id)
            continue
        reading = _read(node)
        total += sum(map(len, reading.numbers.values()))
        total += sum(len(experts) * len(ranks) for experts, ranks in reading.places)
        readings[node.id] = reading
    return readings, tuple(endless)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a node is; one that lists which experts are where is in several, each with a number of its own."""

    number: int
    experts: tuple[int, ...]
    ranks: tuple[int, ...]


def _places(
    readings: Mapping[str, Reading], numbers: Mapping[str, int], ranks: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[_Place, ...]]:
    free = itertools.count(len(numbers))
    places = {}
    for name, reading in readings.items():
        told = reading.places or ((reading.numbers.get("experts", (-1,)), ranks[name]),)
        places[name] = tuple(
            _Place(number=next(free) if turn else numbers[name], experts=experts, ranks=on)
            for turn, (experts, on) in enumerate(told)
        )
    return places


def _where(readings: Mapping[str, Reading], places: Mapping[str, Sequence[_Place]]) -> pl.DataFrame:
    placed = [
        (place.number, place.ranks)
        for name, told in places.items()
        for place in told
        if place.ranks and (readings[name].roles or readings[name].is_whole or readings[name].kind is not None)
    ]
    sets = {told: number for number, told in enumerate(dict.fromkeys(told for _, told in placed))}
    keys = pl.DataFrame(
        {"node": [node for node, _ in placed], "set": [sets[told] for _, told in placed]},
        schema={"node": pl.Int64, "set": pl.Int64},
    )
    lists = pl.DataFrame(
        {"set": list(sets.values()), "rank": [list(told) for told in sets]},
        schema={"set": pl.Int64, "rank": pl.List(pl.Int32)},
    )
    return keys.join(lists.explode("rank", empty_as_null=False, keep_nulls=False), on="set").select(list(WHERE))


def _read(node: DrawnNode) -> Reading:
    """Read a node by its label; what it leaves untold, by its id and its clusters, the innermost first."""
    reading = read_label(node.label)
    if reading.certainty == "unknown" and node.id != node.label:
        by_id = read_label(node.id.replace("_", " "))
        if by_id.certainty != "unknown":
            told = by_id.numbers | reading.numbers
            reading = replace(
                by_id, certainty="inferred", numbers=told, is_ellipsis=reading.is_ellipsis,
                is_sampled=reading.is_sampled,
            )  # fmt: skip
    around = [] if _COUNTED.fullmatch(node.id) else [_read_once(node.id)]
    around += [_read_once(cluster) for cluster in reversed(node.clusters)]
    for other in around:
        for name, numbers in other.numbers.items():
            # An id may count nodes: only its ranks, layers and experts are taken, and only where words say so.
            reading.numbers.setdefault(name, numbers)
        reading.phase = reading.phase or other.phase
        reading.everywhere = reading.everywhere or (other.everywhere and "ranks" not in reading.numbers)
        # What is in a pipeline stage does not communicate over the pipeline.
        if reading.kind is not None and reading.axis is None and other.axis != "pp":
            reading.axis = other.axis
    if reading.certainty == "unknown" and node.shape in ("ellipse", "oval") and "communic" in node.label.lower():
        reading.kind, reading.certainty = "all-reduce", "inferred"
    return reading


@lru_cache(maxsize=1 << 14)
def _read_once(text: str) -> Reading:
    """Read what many nodes share; nobody changes it."""
    return read_label(text)


def _ranks_of(reading: Reading, world: int | None) -> tuple[int, ...]:
    told = reading.numbers.get("ranks", ())
    if not told and reading.everywhere and world is not None:
        return tuple(range(world))
    limit = None if world is None else 2 * world
    return told if limit is None or len(told) <= limit else told[:limit]


def _covers(
    document: Document, readings: Mapping[str, Reading], places: Mapping[str, Sequence[_Place]]
) -> tuple[pl.DataFrame, tuple[str, ...]]:
    rows: list[tuple[int, str | None, int, int, str | None, int, int]] = []
    too_much = []
    total = 0
    for node in document.nodes:
        reading = readings[node.id]
        layers = _layers_of(reading)
        if not reading.roles and not reading.is_whole:
            continue
        told = places[node.id]
        wide = max(1, len(reading.roles)) * len(layers)
        size = wide * sum(len(place.experts) for place in told)
        total += wide * sum(len(place.experts) * max(1, len(place.ranks)) for place in told)
        if size > _MOST_COVERED or total > _MOST_TOLD:
            too_much.append(node.id)
            continue
        phase, batch, step = _pass_of(reading)
        if reading.is_whole:
            rows += [(told[0].number, None, layer, -1, phase, batch, step) for layer in layers]
        if reading.is_ellipsis:  # what is behind dots is not shown
            continue
        rows += [
            (place.number, role, layer, expert, phase, batch, step)
            for place in told
            for role in reading.roles
            for layer in layers
            for expert in (place.experts if role in EXPERT else (-1,))
        ]
    return pl.DataFrame(rows, schema=COVERS, orient="row"), tuple(too_much)


def _layers_of(reading: Reading) -> tuple[int, ...]:
    """Layers that a node stands for; embedding, final norm and head are in none, whatever cluster they are drawn in."""
    if set(reading.roles) & {"embedding", "final norm", "head", "loss"}:
        return (-1,)
    return reading.numbers.get("layers", (-1,))


def _pass_of(reading: Reading) -> tuple[str | None, int, int]:
    batch = reading.numbers.get("microbatch", (-1,))[0]
    step = reading.numbers.get("decode_step", (-1,))[0]
    return reading.phase, batch, step if reading.phase == "decode" else -1


def _nodes(
    document: Document, readings: Mapping[str, Reading], numbers: Mapping[str, int], legend: set[str]
) -> pl.DataFrame:
    rows = []
    for node in document.nodes:
        reading = readings[node.id]
        kind = reading.end or ("compute" if reading.kind is None else _KINDS.get(reading.kind, "collective"))
        silent = reading.certainty == "unknown" and not reading.is_ellipsis
        if node.id in legend or (silent and node.shape in _REMARKS):
            kind = "remark"
        phase, batch, step = _pass_of(reading)
        rows.append(
            (
                numbers[node.id], kind, _PRODUCTS.get(reading.roles[0], "") if reading.roles else "",
                _first_line(node), reading.roles[0] if reading.roles else None,
                reading.numbers.get("layers", (-1,))[0], reading.numbers.get("experts", (-1,))[0], phase, batch, step,
                reading.numbers.get("stages", (-1,))[0], reading.inputs, reading.outputs,
            )
        )  # fmt: skip
    return pl.DataFrame(rows, schema=NODES, orient="row")


def _edges(document: Document, readings: Mapping[str, Reading], numbers: Mapping[str, int]) -> pl.DataFrame:
    """An edge from a send to a receive is a message; bytes are untold, and written as 1."""
    rows = []
    for edge in document.edges:
        source, target = readings.get(edge.source), readings.get(edge.target)
        if source is None or target is None:
            continue
        is_message = source.kind == "send" and target.kind == "recv"
        rows.append((numbers[edge.source], numbers[edge.target], "p2p" if is_message else "data", 1, edge.label))
    return pl.DataFrame(rows, schema=EDGES, orient="row")


def _communications(
    document: Document,
    readings: Mapping[str, Reading],
    numbers: Mapping[str, int],
    ranks: Mapping[str, tuple[int, ...]],
    out: Mapping[str, Sequence[str]],
    expectation: Expectation | None,
) -> pl.DataFrame:
    rows = []
    alone: dict[tuple[str | None, str, str, int, str | None, int, int, float], list[tuple[int, int]]] = {}
    for node in document.nodes:
        reading = readings[node.id]
        if reading.kind is None or reading.kind == "recv":
            continue
        phase, batch, step = _pass_of(reading)
        in_layer = reading.purpose not in ("activations", "activation gradients", "sampled tokens")
        layers = reading.numbers.get("layers", (-1,)) if in_layer else (-1,)
        axis = "pp" if reading.kind in EXCHANGES else reading.axis
        kind = "message" if reading.kind in EXCHANGES else reading.kind
        if reading.kind in EXCHANGES:
            after = [other for other in out.get(node.id, ()) if other in readings]  # an edge may lead nowhere
            ends = [ranks[other] for other in after if readings[other].kind == "recv"]
            groups = list(_pairs(reading, ranks[node.id], ends, expectation))
        elif len(ranks[node.id]) == 1 and axis is not None:
            for layer in layers:
                key = (reading.purpose, kind, axis, layer, phase, batch, step, 1 / reading.num_parts)
                alone.setdefault(key, []).append((ranks[node.id][0], numbers[node.id]))
            continue
        else:
            groups = list(_groups(axis, ranks[node.id], None if reading.purpose in _MIXED else expectation))
        rows += [
            (numbers[node.id], reading.purpose, kind, axis, layer, phase, batch, step, members, 1 / reading.num_parts)
            for layer in layers
            for members in (groups or (None,))
        ]
    # One node for each participant: together they are the groups of their axis.
    for (purpose, kind, axis, layer, phase, batch, step, weight), places in alone.items():
        there = tuple(sorted({rank for rank, _ in places}))
        rows += [
            (places[0][1], purpose, kind, axis, layer, phase, batch, step, members, weight)
            for members in _groups(axis, there, None if purpose in _MIXED else expectation)
        ]
    rows += _transfers(document, readings, numbers, ranks, expectation)
    return pl.DataFrame(rows, schema=COMMUNICATIONS, orient="row")


def _transfers(
    document: Document,
    readings: Mapping[str, Reading],
    numbers: Mapping[str, int],
    ranks: Mapping[str, tuple[int, ...]],
    expectation: Expectation | None,
) -> Iterator[tuple[int, str, str, str, int, str | None, int, int, str, float]]:
    """Yield the messages of dashed edges from one stage to its neighbour, which need no node of their own."""
    if expectation is None:
        return
    for edge in document.edges:
        ends = readings.get(edge.source), readings.get(edge.target)
        if "dashed" not in edge.style or None in ends or any(end is not None and end.kind in _KINDS for end in ends):
            continue
        sources, targets = set(ranks[edge.source]), set(ranks[edge.target])
        for group in expectation.groups["pp"]:
            for one, other in itertools.pairwise(group):
                pair, purpose = (one, other), "activations"
                if other in sources and one in targets:
                    pair, purpose = (other, one), "activation gradients"
                if pair[0] in sources - targets and pair[1] in targets - sources:
                    passed = _pass_of(readings[edge.source])
                    members = f"{pair[0]}>{pair[1]}"
                    yield (numbers[edge.source], purpose, "message", "pp", -1, *passed, members, 1.0)


def _groups(axis: str | None, ranks: tuple[int, ...], expectation: Expectation | None) -> Iterator[str]:
    """Yield the groups that a communication's ranks are: whole groups of its axis, or as they are."""
    if not ranks:
        return
    there = set(ranks)
    if expectation is not None and axis is not None and axis in expectation.groups:
        whole = [group for group in expectation.groups[axis] if there.issuperset(group)]
        if whole and sum(map(len, whole)) == len(there):
            yield from (write_members(group) for group in whole)
            return
    yield write_members(ranks)


def _pairs(
    reading: Reading, ranks: tuple[int, ...], ends: Sequence[tuple[int, ...]], expectation: Expectation | None
) -> Iterator[str]:
    """Yield the messages of a send, or of a node that stands for both ends."""
    targets = {rank for end in ends for rank in end}
    if expectation is None:
        yield from (f"{source}>{target}" for source, target in zip(ranks, sorted(targets), strict=False))
        return
    if len(ranks) == 1 and len(targets) == 1:
        yield f"{ranks[0]}>{next(iter(targets))}"
        return
    there = set(ranks)
    for group in expectation.groups["pp"]:
        for place in range(len(group) - 1):
            pair = (group[place], group[place + 1])
            if reading.purpose == "activation gradients":
                pair = (pair[1], pair[0])
            if reading.purpose == "sampled tokens":
                pair = (group[-1], group[0])
            if pair[0] in there and pair[1] in (targets or there):
                yield f"{pair[0]}>{pair[1]}"


def _first_line(node: DrawnNode) -> str:
    text = " / ".join(line.strip() for line in node.label.splitlines() if line.strip())
    return (text or node.id)[:80]
