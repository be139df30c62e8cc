"""What a drawing's ranks exchange: collectives, group by group, and messages, drawn as nodes or as dashed edges."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import polars as pl

from truedag.tracer.audit.drawing.document import Document
from truedag.tracer.audit.drawing.grammar import EXCHANGES, Reading
from truedag.tracer.audit.expectation import Expectation
from truedag.tracer.audit.subject import COMMUNICATIONS, read_members, write_members

# Over several axes at once.
_MIXED = ("token counts", "score corrections")
# Beyond them labels that name many passes count for their first.
_MOST_ROWS = 1_000_000
# Beyond them nodes are left out.
_MOST_HELD = 4_000_000
# Purpose, kind, axis, layer, pass and weight.
_Alone = tuple[str | None, str, str | None, int, tuple[str | None, int, int], float]
# By axis, whether it is mixed, and ranks.
_Groups = dict[tuple[str | None, bool, tuple[int, ...]], tuple[str, ...]]


def drawn_communications(
    document: Document,
    readings: Mapping[str, Reading],
    numbers: Mapping[str, int],
    ranks: Mapping[str, tuple[int, ...]],
    out: Mapping[str, Sequence[str]],
    expectation: Expectation | None,
) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """Return `COMMUNICATIONS` of a drawing, and the nodes that claim to stand for more than there can be.

    Args:
        document: the drawing.
        readings: of each node, by its id.
        numbers: of each node.
        ranks: of each node.
        out: ids that edges lead to, by the id that they come from.
        expectation: whose groups the ranks are taken apart into; None: they are left together.
    """
    rows: list[tuple[object, ...]] = []
    alone: dict[_Alone, list[tuple[int, int]]] = {}
    too_much = []
    held = 0
    for node in document.nodes:
        reading = readings[node.id]
        if reading.kind is None or reading.kind == "recv":
            continue
        in_layer = reading.purpose not in ("activations", "activation gradients", "sampled tokens")
        layers = reading.numbers.get("layers", (-1,)) if in_layer else (-1,)
        axis = "pp" if reading.kind in EXCHANGES else reading.axis
        kind = "message" if reading.kind in EXCHANGES else reading.kind
        if reading.kind in EXCHANGES:
            after = [other for other in out.get(node.id, ()) if other in readings]  # an edge may lead nowhere
            ends = [ranks[other] for other in after if readings[other].kind == "recv"]
            groups = list(_pairs(reading, ranks[node.id], ends, expectation))
        else:
            groups = list(_groups(axis, ranks[node.id], None if reading.purpose in _MIXED else expectation))
        wide = len(layers) * max(1, len(groups))
        if held + wide > _MOST_HELD:
            too_much.append(node.id)
            continue
        passes = reading.passes[: max(1, (_MOST_ROWS - held) // wide)]
        held += wide * len(passes)
        if reading.kind not in EXCHANGES and len(ranks[node.id]) == 1 and axis is not None:
            for passed, layer in itertools.product(passes, layers):
                whole: _Alone = (reading.purpose, kind, axis, layer, passed, 1 / reading.num_parts)
                alone.setdefault(whole, []).append((ranks[node.id][0], numbers[node.id]))
            continue
        rows += [
            (numbers[node.id], reading.purpose, kind, axis, layer, *one, members, 1 / reading.num_parts)
            for one in passes
            for layer in layers
            for members in (groups or (None,))
        ]
    groups_of: _Groups = {}
    for whole, places in alone.items():
        rows += _joined(whole, places, expectation, groups_of)
    rows += itertools.islice(_transfers(document, readings, numbers, ranks, expectation), _MOST_ROWS)
    return pl.DataFrame(rows, schema=COMMUNICATIONS, orient="row"), tuple(too_much)


def _joined(
    whole: _Alone, places: Sequence[tuple[int, int]], expectation: Expectation | None, groups_of: _Groups
) -> Iterator[tuple[object, ...]]:
    """Yield the groups that nodes of one rank each are together; each is named by the node of its lowest rank.

    Ranks that all have several such nodes make their group several times.
    """
    purpose, kind, axis, layer, passed, weight = whole
    nodes: dict[int, list[int]] = {}
    for rank, node in places:
        nodes.setdefault(rank, []).append(node)
    key = (axis, purpose in _MIXED, tuple(sorted(nodes)))
    if key not in groups_of:
        groups_of[key] = tuple(_groups(axis, key[2], None if purpose in _MIXED else expectation))
    for members in groups_of[key]:
        there = read_members(members)
        for turn in range(min(len(nodes[rank]) for rank in there)):
            yield (nodes[there[0]][turn], purpose, kind, axis, layer, *passed, members, weight)


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
        if "dashed" not in edge.style or None in ends or any(end is not None and end.kind in EXCHANGES for end in ends):
            continue
        sources, targets = set(ranks[edge.source]), set(ranks[edge.target])
        for group in expectation.groups["pp"]:
            for one, other in itertools.pairwise(group):
                pair, purpose = (one, other), "activations"
                if other in sources and one in targets:
                    pair, purpose = (other, one), "activation gradients"
                if pair[0] in sources - targets and pair[1] in targets - sources:
                    members = f"{pair[0]}>{pair[1]}"
                    for passed in readings[edge.source].passes:
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
