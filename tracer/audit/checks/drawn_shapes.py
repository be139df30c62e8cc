"""Checks of the shapes that a drawing states in its own way: from node to node, and against the model's widths."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import polars as pl

from truedag.tracer.audit.catalogue import CHECKS
from truedag.tracer.audit.expectation import Expectation
from truedag.tracer.audit.findings import Audit, Finding, write_count
from truedag.tracer.audit.plan import Plan
from truedag.tracer.audit.subject import Subject

Shape = tuple[int, ...]
_GROUP = re.compile(r"[\[(]([^\[\]()]*)[\])]")
_BARE = re.compile(r"^\s*(\d+(?:\s*[x\u00d7*]\s*\d+)+)\s*$", re.I)
_DIMENSION = re.compile(r"^(?:[A-Za-z_][\w\s]*[=:]\s*)?(\d{1,12})$")
# After these, tokens are chosen, sent away or gathered: how many there are is not their producer's.
_ROUTED = frozenset(
    {"router", "top-k choice", "expert first layer", "expert activation", "expert second layer", "expert aggregation"}
)
_SPLITTING = frozenset({"batch", "QKV projection"})
_HIDDEN = frozenset(
    {
        "attention norm", "feed-forward norm", "final norm", "attention residual", "feed-forward residual",
        "output projection", "second layer", "expert second layer", "shared expert second layer", "expert aggregation",
        "embedding",
    }
)  # fmt: skip
_SHOWN = 3


def check_drawn_shapes(subject: Subject, plan: Plan | None, audit: Audit) -> None:
    """Check what a drawing says of shapes in free words; what states them as types is checked elsewhere."""
    told = _Told(subject)
    if not told.gives and not told.takes:
        for check in ("dimension.edge", "dimension.shard"):
            audit.skip(check, "no node states its shapes in numbers")
        return
    if told.edges:
        audit.judge("dimension.edge", _edges(subject, told), write_count(len(told.edges), "edge") + " with both shapes")
    else:
        audit.skip("dimension.edge", "no edge has a stated shape at both ends")
    if plan is None:
        return
    widths = [*_stated_widths(subject, plan.expectation, told)]
    if widths:
        audit.judge("dimension.shard", _widths(subject, widths), write_count(len(widths), "stated width"))
    else:
        audit.skip("dimension.shard", "no shape is stated whose width follows from the model")


def read_shapes(text: str) -> tuple[Shape, ...]:
    """Return the shapes in a text such as ``[batch=32, seq=1024]`` or ``32x1024``; none: not all in numbers."""
    if (bare := _BARE.match(text)) is not None:
        return (tuple(int(size) for size in re.findall(r"\d+", bare.group(1))),)
    shapes = []
    for group in _GROUP.findall(text):
        sizes = [_DIMENSION.match(part.strip()) for part in re.split(r"[,;x\u00d7*](?![A-Za-z])", group)]
        if any(size is None for size in sizes):
            return ()
        shapes.append(tuple(int(size.group(1)) for size in sizes if size is not None))
    return tuple(shapes)


class _Told:
    """What each node says that it takes and gives."""

    def __init__(self, subject: Subject) -> None:
        self.takes: dict[int, tuple[Shape, ...]] = {}
        self.gives: dict[int, tuple[Shape, ...]] = {}
        self.roles: dict[int, str | None] = {}
        self.kinds: dict[int, str] = {}
        for node, kind, role, inputs, outputs in subject.nodes.select(
            "node", "kind", "role", "inputs", "outputs"
        ).iter_rows():
            self.roles[node], self.kinds[node] = role, kind
            takes, gives = read_shapes(inputs or ""), read_shapes(outputs or "")
            if kind == "input":
                gives = gives or takes
            if takes:
                self.takes[node] = takes
            if gives:
                self.gives[node] = gives
        self.exchanging = set(subject.communications.filter(pl.col("kind") == "all-to-all")["node"])
        # Between nodes where no tokens are chosen or sent away, which changes how many there are.
        self.edges = [
            (source, target)
            for source, target in subject.edges.select("src", "dst").iter_rows()
            if source in self.gives and target in self.takes
            if not self._is_routed(source) and not self._is_routed(target)
        ]

    def _is_routed(self, node: int) -> bool:
        return self.roles.get(node) in _ROUTED or node in self.exchanging


def _edges(subject: Subject, told: _Told) -> Iterator[Finding]:
    """Edges whose reader says that it takes something else than what their producer says that it gives."""
    brought: dict[int, int] = {}
    for source, target in told.edges:
        brought[target] = brought.get(target, 0) + sum(map(math.prod, told.gives[source]))
    wrong = []
    for source, target in told.edges:
        gives, takes = told.gives[source], told.takes[target]
        given, taken = {math.prod(shape) for shape in gives}, {math.prod(shape) for shape in takes}
        splits = told.roles[source] in _SPLITTING and any(one and all_ % one == 0 for all_ in given for one in taken)
        merges = brought[target] in taken
        if not (given & taken or splits or merges):
            wrong.append((source, target))
    if wrong:
        nodes = pl.Series(list(dict.fromkeys(node for edge in wrong for node in edge)), dtype=pl.Int64)
        source, target = wrong[0]
        (one,), (other,) = subject.name_nodes([source]), subject.name_nodes([target])
        expected, found = _write(told.gives[source]), _write(told.takes[target])
        yield _finding(
            "dimension.edge",
            f"{write_count(len(wrong), 'edge')} lead{'s' if len(wrong) == 1 else ''} to a node that takes another "
            f"shape than its producer gives: {one} gives {expected}, {other} takes {found}",
            expected,
            found,
            subject,
            nodes,
        )


def _stated_widths(
    subject: Subject, expectation: Expectation, told: _Told
) -> Iterator[tuple[int, str, int, tuple[int, ...]]]:
    """Yield node, role, the width of its output, and the widths that it may have."""
    ranks = dict(subject.where.group_by("node").agg(pl.col("rank").unique()).iter_rows())
    for node, shapes in told.gives.items():
        role = told.roles[node]
        if told.kinds[node] != "compute" or role is None or len(shapes) != 1 or not shapes[0]:
            continue
        allowed = _allowed(role, expectation, ranks.get(node, ()))
        if allowed:
            yield node, role, shapes[0][-1], allowed


def _widths(subject: Subject, widths: Sequence[tuple[int, str, int, tuple[int, ...]]]) -> Iterator[Finding]:
    """Outputs whose width is neither the model's nor the shard's of the axis that splits it."""
    wrong: dict[tuple[str, int, tuple[int, ...]], list[int]] = {}
    for node, role, width, allowed in widths:
        if width not in allowed:
            wrong.setdefault((role, width, allowed), []).append(node)
    for (role, width, allowed), nodes in wrong.items():
        yield _finding(
            "dimension.shard",
            f"{write_count(len(nodes), role)} {'gives' if len(nodes) == 1 else 'give'} a width of {width:,}, where the "
            f"model and the strategy make {' or '.join(f'{one:,}' for one in allowed)}",
            " or ".join(f"{one:,}" for one in allowed),
            f"{width:,}",
            subject,
            pl.Series(nodes, dtype=pl.Int64),
        )


def _allowed(role: str, expectation: Expectation, ranks: Sequence[int]) -> tuple[int, ...]:
    """Return the widths that a role's output may have on some ranks; none: any."""
    numbers = expectation.numbers
    if role in _HIDDEN:
        return (int(numbers["hidden"]),)
    if role == "router" and "experts" in numbers:
        return tuple(dict.fromkeys((int(numbers["experts"]), int(numbers["top_k"]))))
    axis, name = ("etp", "expert_hidden") if role.startswith("expert ") else ("tp", "ffn")
    if role == "head":
        wholes: tuple[int, ...] = (int(numbers["vocabulary"]),)
    elif role.removeprefix("expert ") == "first layer" and name in numbers:
        wholes = (int(numbers[name]), 2 * int(numbers[name]))  # a gated one makes both of its halves at once
    elif role.removeprefix("expert ") == "activation" and name in numbers:
        wholes = (int(numbers[name]),)
    else:
        return ()
    size = expectation.sizes[axis]
    shards = tuple(whole // size for whole in wholes)
    # Drawn once for all ranks of its group, or for none, it may state the whole.
    return tuple(dict.fromkeys((*shards, *(wholes if _is_whole(expectation, axis, ranks) else ()))))


def _is_whole(expectation: Expectation, axis: str, ranks: Sequence[int]) -> bool:
    coordinates: Sequence[Mapping[str, int]] = expectation.coordinates
    places = {coordinates[rank][axis] for rank in ranks if rank < len(coordinates)}
    return not places or len(places) == expectation.sizes[axis]


def _write(shapes: Sequence[Shape]) -> str:
    told = [f"[{', '.join(map(str, shape))}]" for shape in shapes[:_SHOWN]]
    return " and ".join(told) + (" and more" if len(shapes) > _SHOWN else "")


def _finding(check: str, title: str, expected: str, found: str, subject: Subject, nodes: pl.Series) -> Finding:
    told = subject.nodes.filter(pl.col("node").is_in(nodes.implode()))
    return Finding(
        check=check, title=title, expected=expected, found=found, fix=CHECKS[check].fix,
        severity=CHECKS[check].severity, nodes=subject.name_nodes(nodes), num_nodes=len(nodes),
        ranks=tuple(subject.where.filter(pl.col("node").is_in(nodes.implode()))["rank"].unique().sort()),
        layers=tuple(sorted(layer for layer in told["layer"].unique() if layer >= 0)),
    )  # fmt: skip
