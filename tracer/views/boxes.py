"""The drawing's nodes: where each folded node belongs on the page, and what is written on it.

The page has a section per pipeline stage. In it, each phase that runs once per microbatch is a panel of columns, one
per layer, with what runs before and after the layers at its sides; what runs once per step is a panel of its own below.
Communications between stages that are no messages stand in a last panel, across the stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from truedag.tracer.analysis.quantities import write_bytes, write_runs, write_time
from truedag.tracer.graph.fold import ENDS
from truedag.tracer.graph.tensor_types import read_tensors
from truedag.tracer.views import captions
from truedag.tracer.views.blocks import Blocks
from truedag.tracer.views.boundaries import find_boundaries
from truedag.tracer.views.gpus import list_gpus, write_gpus
from truedag.tracer.views.scope import Scope

STEP, ACROSS = "step", "across"
Column = tuple[int, int]  # (0, 0) before the layers, (1, layer), (2, 0) after them


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One node of the drawing.

    Attributes:
        fold: its number in the folded graph.
        shape: ellipse (communication), box (computation) or parallelogram (routing and aggregation).
        role: as in `blocks`.
        stage: -1 across stages, or where none was told.
        panel: a phase, STEP or ACROSS.
        column: None in the panels that have none.
        falls: its phase runs through the layers from the last to the first.
        text: its lines, the first is the title.
        ranks: its GPUs.
        experts: the experts it carries.
        level: how many communications and changes of role its block has passed before it.
        time_ns: mean time of a call; None is unknown.
        num_nodes: how many of the dataset's nodes it stands for.
    """

    fold: int
    shape: str
    role: str
    stage: int
    panel: str
    column: Column | None
    falls: bool
    text: tuple[str, ...]
    ranks: tuple[int, ...]
    experts: str
    level: int
    time_ns: float | None
    num_nodes: int


def make_boxes(scope: Scope, blocks: Blocks) -> list[Box]:
    """Describe every folded node but what goes in and out of the program, in topological order."""
    folded = blocks.fold.nodes.filter(~pl.col("kind").is_in(ENDS))
    stages = folded.filter(pl.col("stage") >= 0)["stage"].n_unique()
    falling = _falling_phases(folded)
    panels = {row["fold"]: _panel(row, stages > 0) for row in folded.to_dicts()}
    calls = _calls(scope, blocks)
    stood = _stood_for(blocks)
    groups = _groups(scope, blocks)
    parts = _parts(blocks)
    shapes_in, shapes_out = _shapes(blocks, panels)
    boxes = []
    sides = _sides_of_experts(folded, falling)
    boundaries = find_boundaries(blocks.nodes, blocks.edges, blocks.fold.members)
    for row in folded.to_dicts():
        number = row["fold"]
        called, ranks = calls[number], scope.spread(row["ranks"])
        texts = [captions.write_shapes(found.get(number, ())) for found in (shapes_in, shapes_out)]
        if row["role"] == "communication":
            side = captions.write_boundaries(boundaries.get(number, ())) or sides.get(number, "")
            text = _describe_communication(row, stood[number], ranks, groups.get(number, ""), texts, side)
        else:
            text = _describe_computation(row, parts[number], called, ranks, texts, sides.get(number, ""))
        boxes.append(
            Box(
                fold=number,
                shape={"communication": "ellipse", "router": "parallelogram", "routing": "parallelogram"}.get(
                    row["role"], "box"
                ),
                role=row["role"],
                stage=row["stage"],
                panel=panels[number],
                column=_column(row, falling) if panels[number] not in (STEP, ACROSS) else None,
                falls=panels[number] in falling,
                text=tuple(text),
                ranks=ranks,
                experts=row["experts"] or "",
                level=row["passed"],
                time_ns=row["transfer_ns"] if row["role"] == "communication" else called["mean_ns"],
                num_nodes=stood[number],
            )
        )
    return boxes


def _panel(row: Mapping[str, Any], has_stages: bool) -> str:
    if row["stage"] < 0 and has_stages:
        return ACROSS
    per_microbatch = row["phase"] is not None and (row["is_microbatch"] or row["layer"] >= 0)
    return str(row["phase"]) if per_microbatch else STEP


