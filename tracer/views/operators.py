"""What stands on a sheet of operators: boxes, the lines between them, and ports to what is on no sheet or another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from truedag.tracer.graph.tensor_types import read_tensors
from truedag.tracer.topology import number_nodes
from truedag.tracer.views.calls import CALL, KEY, Calls, select_sheet
from truedag.tracer.views.depths import add_depths
from truedag.tracer.views.ends import name_ends
from truedag.tracer.views.faults import Fault
from truedag.tracer.views.scope import Scope

_COMMUNICATIONS = ("collective", "send", "recv")
Tensor = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """An operator of the sheet, which stands for the same one in every call.

    Attributes:
        kind: compute, collective, send or recv.
        category: computation, communication or routing.
        op: the dispatcher's name.
        label: what people call it; of a communication with its axis.
        path: the module inside the layer, or inside the expert.
        expert: its number; -1: none.
        inputs: tensors that it was given, in any call.
        outputs: tensors that it gave.
        ranks: GPUs it stands for.
        groups: the process groups it ran in, of those ranks that were read.
        num_groups: how many groups it stands for; 0: no communication.
        num_nodes: nodes of the graph that it stands for.
        num_calls: calls that were read and ran it.
        num_runs: how many times it ran in these calls; more often than once in a call on sheets folded by depth.
        fewest: how many times in the call that ran it the fewest times.
        most: how many times in the call that ran it the most times.
        mean_ns: mean time of a call (a communication's transfer); None: unknown.
        max_ns: the longest.
        wait_ns: mean time that a participant waited for the last one.
        max_wait_ns: the longest.
        is_estimated: the times are estimates.
        num_bytes: bytes that a participant sends, in the mean.
    """

    kind: str
    category: str
    op: str
    label: str
    path: str
    expert: int
    inputs: frozenset[Tensor]
    outputs: frozenset[Tensor]
    ranks: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    num_groups: int
    num_nodes: int
    num_calls: int
    num_runs: int
    fewest: int
    most: int
    mean_ns: float | None
    max_ns: float | None
    wait_ns: float | None
    max_wait_ns: float | None
    is_estimated: bool
    num_bytes: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Edges between two operators, or between a port and one, added up over calls."""

    src: int
    dst: int
    kind: str
    num_edges: int
    num_bytes: int


@dataclass(slots=True)
class Operators:
    """A sheet's content: operators in a topological order, lines between them, and ports by direction and text.

    Attributes:
        operators: the boxes.
        lines: between operators.
        sources: for each text that says where data come from, operators with edges and bytes.
        targets: for each text that says where data go, the same.
        num_calls: calls that were folded together.
        num_unlike: calls that passed not all operators, or others.
        layers: the layers that were folded.
        phase: the phase; None: outside all.
        is_first_alone: only the first call's order could be drawn without a cycle.
        is_by_depth: operators of one name at one depth of a call stand in one box.
        faults: what an audit found, by number.
    """

    operators: list[Operator]
    lines: list[Line]
    sources: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    targets: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    num_calls: int = 0
    num_unlike: int = 0
    layers: tuple[int, ...] = ()
    phase: str | None = None
    is_first_alone: bool = False
    is_by_depth: bool = False
    faults: Mapping[int, list[Fault]] = field(default_factory=dict)

    @property
    def num_nodes(self) -> int:
        """Nodes of the graph that they stand for."""
        return sum(one.num_nodes for one in self.operators)

    @property
    def num_edges(self) -> int:
        """Edges that were read and are drawn as lines."""
        return sum(line.num_edges for line in self.lines)


def fold_operators(
    scope: Scope, calls: Calls, layers: Sequence[int], phase: str | None, *, by_depth: bool = False
) -> Operators | None:
    """Fold the calls of some alike layers (or -1 for what is in none) in a phase; None: there are none.

    Args:
        scope: what is read of the graph.
        calls: of a class.
        layers: the layers.
        phase: the phase; None: outside all.
        by_depth: fold operators of one name at one depth of a call, not only the same one of several calls.
    """
    found = select_sheet(calls, layers, phase)
    if by_depth:
        found = add_depths(found, calls.edges)
    items = found.filter(pl.col("rank").is_in(calls.ranks) | (pl.col("expert") >= 0))
    if items.is_empty():
        return None
    key = [name for name in KEY if name != "turn"] + ["depth"] if by_depth else list(KEY)
    items = items.with_columns(place=pl.struct(key).rank("dense").cast(pl.Int64))
    # The others' operators between the experts that they hold and what is joined are those of the class.
    others = found.join(items.select(*key, "place").unique(), on=key, nulls_equal=True)
    inside, lines = _inner_lines(calls, others)
    order, is_first_alone = _order(items, lines)
    items = items.join(order, on="place").sort("number", "node")
    operators = _describe(scope, calls, items)
    number = dict(order.select("place", "number").iter_rows())
    drawn = [
        Line(src=number[src], dst=number[dst], kind=kind, num_edges=num, num_bytes=size)
        for src, dst, kind, num, size in lines.iter_rows()
        if number[src] < number[dst]
    ]
    sources, targets = name_ends(calls, items, inside)
    num_calls, num_unlike = _count_calls(items, calls.ranks)
    return Operators(
        operators=operators,
        lines=sorted(drawn, key=lambda line: (line.src, line.dst)),
        sources=sources,
        targets=targets,
        num_calls=num_calls,
        num_unlike=num_unlike,
        layers=tuple(layers),
        phase=phase,
        is_first_alone=is_first_alone,
        is_by_depth=by_depth,
        faults=scope.faults.on(items.select("node", "rank", "layer", box="number")),
    )


def _inner_lines(calls: Calls, items: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Add up edges inside a call: all of them with their ends, and place to place."""
    where = ("place", "layer", *CALL)
    ends = [
        items.select(pl.col("node").alias(end), *(pl.col(name).alias(f"{end}_{name}") for name in where)).unique(end)
        for end in ("src", "dst")
    ]
    both = calls.edges.join(ends[0], on="src").join(ends[1], on="dst")
    same = pl.all_horizontal(pl.col(f"src_{name}") == pl.col(f"dst_{name}") for name in where[1:])
    inside = both.filter(same & (pl.col("src_place") != pl.col("dst_place")))
    lines = (
        inside.group_by("src_place", "dst_place", "kind")
        .agg(pl.len().cast(pl.Int64), pl.col("bytes").sum())
        .sort("src_place", "dst_place", "kind")
    )
    return inside.select("src", "dst"), lines


def _order(items: pl.DataFrame, lines: pl.DataFrame) -> tuple[pl.DataFrame, bool]:
    """Number the places topologically, in the order in which they ran where that is one."""
    spot = items.with_columns(at=pl.int_range(pl.len()).over("rank", "layer", *CALL))
    places = spot.group_by("place").agg(pl.col("at").mean(), pl.col("expert").first()).sort("at", "expert", "place")
    ids = {place: i for i, place in enumerate(places["place"])}
    src = np.array([ids[place] for place in lines["src_place"]], dtype=np.int64)
    dst = np.array([ids[place] for place in lines["dst_place"]], dtype=np.int64)
    order, cycle = number_nodes(np.arange(len(ids)), src, dst)
    if cycle:
        order = np.arange(len(ids))
    frame = pl.DataFrame({"place": places["place"], "number": pl.Series(order, dtype=pl.Int64)})
    return frame, bool(cycle)


def _describe(scope: Scope, calls: Calls, items: pl.DataFrame) -> list[Operator]:
    own = calls.ranks
    duration = pl.when(pl.col("timing") != "none").then(pl.col("end_ns") - pl.col("start_ns"))
    talks = items.filter(pl.col("kind").is_in(_COMMUNICATIONS))
    met = scope.whole.subgraph(ranks=list(own)).participants.join(
        talks.select("node", "number").unique().lazy(), on="node"
    )
    wait, transfer = pl.col("start_ns") - pl.col("arrive_ns"), pl.col("end_ns") - pl.col("start_ns")
    times = (
        met.group_by("number")
        .agg(
            wait=wait.mean(),
            max_wait=wait.max(),
            transfer=transfer.mean(),
            max_transfer=transfer.max(),
            sent=pl.col("send_bytes").mean(),
            groups=pl.col("group").unique().sort(),
        )
        .collect()
    )
    talk_times = {row["number"]: row for row in times.to_dicts()}
    groups = {
        row["group"]: tuple(row["ranks"]) for row in scope.whole.groups.select("group", "ranks").collect().to_dicts()
    }
    in_calls = items.group_by("number", "rank", "layer", *CALL).len().group_by("number")
    rows = (
        items.group_by("number")
        .agg(
            *(pl.col(name).first() for name in ("kind", "category", "op", "label", "path", "expert")),
            pl.col("inputs").unique(),
            pl.col("outputs").unique(),
            pl.col("rank").unique().sort(),
            num_nodes=pl.col("node").n_unique(),
            num_rows=pl.len(),
            mean=duration.mean(),
            longest=duration.max(),
            estimated=(pl.col("timing") == "estimated").any(),
            per_rank=pl.len() / pl.col("rank").n_unique(),
        )
        .join(in_calls.agg(num_calls=pl.len(), fewest=pl.col("len").min(), most=pl.col("len").max()), on="number")
        .sort("number")
    )
    described = []
    for row in rows.to_dicts():
        talk = talk_times.get(row["number"])
        found = tuple(groups[one] for one in talk["groups"]) if talk is not None else ()
        ranks = _ranks(scope, calls, row)
        described.append(
            Operator(
                kind=row["kind"],
                category=row["category"],
                op=row["op"],
                label=row["label"],
                path=row["path"],
                expert=row["expert"],
                inputs=_tensors(row["inputs"]),
                outputs=_tensors(row["outputs"]),
                ranks=ranks,
                groups=found,
                num_groups=_num_groups(scope, calls.lead, found),
                num_nodes=_num_nodes(scope, calls.lead, row, ranks, found),
                num_calls=row["num_calls"],
                num_runs=row["num_rows"],
                fewest=row["fewest"],
                most=row["most"],
                mean_ns=row["mean"] if talk is None else talk["transfer"],
                max_ns=row["longest"] if talk is None else talk["max_transfer"],
                wait_ns=None if talk is None else talk["wait"],
                max_wait_ns=None if talk is None else talk["max_wait"],
                is_estimated=row["estimated"],
                num_bytes=None if talk is None else talk["sent"],
            )
        )
    return described


def _ranks(scope: Scope, calls: Calls, row: Mapping[str, object]) -> tuple[int, ...]:
    """Say on which GPUs an operator runs: those of the class; an expert's on all that hold it."""
    read = row["rank"]
    assert isinstance(read, list)
    if not scope.is_folded:
        return tuple(read)
    if row["expert"] == -1:
        return scope.members[calls.lead]
    held = {(scope.coordinate(rank, "pp"), scope.coordinate(rank, "ep")) for rank in read}
    return tuple(sorted(rank for place in held for rank in scope.by_place[place]))


def _num_groups(scope: Scope, lead: int, groups: Sequence[Sequence[int]]) -> int:
    """Count the groups of the class's ranks that are like these."""
    if not scope.is_folded or not groups:
        return len(groups)
    members = set(scope.members[lead])
    return round(sum(len(members) / max(1, len(members.intersection(group))) for group in groups))


def _num_nodes(
    scope: Scope, lead: int, row: Mapping[str, object], ranks: Sequence[int], groups: Sequence[Sequence[int]]
) -> int:
    num, per_rank = row["num_nodes"], row["per_rank"]
    assert isinstance(num, int)
    assert isinstance(per_rank, float)
    if not scope.is_folded:
        return num
    if row["kind"] == "collective":
        return num * _num_groups(scope, lead, groups) // max(1, len(groups))
    return round(per_rank * len(ranks))


def _tensors(texts: Sequence[str | None]) -> frozenset[Tensor]:
    return frozenset(tensor for text in texts if text for tensor in read_tensors(text))


def _count_calls(items: pl.DataFrame, ranks: Sequence[int]) -> tuple[int, int]:
    """Count the calls, and those that passed not the most common set of operators."""
    own = items.filter(pl.col("rank").is_in(ranks) & (pl.col("expert") < 0))
    passed = own.group_by("rank", "layer", *CALL).agg(pl.col("number").sort().hash().sum().alias("passed"))
    if passed.is_empty():
        return 0, 0
    most = passed["passed"].value_counts()["count"].max()
    assert isinstance(most, int)
    return len(passed), len(passed) - most
