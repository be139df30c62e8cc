"""Whether the parts of a drawing follow each other as they do in a transformer: what reads what.

Each role and communication of a layer has a place in the order below. In the part of the drawing that is one layer in
one pass forward, nothing may be reached from what comes later; what has the same place may stand in either order. Over
layers, an edge leads to the same layer or to the next one. Edges from one microbatch or decode step to another say when
something runs, not what reads what. Gradients are reduced after a node of the backward pass.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.findings import Audit, Finding, write_count
from truedag.tracer.audit.roles import FUSED_ATTENTION
from truedag.tracer.audit.subject import Subject

_ORDER: tuple[tuple[str, ...], ...] = (
    ("attention norm",),
    ("attention input",),
    ("QKV projection", "Q projection", "K projection", "V projection"),
    ("attention scores",),
    ("attention softmax",),
    ("attention context", FUSED_ATTENTION),
    ("output projection",),
    ("attention output",),
    ("attention residual",),
    ("feed-forward norm",),
    ("feed-forward input", "router", "top-k choice"),
    ("dispatch", "expert input"),
    ("first layer", "expert first layer"),
    ("activation", "expert activation"),
    ("second layer", "expert second layer"),
    # Weighing the outputs and summing them over ranks may change places.
    ("feed-forward output", "expert output", "combine", "expert aggregation"),
    ("feed-forward residual",),
)
_PLACE = {name: place for place, names in enumerate(_ORDER) for name in names}
_BACKWARD = ("backward", "optimizer")
_GRADIENTS = ("dense gradients", "expert gradients")
_MOST_EDGES = 200_000
_SHOWN = 3


@dataclass(slots=True)
class _Part:
    """A node that has a place."""

    names: list[str] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)
    phase: str | None = None
    passes: set[tuple[int, int]] = field(default_factory=set)
    """Microbatch and decode step, -1 where untold."""

    def shares_pass(self, other: _Part) -> bool:
        """Return whether both may be in one pass; what is untold may be any."""
        if self.phase != other.phase:
            return False
        if not self.passes.isdisjoint(other.passes):
            return True
        sides = (self.passes, other.passes)
        batches, steps = ([{one[place] for one in side} for side in sides] for place in (0, 1))
        return all(-1 in mine | others or mine & others for mine, others in (batches, steps))

    @property
    def first(self) -> int:
        return min(_PLACE[name] for name in self.names)

    @property
    def last(self) -> int:
        return max(_PLACE[name] for name in self.names)


def check_order(subject: Subject, audit: Audit) -> None:
    """Check what reads what in a drawing."""
    parts = _parts(subject)
    edges = [(source, target) for source, target in subject.edges.select("src", "dst").iter_rows()]
    if not parts or not edges:
        audit.skip("model.order", "no two parts of a layer are joined by an edge")
        return
    if len(edges) > _MOST_EDGES:
        audit.skip("model.order", f"more than {_MOST_EDGES:,} edges")
        return
    inner = [(a, b) for a, b in edges if a in parts and b in parts and parts[a].shares_pass(parts[b])]
    findings = [
        *_turned(subject, parts, inner), *_skipping(subject, parts, inner), *_cut(subject, parts, edges),
        *_too_early(subject, edges),
    ]  # fmt: skip
    audit.judge("model.order", findings, write_count(len(parts), "part"))


def _parts(subject: Subject) -> dict[int, _Part]:
    parts: dict[int, _Part] = {}
    rows: Iterable[tuple[int, str, int, str | None]] = [
        *subject.covers.select("node", "role", "layer", "phase").unique().iter_rows(),
        *subject.communications.select("node", "purpose", "layer", "phase").unique().iter_rows(),
    ]
    for node, name, layer, phase in rows:
        if name in _PLACE and layer >= 0 and phase not in _BACKWARD:
            part = parts.setdefault(node, _Part(phase=phase))
            part.layers.add(layer)
            if name not in part.names:
                part.names.append(name)
    for told in (subject.covers, subject.communications):
        ahead = told.filter(~pl.col("phase").fill_null("").is_in(_BACKWARD))
        for node, batch, step in ahead.select("node", "microbatch", "decode_step").unique().iter_rows():
            if node in parts:
                parts[node].passes.add((batch, step))
    return parts


def _turned(subject: Subject, parts: Mapping[int, _Part], edges: Sequence[tuple[int, int]]) -> Iterator[Finding]:
    """Yield what is reached from a later part of the same layers."""
    following: dict[int, list[int]] = {}
    missing: dict[int, int] = dict.fromkeys(parts, 0)
    for source, target in edges:
        if parts[source].layers & parts[target].layers:
            following.setdefault(source, []).append(target)
            missing[target] += 1
    # The latest part that leads to a node, and its own place: in topological order; a cycle is told elsewhere.
    latest: dict[int, int] = {}
    ready = deque(node for node, number in missing.items() if number == 0)
    wrong: dict[str, dict[str, list[tuple[int, int]]]] = {}
    while ready:
        node = ready.popleft()
        before = latest.get(node)
        if before is not None and parts[before].first > parts[node].last:
            told = wrong.setdefault(parts[before].names[0], {})
            told.setdefault(parts[node].names[0], []).append((before, node))
        own = node if before is None or parts[node].last >= parts[before].first else before
        for other in following.get(node, ()):
            held = latest.get(other)
            if held is None or parts[own].first > parts[held].first:
                latest[other] = own
            missing[other] -= 1
            if missing[other] == 0:
                ready.append(other)
    for late, readers in wrong.items():
        pairs = [pair for found in readers.values() for pair in found]
        layers = sorted({layer for _, node in pairs for layer in parts[node].layers})
        early = " and ".join(readers) if len(readers) < _SHOWN else f"{', '.join([*readers][:-1])} and {[*readers][-1]}"
        yield _finding(
            subject, f"{late[:1].upper()}{late[1:]} comes before {early} in {write_count(len(layers), 'layer')}: "
            f"{write_runs(layers)}", f"{early} before {late}", f"{late} first",
            [node for pair in pairs for node in pair], layers,
            f"Turn round what reads what: {late} reads what {early} made.",
        )  # fmt: skip


def _skipping(subject: Subject, parts: Mapping[int, _Part], edges: Sequence[tuple[int, int]]) -> Iterator[Finding]:
    """Yield edges that lead neither to the same layer nor to the next; of layers that are missing, they follow."""
    wrong = [
        (source, target)
        for source, target in edges
        if not any(layer in parts[target].layers or layer + 1 in parts[target].layers for layer in parts[source].layers)
    ]
    if not wrong:
        return
    shown = [
        f"layer {write_runs(sorted(parts[target].layers))} reads {parts[source].names[0]} of layer "
        f"{write_runs(sorted(parts[source].layers))}"
        for source, target in wrong[:_SHOWN]
    ]
    yield _finding(
        subject, f"{write_count(len(wrong), 'edge')} between layers that do not follow each other: {'; '.join(shown)}",
        "each layer reads the one before it", shown[0], [node for edge in wrong for node in edge],
        _left_out(parts, wrong) or sorted({layer for _, target in wrong for layer in parts[target].layers}),
        "Lead the edge from the layer before, or number the layers in their order.",
    )  # fmt: skip


def _left_out(parts: Mapping[int, _Part], edges: Sequence[tuple[int, int]]) -> list[int]:
    """Return the layers that edges lead past where no part of them is drawn; none if any edge is wrong otherwise."""
    drawn = {layer for part in parts.values() for layer in part.layers}
    between = {range(max(parts[source].layers) + 1, min(parts[target].layers)) for source, target in edges}
    if (
        all(between)
        and sum(map(len, between)) <= _MOST_EDGES
        and drawn.isdisjoint(layers := set(itertools.chain(*between)))
    ):
        return sorted(layers)
    return []


def _cut(subject: Subject, parts: Mapping[int, _Part], edges: Sequence[tuple[int, int]]) -> Iterator[Finding]:
    """Yield parts that read nothing, or that nobody reads, where most others of their kind have both.

    The first part of a layer and the last may be the ends of what is drawn, and so may those that are drawn first of
    the first layer and last of the last; what has no edge at all is an orphan.
    """
    read, made = {target for _, target in edges}, {source for source, _ in edges}
    ends = {0, len(_ORDER) - 1}
    first = min((min(part.layers), part.first) for part in parts.values())
    last = max((max(part.layers), part.last) for part in parts.values())
    outer = (
        {node for node, part in parts.items() if (min(part.layers), part.first) == first},
        {node for node, part in parts.items() if (max(part.layers), part.last) == last},
    )
    for way, there in ((0, read), (1, made)):
        kinds: dict[str, list[int]] = {}
        for node, part in parts.items():
            if part.first not in ends and part.last not in ends and (node in read or node in made):
                kinds.setdefault(part.names[0], []).append(node)
        lost = {
            name: [node for node in nodes if node not in there and node not in outer[way]]
            for name, nodes in kinds.items()
            if 2 * sum(node in there for node in nodes) > len(nodes)
        }
        nodes = [node for found in lost.values() for node in found]
        if not nodes:
            continue
        layers = sorted({layer for node in nodes for layer in parts[node].layers})
        what = ", ".join(name for name, found in lost.items() if found)
        title = ("reads nothing", "is read by nobody") if len(nodes) == 1 else ("read nothing", "are read by nobody")
        yield _finding(
            subject, f"{write_count(len(nodes), 'part')} that {title[way]}: {what} in layers {write_runs(layers)}",
            "an edge from what it reads" if way == 0 else "an edge to what reads it", f"{len(nodes)} without", nodes,
            layers, f"Draw the edge {'into' if way == 0 else 'out of'} {what} in layers {write_runs(layers)}.",
        )  # fmt: skip


def _too_early(subject: Subject, edges: Sequence[tuple[int, int]]) -> Iterator[Finding]:
    """Yield gradient reductions that no part of the backward pass leads to, where one is drawn."""
    reductions = set(subject.communications.filter(pl.col("purpose").is_in(_GRADIENTS))["node"])
    starts = set(subject.nodes.filter(pl.col("phase") == "backward")["node"]) - reductions
    if not reductions or not starts:
        return
    following: dict[int, list[int]] = {}
    read = set()
    for source, target in edges:
        following.setdefault(source, []).append(target)
        read.add(target)
    reached, frontier = set(starts), list(starts)
    while frontier:
        fresh = [one for one in following.get(frontier.pop(), ()) if one not in reached]
        reached.update(fresh)
        frontier += fresh
    early = sorted((reductions & read) - reached)
    if early:
        yield _finding(
            subject, f"{write_count(len(early), 'gradient reduction')} that no part of the backward pass leads to",
            "gradients are summed after the backward pass made them", f"{len(early)} before it", early, [],
            "Lead an edge from the backward pass to the reduction of its gradients.",
        )  # fmt: skip


def _finding(
    subject: Subject, title: str, expected: str, found: str, nodes: Sequence[int], layers: Sequence[int], fix: str
) -> Finding:
    shown = pl.Series(list(dict.fromkeys(nodes)), dtype=pl.Int64)
    return Finding(
        check="model.order", title=title, expected=expected, found=found, fix=fix,
        severity=CHECKS["model.order"].severity, nodes=subject.name_nodes(shown), num_nodes=len(shown),
        layers=tuple(layers),
    )  # fmt: skip