def _falling_phases(folded: pl.DataFrame) -> set[str]:
    """Phases that run through the layers from the last to the first."""
    layered = folded.filter(pl.col("layer") >= 0)
    ends = layered.group_by("phase").agg(
        first=pl.col("layer").sort_by("fold").first(), last=pl.col("layer").sort_by("fold").last()
    )
    return {row["phase"] for row in ends.to_dicts() if row["first"] > row["last"]}


def _column(row: Mapping[str, Any], falling: set[str]) -> Column:
    if row["layer"] >= 0:
        return (1, row["layer"])
    before = (row["where"] == "before") != (row["phase"] in falling)
    return (0, 0) if before else (2, 0)


def _sides_of_experts(folded: pl.DataFrame, falling: set[str]) -> dict[int, str]:
    """Say of a layer's routing whether it is the way to its experts (dispatch) or from them (combine).

    Gradients go the other way: what leads to the experts in backward is the gradient of the combination.
    """
    by = ("stage", "phase", "layer")
    experts = folded.filter(pl.col("role") == "experts").group_by(by).agg(first=pl.col("fold").min())
    near = folded.join(experts, on=by, nulls_equal=True).filter(
        (pl.col("role") == "routing") | pl.col("what").str.ends_with(" ep")
    )
    return {
        row["fold"]: ("dispatch" if (row["fold"] < row["first"]) != (row["phase"] in falling) else "combine")
        for row in near.select("fold", "first", "phase").to_dicts()
    }


def _stood_for(blocks: Blocks) -> dict[int, int]:
    """Count the graph's nodes that each folded node stands for."""
    rows = blocks.fold.members.join(blocks.weights, on="node").group_by("fold").agg(pl.col("weight").sum())
    return {fold: round(weight) for fold, weight in rows.iter_rows()}


def _calls(scope: Scope, blocks: Blocks) -> dict[int, dict[str, Any]]:
    """Count each folded node's calls (a rank in a step and microbatch), their operators, and their measured times."""
    duration = pl.when(pl.col("timing") == "measured").then(pl.col("end_ns") - pl.col("start_ns"))
    per_call = (
        blocks.nodes.join(blocks.fold.members, on="node")
        .group_by("fold", "rank", "layer", "step", "decode_step", "microbatch")
        .agg(num=pl.len(), known=duration.is_not_null().all(), time=duration.sum())
        .with_columns(time=pl.when("known").then("time"))
    )
    times = pl.Series([scope.weight(rank) for rank in per_call["rank"]], dtype=pl.Int64)
    rows = (
        per_call.with_columns(times=times)
        .group_by("fold")
        .agg(
            num_calls=pl.col("times").sum(),
            num_ops=(pl.col("num") * pl.col("times")).sum(),
            fewest=pl.col("num").min(),
            most=pl.col("num").max(),
            mean_ns=pl.col("time").mean(),
            max_ns=pl.col("time").max(),
        )
    )
    return {row["fold"]: row for row in rows.to_dicts()}


def _groups(scope: Scope, blocks: Blocks) -> dict[int, str]:
    """Name the process groups of each folded communication."""
    met = scope.graph.participants.select("node", "rank", "group").collect()
    rows = (
        met.join(blocks.fold.members, on="node")
        .select("fold", "rank", "group")
        .unique()
        .join(scope.whole.groups.select("group", "ranks").collect(), on="group")
        .sort("fold", pl.col("ranks").list.first(), "rank")
    )
    if not scope.is_folded:
        unique = rows.select("fold", "ranks").unique(maintain_order=True).group_by("fold").agg("ranks")
        return {fold: captions.write_groups(ranks) for fold, ranks in unique.iter_rows()}
    found: dict[int, str] = {}
    for fold, ranks, groups in rows.group_by("fold", maintain_order=True).agg("rank", "ranks").iter_rows():
        num = round(sum(scope.weight(rank) / len(group) for rank, group in zip(ranks, groups, strict=True)))
        first = f"{{{list_gpus(tuple(groups[0]))}}}"
        found[fold] = first if num <= 1 else f"{num:,} groups of {len(groups[0])}, the first {first}"
    return found


def _parts(blocks: Blocks) -> dict[int, list[tuple[str | None, str]]]:
    """Each folded node's modules and operators, in order, each pair once."""
    rows = (
        blocks.nodes.filter(~pl.col("kind").is_in(ENDS))
        .join(blocks.fold.members, on="node")
        .sort("node")
        .select("fold", "module", "layer", "op")
        .unique(maintain_order=True)
        .group_by("fold", maintain_order=True)
        .agg("module", "layer", "op")
    )
    return {
        fold: [
            (None if module is None else captions.relative_module(module, layer), op)
            for module, layer, op in zip(modules, layers, ops, strict=True)
        ]
        for fold, modules, layers, ops in rows.iter_rows()
    }


