"""A drawing as a subject: what each node stands for, from its label, its id, its clusters and its neighbours."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import polars as pl

from truedag.tracer.audit.drawing.document import Document, DrawnNode
from truedag.tracer.audit.drawing.edge_labels import name_communications
from truedag.tracer.audit.drawing.exchanges import drawn_communications
from truedag.tracer.audit.drawing.grammar import Reading, read_label
from truedag.tracer.audit.drawing.legend import is_legend, ranks_of_colors
from truedag.tracer.audit.drawing.neighbours import EXPERT, settle
from truedag.tracer.audit.expectation import Expectation
from truedag.tracer.audit.roles import UNTOLD_KIND
from truedag.tracer.audit.subject import (
    COVERS,
    EDGES,
    GROUPS,
    NODES,
    PARTS,
    WHERE,
    Subject,
)

# Ids that only count.
_COUNTED = re.compile(r"[A-Za-z]?_?\d+")
_MOST_COVERED = 200_000
# Rows that folds of decode steps may stand for.
_MOST_FOLDED = 2_000_000
_MOST_TOLD = 32_000_000
# Numbers that labels may name in all: beyond them somebody only wants to fill the memory.
_MOST_NUMBERS = 16_000_000
_HALVES = ("send", "recv")
# Shapes of titles, legends and notes.
_REMARKS = ("plaintext", "plain", "none", "note", "underline")
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

    unread: tuple[str, ...] = ()
    """Those of them of which nothing was read, not even their ranks."""

    folds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Nodes of the step that each fold of decode steps is like, on its ranks."""


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
    folds = _alike(readings, ranks)
    covers, too_much = _covers(document, readings, places)
    communications, told_too_much = drawn_communications(document, readings, numbers, ranks, out, expectation)
    covers, folded_too_much = _unfold(covers, folds, readings, places)
    communications, repeated_too_much = _unfold(communications, folds, readings, places)
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
        communications=communications,
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
        overflow=tuple(dict.fromkeys([*endless, *too_much, *told_too_much, *folded_too_much, *repeated_too_much])),
        unread=endless,
        folds=folds,
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
        reading.kind, reading.certainty = UNTOLD_KIND, "inferred"
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
        passes = reading.passes
        wide = max(1, len(reading.roles)) * len(layers) * len(passes)
        size = wide * sum(len(place.experts) for place in told)
        total += wide * sum(len(place.experts) * max(1, len(place.ranks)) for place in told)
        if size > _MOST_COVERED or total > _MOST_TOLD:
            too_much.append(node.id)
            continue
        if reading.is_whole:
            rows += [(told[0].number, None, layer, -1, *one) for layer in layers for one in passes]
        if reading.is_ellipsis:  # what is behind dots is not shown
            continue
        rows += [
            (place.number, role, layer, expert, *one)
            for place in told
            for role in reading.roles
            for layer in layers
            for expert in (place.experts if role in EXPERT else (-1,))
            for one in passes
        ]
    return pl.DataFrame(rows, schema=COVERS, orient="row"), tuple(too_much)


def _alike(readings: Mapping[str, Reading], ranks: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Return for each fold of decode steps the nodes of the step that it is like, on the fold's ranks if it has any."""
    of_step: dict[int, list[str]] = {}
    for name, reading in readings.items():
        if reading.phase == "decode" and reading.fold is None:
            for step in reading.numbers.get("decode_step", ()):
                of_step.setdefault(step, []).append(name)
    folds: dict[str, tuple[str, ...]] = {}
    total = 0
    for name, reading in readings.items():
        if reading.fold is not None:
            there = set(ranks[name])
            nodes = of_step.get(reading.fold.like, []) if total < _MOST_FOLDED else []
            total += len(nodes)
            folds[name] = tuple(other for other in nodes if not there or there.issuperset(ranks[other]))
    return folds


def _unfold(
    rows: pl.DataFrame,
    folds: Mapping[str, Sequence[str]],
    readings: Mapping[str, Reading],
    places: Mapping[str, Sequence[_Place]],
) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """Return rows with a decode step and, for each step that is folded as like theirs, copies of them.

    Folds that would make more copies than can be held are left out, and returned.
    """
    told = [(name, fold) for name in folds if (fold := readings[name].fold) is not None]
    like = pl.DataFrame(
        [
            (turn, place.number, fold.like)
            for turn, (name, fold) in enumerate(told)
            for node in folds[name]
            for place in places[node]
        ],
        schema={"turn": pl.Int64, "node": pl.Int64, "decode_step": pl.Int32}, orient="row",
    )  # fmt: skip
    key = ["node", "decode_step"]
    num = like.join(rows.group_by(key).len("num"), on=key).group_by("turn").agg(pl.col("num").sum())
    steps, left_out, held = [], [], 0
    for turn, number in num.sort("turn").iter_rows():
        name, fold = told[turn]
        if held + number * len(fold.steps) > _MOST_FOLDED:
            left_out.append(name)
            continue
        held += number * len(fold.steps)
        steps += [(turn, step) for step in fold.steps]
    wanted = pl.DataFrame(steps, schema={"turn": pl.Int64, "decode_step": pl.Int32}, orient="row")
    mine = rows.join(like.join(wanted, on="turn", how="semi"), on=key, maintain_order="left").drop("decode_step")
    copies = mine.join(wanted, on="turn", maintain_order="left").select(rows.columns)
    return pl.concat([rows, copies]), tuple(left_out)


def _layers_of(reading: Reading) -> tuple[int, ...]:
    """Layers that a node stands for; embedding, final norm and head are in none, whatever cluster they are drawn in."""
    if set(reading.roles) & {"embedding", "final norm", "head", "loss"}:
        return (-1,)
    return reading.numbers.get("layers", (-1,))


def _nodes(
    document: Document, readings: Mapping[str, Reading], numbers: Mapping[str, int], legend: set[str]
) -> pl.DataFrame:
    rows = []
    for node in document.nodes:
        reading = readings[node.id]
        made = reading.kind if reading.kind in _HALVES else "collective"  # a node for both halves of a message
        kind = reading.end or ("compute" if reading.kind is None else made)
        silent = reading.certainty == "unknown" and not reading.is_ellipsis
        if node.id in legend or (silent and node.shape in _REMARKS):
            kind = "remark"
        phase, batch, step = reading.passes[0]
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


def _first_line(node: DrawnNode) -> str:
    text = " / ".join(line.strip() for line in node.label.splitlines() if line.strip())
    return (text or node.id)[:80]
