"""The true DAG in the manner of somebody's drawing: folded over ranks, microbatches and experts, and saying so.

What is drawn was recorded. The drawing lends its layout (direction, splines, fonts), the shapes and colours it gives to
each role, its word for a GPU, and the ids of nodes that stand for the same part of the same layer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.audit.drawing.marking import quote
from truedag.tracer.audit.drawing.neighbours import EXPERT
from truedag.tracer.audit.drawing.reading import DrawnSubject
from truedag.tracer.audit.drawing.repeated import FOLD, fold_steps
from truedag.tracer.audit.drawing.writing import drawn_nodes
from truedag.tracer.audit.subject import Subject
from truedag.tracer.errors import DrawError
from truedag.tracer.topology import number_nodes

_LAYOUT = ("rankdir", "splines", "ranksep", "nodesep", "bgcolor", "fontname", "fontsize", "newrank", "compound")
# Experts that are drawn one by one, in all layers; a layout engine takes minutes for more.
_MOST_APART = 1000
_KEY = ("what", "layer", "expert", "phase", "decode_step", "stage", "end", "turn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How a drawing draws."""

    layout: Mapping[str, str]
    shapes: Mapping[str, str]
    colors: Mapping[str, str]
    ids: Mapping[tuple[str, int, int], str]
    gpu: str
    clusters: bool
    """Whether stages have a cluster each."""

    experts_apart: bool
    """Whether experts have nodes of their own."""


def draw_repaired(recorded: Subject, drawn: DrawnSubject) -> str:
    """Return what was recorded as DOT in the drawing's manner.

    Raises:
        DrawError: the folded graph has a cycle.
    """
    manner = _manner(drawn)
    folded, edges = _fold(recorded, manner)
    names = _name_nodes(folded, manner)
    lines = [f"digraph {quote('true DAG')} {{"]
    passes = _Passes.of(folded)
    layout = dict(manner.layout)
    if manner.clusters and passes.turn:
        # The first stage gets tokens from the last: one stage below the other would turn messages upwards.
        layout.setdefault("newrank", "true")
    lines += [f"  {key}={quote(value)};" for key, value in layout.items()]
    lines.append('  node [style=filled, fillcolor="#ffffff"];')
    for stage, rows in folded.group_by("stage", maintain_order=True):
        statements = [_statement(row, names[row["fold"]], manner) for row in rows.iter_rows(named=True)]
        if manner.clusters and int(str(stage[0])) >= 0:
            ranks = sorted({rank for told in rows["ranks"] for rank in told})
            title = quote(f"stage {stage[0]} ({manner.gpu} {write_runs(ranks)})")
            lines += [
                f"  subgraph cluster_stage_{stage[0]} {{ label={title};",
                *(f"  {one}" for one in statements),
                "  }",
            ]
        else:
            lines += statements
    gates = set(folded.filter(pl.col("what").is_in(["router", "top-k choice"]))["fold"])
    messages = dict(folded.filter(pl.col("end") == "send").select("fold", "what").iter_rows())
    for source, target in edges:
        told = ["style=dashed"] if source in gates or source in messages else []
        if passes.is_restart(source, target):
            told.append("constraint=false")
        lines.append(f"  {names[source]} -> {names[target]}" + (f" [{', '.join(told)}];" if told else ";"))
    return "\n".join([*lines, "}"]) + "\n"


def _manner(drawn: DrawnSubject) -> Manner:
    shapes: dict[str, Counter[str]] = {}
    colors: dict[str, Counter[str]] = {}
    ids: dict[tuple[str, int, int], list[str]] = {}
    for node in drawn.document.nodes:
        reading = drawn.readings[node.id]
        roles = reading.roles or ((reading.purpose,) if reading.purpose else ())
        for role in roles:
            if node.shape:
                shapes.setdefault(role, Counter())[node.shape] += 1
            if node.color:
                colors.setdefault(role, Counter())[node.color] += 1
        if len(roles) == 1 and len(reading.numbers.get("layers", (-1,))) == 1:
            key = (roles[0], reading.numbers.get("layers", (-1,))[0], reading.numbers.get("experts", (-1,))[0])
            ids.setdefault(key, []).append(node.id)
    text = "\n".join(node.label for node in drawn.document.nodes)
    words = Counter(
        match.group(1) for match in re.finditer(r"\b(GPUs?|gpus?|Ranks?|ranks?|Devices?)\b\s*[:=#_]?\s*\d", text)
    )
    word = words.most_common(1)[0][0].rstrip("s") if words else "rank"
    return Manner(
        layout={key: value for key, value in drawn.document.graph.items() if key in _LAYOUT},
        shapes={role: counts.most_common(1)[0][0] for role, counts in shapes.items()},
        colors={role: counts.most_common(1)[0][0] for role, counts in colors.items()},
        ids={key: names[0] for key, names in ids.items() if len(names) == 1},
        gpu=f"{word}:" if re.search(rf"\b{word}s?\s*:", text) else f"{word}",
        clusters=any(re.search("stage", cluster, re.I) for node in drawn.document.nodes for cluster in node.clusters),
        experts_apart=any(
            len(reading.numbers.get("experts", ())) == 1 and set(reading.roles) & set(EXPERT)
            for reading in drawn.readings.values()
        ),
    )