Shapes = dict[int, set[tuple[str, tuple[int, ...]]]]


def _shapes(blocks: Blocks, panels: Mapping[int, str]) -> tuple[Shapes, Shapes]:
    """What tensors come into each folded node and leave it, along its panel's dataflow where it has one."""
    lead, tail = (blocks.fold.members.rename({"node": end, "fold": to}) for end, to in (("src", "a"), ("dst", "b")))
    kinds = blocks.fold.nodes.select(a="fold", kind_a="kind")
    rows = (
        blocks.edges.join(lead, on="src")
        .join(tail, on="dst")
        .filter((pl.col("a") != pl.col("b")) & pl.col("dtype").is_not_null())
        .select("a", "b", "dtype", pl.col("shape"))
        .unique()
        .join(kinds, on="a")
        .sort("a", "b", "dtype")
        .to_dicts()
    )
    near: tuple[Shapes, Shapes] = ({}, {})
    far: tuple[Shapes, Shapes] = ({}, {})
    for row in rows:
        a, b, tensor = row["a"], row["b"], (row["dtype"], tuple(row["shape"]))
        inside = row["kind_a"] != "parameter" and (
            panels.get(a) == panels.get(b) or ACROSS in (panels.get(a), panels.get(b))
        )
        for found in (near, far) if inside else (far,):
            found[0].setdefault(b, set()).add(tensor)
            found[1].setdefault(a, set()).add(tensor)
    told_in, told_out = _told_shapes(blocks)
    return far[0] | near[0] | told_in, far[1] | near[1] | told_out


def _told_shapes(blocks: Blocks) -> tuple[Shapes, Shapes]:
    """What communications were given and gave, as they were called on the first of their ranks."""
    rows = (
        blocks.nodes.filter(pl.col("role") == "communication")
        .join(blocks.fold.members, on="node")
        .select("fold", "inputs", "outputs")
        .unique()
    )
    given: Shapes = {}
    gave: Shapes = {}
    for row in rows.to_dicts():
        for found, text in ((given, row["inputs"]), (gave, row["outputs"])):
            found.setdefault(row["fold"], set()).update(read_tensors(text))
    return given, gave


def _describe_communication(
    row: Mapping[str, Any], num: int, ranks: Sequence[int], groups: str, texts: Sequence[list[str]], side: str
) -> list[str]:
    kind = row["kind"]
    moved = row["recv_bytes"] if kind == "recv" else row["send_bytes"]
    calls = captions.count(num, "message" if kind != "collective" else "call")
    who = write_gpus(ranks) if kind != "collective" else groups
    module = side or ("" if row["place"] is None else row["place"].rpartition(".")[2])
    return [
        row["what"],
        f"{module} · {calls}" if module else calls,
        captions.write_in_out(*texts),
        f"{who} · {write_bytes(moved)}",
        _time(row["transfer_ns"], row["max_transfer_ns"]),
        "" if row["wait_ns"] is None else f"wait {_time(row['wait_ns'], row['max_wait_ns'])}",
    ]


def _describe_computation(
    row: Mapping[str, Any],
    parts: Sequence[tuple[str | None, str]],
    called: Mapping[str, Any],
    ranks: Sequence[int],
    texts: Sequence[list[str]],
    side: str,
) -> list[str]:
    if row["experts"]:
        title = f"experts {write_runs(int(one) for one in row['experts'].split(','))}"
    else:
        title = captions.name_computation(parts) + (f": {side}" if side else "")
        if row["phase"] is not None and not row["is_microbatch"]:
            title = f"{row['phase']}: {title}"
    each = captions.count_in_calls(called["num_ops"], called["num_calls"], called["fewest"], called["most"], "op")
    return [
        title,
        captions.write_in_out(*texts),
        f"{write_gpus(ranks)} · {each}",
        _time(called["mean_ns"], called["max_ns"]),
    ]


def _time(mean_ns: float | None, max_ns: float | None) -> str:
    return "not timed" if mean_ns is None else f"{write_time(mean_ns)}, max {write_time(max_ns)}"