def _fold(recorded: Subject, manner: Manner) -> tuple[pl.DataFrame, list[tuple[int, int]]]:
    """Fold operators and communications over ranks and microbatches; return the folded nodes and their edges.

    Experts are folded too where the drawing does not tell them apart, or where there are more than anybody lays out.
    """
    nodes, fine_edges = drawn_nodes(recorded)
    met = recorded.communications.select("node", "members", "purpose", comm="kind", axis="axis")
    p2p = recorded.edges.filter(pl.col("kind") == "p2p").select(node="dst", send="src")
    received = p2p.join(met.select(send="node", got="purpose"), on="send").select("node", "got")
    told = nodes.join(met, on="node", how="left").join(received, on="node", how="left")
    told = _place(recorded, told).with_columns(
        what=pl.coalesce("role", "purpose", "got", "label"),
        end=pl.when(pl.col("kind").is_in(["send", "recv", "input", "output"])).then("kind").otherwise(
            pl.coalesce("comm", pl.lit(""))
        ),
        rank=pl.col("ranks").list.first(),
    )  # fmt: skip
    if "pp" in recorded.ranks.columns:
        stages = recorded.ranks.select("rank", at="pp")
        told = told.join(stages, on="rank", how="left").with_columns(stage=pl.col("at").fill_null(-1))
    told = told.with_columns(pl.col("decode_step").fill_null(-1), pl.col("phase").fill_null(""))
    # The head gathers what it reads, and then what it gives.
    place = ("end", "phase", "microbatch", "decode_step", "members")
    turn = pl.when(pl.col("purpose") == "head").then(pl.col("node").rank("dense").over(place)).otherwise(1)
    told = told.with_columns(turn=turn)
    one = pl.col("expert")
    num_apart = told.filter(one >= 0).select(name for name in _KEY if name != "decode_step").n_unique()
    if not manner.experts_apart or num_apart > _MOST_APART:
        one = pl.lit(-1, pl.Int32)
    told = told.with_columns(held=pl.col("expert"), expert=one)
    told = told.with_columns(fold=pl.struct(_KEY).rank("dense").cast(pl.Int64))
    folded = told.group_by("fold", maintain_order=True).agg(
        *(pl.col(name).first() for name in _KEY),
        pl.col("kind").first(),
        pl.col("axis").first(),
        ranks=pl.col("ranks").explode(empty_as_null=False, keep_nulls=False).unique().sort(),
        num_nodes=pl.col("num").sum(),
    )
    folded = folded.join(_held(told.filter((pl.col("held") >= 0) & (pl.col("expert") < 0))), on="fold", how="left")
    folded, edges = fold_steps(folded, _fold_edges(told, fine_edges), manner.gpu)
    ends = np.array(edges, dtype=np.int64).reshape(-1, 2)
    size = int(folded["fold"].max() or 0) + 1  # type: ignore[arg-type]
    order, cycle = number_nodes(np.arange(size), ends[:, 0], ends[:, 1])
    if cycle:
        labels = dict(folded.select("fold", "what").iter_rows())
        raise DrawError(
            f"what was recorded cannot be folded into a DAG: {' -> '.join(labels[one] for one in cycle[:8])}"
        )
    places = pl.DataFrame({"fold": np.arange(size), "order": order})
    folded = folded.join(places, on="fold").sort("stage", "order")
    return folded, _without_far(edges, folded.sort("order", descending=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passes:
    """In which pass of a generation a node is."""

    turn: Mapping[int, int]
    """Of nodes of the prefill and of decode steps: the how manieth pass it is of those that are drawn."""

    folds: frozenset[int]
    """Nodes that stand for whole steps."""

    outside: frozenset[int]
    """Nodes that are in no layer."""

    @classmethod
    def of(cls, folded: pl.DataFrame) -> _Passes:
        """Return the passes of folded nodes."""
        rows = folded.filter(pl.col("phase").is_in(["prefill", "decode"]))
        steps = sorted(set(rows["decode_step"]))
        return cls(
            turn={fold: steps.index(step) for fold, step in rows.select("fold", "decode_step").iter_rows()},
            folds=frozenset(folded.filter(pl.col("end") == FOLD)["fold"]),
            outside=frozenset(folded.filter(pl.col("layer") < 0)["fold"]),
        )

    def is_near(self, source: int, target: int) -> bool:
        """Return whether an edge is inside a pass, or leads from one that is drawn in full to the next."""
        if source in self.folds or target in self.folds:
            return False
        return self.turn.get(target, 0) - self.turn.get(source, 0) <= 1

    def is_restart(self, source: int, target: int) -> bool:
        """Return whether an edge leads from the end of a pass to the beginning of the next, which stands beside it."""
        ends = {source, target}
        if not self.turn.keys() >= ends or ends & self.folds:
            return False
        return self.turn[source] != self.turn[target] and ends <= self.outside


def _without_far(edges: list[tuple[int, int]], folded: pl.DataFrame) -> list[tuple[int, int]]:
    """Leave out far edges where a path leads along; `folded` is in the order of the last first.

    What runs along residuals in the backward pass is no node of its own, so every layer would have edges to every other
    of its stage; every operator has one to its own backward pass, across the whole picture; and what reads the cache
    has one from each pass before it.
    """
    readers: dict[int, list[int]] = {}
    for source, target in edges:
        readers.setdefault(source, []).append(target)
    behind: dict[int, int] = {}  # as bits
    beyond: dict[int, int] = {}
    for node in folded["fold"].to_list():
        further = 0
        for reader in readers.get(node, ()):
            further |= behind[reader]
        beyond[node] = further
        behind[node] = further | sum(1 << reader for reader in readers.get(node, ()))
    layer: dict[int, int] = dict(folded.select("fold", "layer").iter_rows())
    is_backward = dict(folded.select("fold", pl.col("phase") == "backward").iter_rows())
    passes = _Passes.of(folded)

    def is_near(source: int, target: int) -> bool:
        if is_backward[source] != is_backward[target] or not passes.is_near(source, target):
            return False
        inside = min(layer[source], layer[target]) >= 0
        return not is_backward[source] or (inside and abs(layer[source] - layer[target]) <= 1)

    return [edge for edge in edges if is_near(*edge) or not beyond[edge[0]] >> edge[1] & 1]


def _held(told: pl.DataFrame) -> pl.DataFrame:
    """Return fold, places: of experts that were folded, the lines that say which are where."""
    ranks = pl.col("ranks").explode(empty_as_null=False, keep_nulls=False).unique().sort()
    of_each = told.group_by("fold", "held").agg(ranks=ranks).sort("fold", "held")
    together = of_each.group_by("fold", "ranks", maintain_order=True).agg(experts="held")
    return together.group_by("fold", maintain_order=True).agg(places=pl.struct("experts", "ranks"))


def _place(recorded: Subject, told: pl.DataFrame) -> pl.DataFrame:
    """Add ranks, num, rank_class and moved to nodes.

    A class graph's row about an expert becomes one row for each number that the expert has on ranks of the class,
    which is `moved` higher than the row's own. Else `moved` is null.
    """
    if recorded.copies is None:
        where = recorded.where.group_by("node").agg(ranks=pl.col("rank").unique().sort())
        nothing = pl.lit(None, pl.Int32)
        return told.join(where, on="node", how="left").with_columns(
            num=pl.lit(1, pl.Int64), rank_class=nothing, moved=nothing
        )
    of_expert = pl.when(pl.col("expert") >= 0).then("moved")
    placed = recorded.copies.spread(told.select("node", "expert")).join(recorded.copies.moved, on="rank")
    where = placed.group_by("node", moved=of_expert).agg(ranks=pl.col("rank").unique().sort())
    rows = told.join(where, on="node", how="left").join(recorded.copies.nodes.drop("team"), on="node")
    is_moved = pl.col("moved").is_not_null()
    return rows.sort("node", "moved").with_columns(
        expert=pl.when(is_moved).then(pl.col("expert") + pl.col("moved")).otherwise("expert"),
        num=pl.when(is_moved).then(pl.col("ranks").list.len().cast(pl.Int64)).otherwise("num"),
    )


def _fold_edges(told: pl.DataFrame, fine_edges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the edges between folded nodes: on a rank an expert leads to what has the same number there."""
    folds: dict[int, dict[int | None, int]] = {}
    class_of: dict[int, int | None] = {}
    for node, moved, fold, rank_class in told.select("node", "moved", "fold", "rank_class").iter_rows():
        folds.setdefault(node, {})[moved] = fold
        class_of[node] = rank_class
    edges: set[tuple[int, int]] = set()
    for source, target in fine_edges:
        starts, ends = folds[source], folds[target]
        on_rank = class_of[source] == class_of[target] and None not in starts and None not in ends
        if on_rank:
            edges.update((starts[moved], ends[moved]) for moved in starts)
        else:
            edges.update((start, end) for start in starts.values() for end in ends.values())
    return sorted(edge for edge in edges if edge[0] != edge[1])


def _name_nodes(folded: pl.DataFrame, manner: Manner) -> dict[int, str]:
    names: dict[int, str] = {}
    taken: set[str] = set()
    for row in folded.iter_rows(named=True):
        old = manner.ids.get((row["what"], row["layer"], row["expert"]))
        if old is None or old in taken or row["phase"] == "backward":
            parts = [row["what"], row["end"], row["phase"]]
            parts += [f"{name[0]}{row[name]}" for name in ("layer", "expert", "decode_step") if row[name] >= 0]
            if row["end"] in ("send", "recv"):
                parts.append(f"s{row['stage']}")
            old = re.sub(r"\W+", "_", "_".join(part for part in parts if part))
            while old in taken:
                old += "_"
        taken.add(old)
        names[row["fold"]] = quote(old)
    return names


def _places(row: Mapping[str, Any], manner: Manner) -> Iterator[str]:
    places = row["places"] or ()
    for place in places:
        several = "s" if len(place["experts"]) > 1 else ""
        yield f"expert{several} {_write(place['experts'])}" + (
            f": {manner.gpu} {_write(place['ranks'])}" if len(places) > 1 else ""
        )
    if len(places) < 2:
        yield f"{manner.gpu} {_write(row['ranks'])}"


def _write(numbers: Iterable[int]) -> str:
    """Write numbers as runs with words between them, as commas end a place in some dialects: 0-1 and 4."""
    return write_runs(numbers, pair="-").replace(",", " and ")


def _statement(row: Mapping[str, Any], name: str, manner: Manner) -> str:
    what = str(row["what"])
    if row["lines"] is not None:
        return f'  {name} [label={quote(chr(10).join(row["lines"]))}, shape="box3d"];'
    if row["end"] == "send":
        lines, shape = [f"send {what}"], "ellipse"
    elif row["end"] == "recv":
        lines, shape = [f"receive {what}"], "ellipse"
    elif row["end"] in ("input", "output"):
        lines, shape = [f"{str(row['end']).capitalize()}: {what.replace('_', ' ')}"], "box"
    elif row["end"]:
        lines, shape = [f"{what}: {row['end']} over {row['axis']}"], "ellipse"
    else:
        lines = [what]
        shape = "parallelogram" if what in ("router", "top-k choice", "expert aggregation") else "box"
    lines += [f"{key} {row[key]}" for key in ("layer", "expert") if int(str(row[key])) >= 0]
    lines += _places(row, manner)
    step = int(str(row["decode_step"]))
    if row["phase"]:
        lines.append(f"decode step {step}" if step >= 0 else str(row["phase"]))
    lines.append(f"stands for {row['num_nodes']:,} recorded")
    told = {"label": "\n".join(lines), "shape": manner.shapes.get(what, shape)}
    if what in manner.colors:
        told["fillcolor"] = manner.colors[what]
    return f"  {name} [{', '.join(f'{key}={quote(value)}' for key, value in told.items())}];"
