"""What the layer-level drawing shows: the graph folded into the parts of layers, over ranks and microbatches alike.

An operator's role is what it is to the tokens' way through a layer: `experts` carry an expert's number, `routing` was
told to route or belongs to the module that exchanges tokens over the expert axis, `router` is the module of that name
inside it, everything else is `computation`. Axes, experts, layers and phases were told by the program; what it did not
tell is drawn as computation.

Layers that follow each other in a stage and are alike can be drawn once (`alike`), and so can stages (`alike_stages`).

Ranks of a stage and microbatches run the same blocks (a block is a layer in a phase), so their segments are folded
together: by block, role, and how many communications and changes of role the program has passed in it. Whether the
microbatches really are alike is looked at, not assumed. Where that fold has a cycle, steps and then microbatches are
kept apart, and at last every segment for itself, which is always a DAG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from truedag.tracer.analysis.estimates import forget_estimates
from truedag.tracer.errors import GraphError
from truedag.tracer.graph.fold import COMMUNICATIONS, ENDS, Fold, coarsen, fold
from truedag.tracer.views.alike import find_alike, fold_alike
from truedag.tracer.views.alike_stages import AlikeStages, find_alike_stages, fold_stages
from truedag.tracer.views.experts import ExpertMap
from truedag.tracer.views.scope import Scope, weigh

BLOCK = ("stage", "phase", "is_microbatch", "layer", "where")
_CALL = ("step", "decode_step", "microbatch")
_PART = (*BLOCK, "role", "what", "place", "experts", "passed")
# What is folded together, most first: the first that makes a DAG is drawn.
_LADDER: tuple[tuple[str, Sequence[str]], ...] = (
    ("ranks and microbatches", _PART),
    ("ranks and microbatches", (*_PART, "occurrence")),
    ("ranks and microbatches of a step", (*_PART, "step", "decode_step")),
    ("ranks", (*_PART, *_CALL)),
    ("ranks", (*_PART, *_CALL, "occurrence")),
)


Later = dict[tuple[int, str | None], tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The folded graph with, for each folded node, its block and role.

    Attributes:
        fold: the folded graph; its nodes have the columns of BLOCK, role, what, place, experts, times of waiting and
            transfer, and is_source for what was there before.
        nodes: the dataset's nodes with their role.
        edges: the dataset's data and p2p edges.
        folded: what is folded together, in words.
        num_microbatches: how many microbatches are folded together.
        num_unlike: how many of them pass other folded nodes or edges than the first.
        alike: which stages and layers each that is drawn stands for, and what leads from one of them to another, which
            is not drawn.
        later: by stage and phase edges and bytes from a decode step to a later one, which are not drawn.
        weights: node and weight: how many nodes of the graph each node that was read stands for.
    """

    fold: Fold
    nodes: pl.DataFrame
    edges: pl.DataFrame
    folded: str
    num_microbatches: int
    num_unlike: int
    alike: AlikeStages
    later: Later
    weights: pl.DataFrame


def fold_blocks(scope: Scope, *, alike: bool) -> Blocks:
    """Fold the graph for the layer-level drawing.

    Args:
        scope: what is read of the graph.
        alike: draw layers that follow each other and pass the same folded nodes and edges once, and stages too.

    Raises:
        GraphError: the dataset is broken.
    """
    graph = scope.graph
    participants = graph.participants.collect()
    groups = graph.groups.select(pl.col("group").cast(pl.Int64), "axis").collect()
    all_edges = graph.edges.collect()
    edges = all_edges.filter(pl.col("kind") != "order")
    first_group = participants.group_by("node").agg(
        pl.col("group").first().cast(pl.Int64), lead=pl.col("rank").min().cast(pl.Int64)
    )
    nodes = (
        graph.nodes.collect()
        .join(first_group, on="node", how="left")
        .join(groups, on="group", how="left")
        .with_columns(lead=pl.coalesce("lead", pl.col("rank").cast(pl.Int64)))
    )
    nodes = _add_parts(_add_where(_add_role(nodes)), all_edges, scope)
    fine = fold(nodes, edges, participants, [*_CALL, *_PART, "group", "lead"])
    # What ran outside all phases is of one part only if it is of the same operators.
    of_ops = pl.when(pl.col("phase").is_null() & pl.col("what").is_null()).then(pl.col("ops").list.join(" "))
    segments = fine.nodes.with_columns(
        what=of_ops.otherwise("what"), occurrence=pl.int_range(pl.len()).over("kind", *_CALL, *_PART, "group", "lead")
    )
    fine = replace(fine, nodes=segments)
    folded, coarse, later = _coarsen(fine)
    layers: dict[tuple[int, int], tuple[int, ...]] = {
        (stage, layer): (layer,) for stage, layer in coarse.nodes.select("stage", "layer").unique().iter_rows()
    }
    stages: dict[int, tuple[int, ...]] = {stage: (stage,) for stage, _ in layers}
    told = AlikeStages(runs=stages, layers=layers, repeats={})
    if alike:
        layers = find_alike(coarse)
        fine, repeats = fold_alike(fine, layers)
        folded, coarse, later = _coarsen(fine)
        told = AlikeStages(runs=stages, layers=layers, repeats=repeats)
        runs = find_alike_stages(coarse, layers, scope.stage_sizes)
        if any(len(run) > 1 for run in runs.values()):
            joined, found = fold_stages(fine, layers, repeats, runs)
            tried = _coarsen(joined)
            if tried[0] == folded:  # else they are apart for the sake of a DAG
                folded, coarse, later = tried
                told = found
    weights = weigh(scope, nodes, participants)
    times = _communication_times(coarse, forget_estimates(participants, nodes), scope)
    coarse = replace(coarse, nodes=coarse.nodes.join(times, on="fold", how="left").sort("fold"))
    num, num_unlike = _compare_microbatches(nodes, edges, coarse) if "microbatches" in folded else (0, 0)
    return Blocks(
        fold=coarse,
        nodes=nodes,
        edges=edges,
        folded=folded,
        num_microbatches=num,
        num_unlike=num_unlike,
        alike=told,
        later=later,
        weights=weights,
    )


def _coarsen(fine: Fold) -> tuple[str, Fold, Later]:
    """Fold as much together as still makes a DAG.

    Returns:
        what is folded together, the fold, and edges and bytes from one call to a later one that had to be taken out,
        by stage and phase.
    """
    try:
        return _LADDER[0][0], coarsen(fine, _LADDER[0][1]), {}
    except GraphError:
        cut, later = _cut_calls(fine)
    for folded, by, one in (
        ("ranks, microbatches and decode steps", _LADDER[0][1], cut),
        *((folded, by, fine) for folded, by in _LADDER[1:]),
    ):
        try:
            return folded, coarsen(one, by), later if one is cut else {}
        except GraphError:
            continue
    return "nothing but a rank's segments", fine, {}


def _cut_calls(fine: Fold) -> tuple[Fold, Later]:
    """Take out the edges that lead from a microbatch or decode step to another one of the same phase."""
    ends = fine.nodes.filter(pl.col("decode_step") >= 0).select("fold", "stage", "phase", call=pl.struct(*_CALL))
    later = (
        fine.edges.join(ends.rename({"fold": "src"}), on="src")
        .join(ends.rename({"fold": "dst"}), on="dst", suffix="_b")
        .filter((pl.col("phase") == pl.col("phase_b")) & (pl.col("call") != pl.col("call_b")))
    )
    kept = fine.edges.join(later.select("src", "dst", "kind"), on=["src", "dst", "kind"], how="anti")
    counted = later.group_by("stage", "phase").agg(pl.col("num_edges").sum(), pl.col("bytes").sum()).sort("stage")
    return replace(fine, edges=kept), {(stage, phase): (num, size) for stage, phase, num, size in counted.iter_rows()}


def _add_role(nodes: pl.DataFrame) -> pl.DataFrame:
    exchanging = set(nodes.filter(pl.col("axis") == "ep")["module"].drop_nulls().unique().to_list())
    expert_modules = nodes.filter(pl.col("expert") >= 0)["module"].drop_nulls().unique().to_list()
    holders = {
        module[:end]
        for module in expert_modules
        for end in range(len(module))
        if module[end] == "." and any(module[:end].startswith(f"{one}.") for one in exchanging)
    } - exchanging
    last = pl.col("module").str.split(".").list.last()
    role = (
        pl.when(pl.col("kind").is_in(COMMUNICATIONS))
        .then(pl.lit("communication"))
        .when((pl.col("expert") >= 0) | pl.col("module").is_in(sorted(holders)))
        .then(pl.lit("experts"))
        .when((pl.col("category") == "routing") & last.is_in(["router", "gate"]))
        .then(pl.lit("router"))
        .when((pl.col("category") == "routing") | pl.col("module").is_in(sorted(exchanging)))
        .then(pl.lit("routing"))
        .otherwise(pl.lit("computation"))
    )
    return nodes.with_columns(role=role, is_microbatch=pl.col("microbatch") >= 0)


def _add_where(nodes: pl.DataFrame) -> pl.DataFrame:
    """Say of what is in no layer whether it ran before, after or between its rank's layers."""
    layered = nodes.filter((pl.col("layer") >= 0) & ~pl.col("kind").is_in(ENDS))
    near = ("lead", "step", "phase", "decode_step", "microbatch")
    call = layered.group_by(near).agg(low=pl.col("node").min(), high=pl.col("node").max())
    step = layered.group_by(near[:2]).agg(step_low=pl.col("node").min(), step_high=pl.col("node").max())
    low, high = pl.coalesce("low", "step_low"), pl.coalesce("high", "step_high")
    where = (
        pl.when((pl.col("layer") >= 0) | low.is_null() | pl.col("phase").is_null())
        .then(None)
        .when(pl.col("node") < low)
        .then(pl.lit("before"))
        .when(pl.col("node") > high)
        .then(pl.lit("after"))
        .otherwise(pl.lit("between"))
    )
    joined = nodes.join(call, on=near, how="left", nulls_equal=True).join(
        step, on=near[:2], how="left", nulls_equal=True
    )
    return joined.with_columns(where=where).drop("low", "high", "step_low", "step_high")


def _add_parts(nodes: pl.DataFrame, edges: pl.DataFrame, scope: Scope) -> pl.DataFrame:
    """Add what folds together: what and place (communications), experts, passed communications of the block."""
    is_communication = pl.col("role") == "communication"
    held = (
        nodes.filter(pl.col("expert") >= 0)
        .group_by("lead", "layer")
        .agg(held=pl.col("expert").unique().sort().cast(pl.String).implode().list.join(","))
        .with_columns(role=pl.lit("experts"))
    )
    if scope.is_folded:
        held = _spread_experts(held, ExpertMap(scope))
    nodes = nodes.join(held, on=["lead", "layer", "role"], how="left").rename({"held": "experts"})
    nodes = nodes.with_columns(
        what=pl.when(is_communication).then("label"), place=pl.when(is_communication).then("module")
    )
    return nodes.sort("node").with_columns(passed=_count_passed(nodes.sort("node"), edges))


def _spread_experts(held: pl.DataFrame, experts: ExpertMap) -> pl.DataFrame:
    """Name the experts of all ranks of a class where the one that was read stands for them."""
    told = [
        ",".join(map(str, experts.of_class(lead, layer))) for lead, layer in held.select("lead", "layer").iter_rows()
    ]
    return held.with_columns(held=pl.Series(told, dtype=pl.String))


def _count_passed(nodes: pl.DataFrame, edges: pl.DataFrame) -> pl.Series:
    """Count the communications and changes of role on the longest way through its block to each node.

    By the ways of data and of the program, not by time: what overlaps with a communication ran before it here and after
    it there. Any edge between two parts of a block then leads to a higher count.
    """
    blocks = nodes.select(pl.struct(*_CALL, *BLOCK[1:]).rank("dense")).to_series().to_numpy()
    roles = nodes["role"].rank("dense").to_numpy()
    is_communication = (nodes["role"] == "communication").to_numpy()
    src, dst = (np.searchsorted(nodes["node"].to_numpy(), edges[end].to_numpy()) for end in ("src", "dst"))
    inside = blocks[src] == blocks[dst]
    src, dst = src[inside], dst[inside]
    along = np.argsort(src, kind="stable")
    src, dst = src[along], dst[along]
    steps = ((roles[src] != roles[dst]) | is_communication[src]).astype(np.int64)
    passed = [0] * len(nodes)
    for one, other, more in zip(src.tolist(), dst.tolist(), steps.tolist(), strict=True):
        if passed[one] + more > passed[other]:
            passed[other] = passed[one] + more
    return pl.Series(passed, dtype=pl.Int64)


def _communication_times(coarse: Fold, participants: pl.DataFrame, scope: Scope) -> pl.DataFrame:
    """Mean and longest waiting and transfer over the participants of each folded communication; null is unknown."""
    wait, transfer = pl.col("start_ns") - pl.col("arrive_ns"), pl.col("end_ns") - pl.col("start_ns")
    num = pl.Series([scope.weight(rank) for rank in participants["rank"]], dtype=pl.Int64)
    return (
        participants.with_columns(num=num)
        .join(coarse.members, on="node")
        .group_by("fold")
        .agg(
            wait_ns=wait.mean(),
            max_wait_ns=wait.max(),
            transfer_ns=transfer.mean(),
            max_transfer_ns=transfer.max(),
            send_bytes=(pl.col("send_bytes") * pl.col("num")).sum(),
            recv_bytes=(pl.col("recv_bytes") * pl.col("num")).sum(),
        )
    )


def _compare_microbatches(nodes: pl.DataFrame, edges: pl.DataFrame, coarse: Fold) -> tuple[int, int]:
    """Count the microbatches, and those that pass other folded nodes or edges than the first."""
    labels = nodes.select("node", "microbatch").join(coarse.members, on="node")
    inside = labels.filter(pl.col("microbatch") >= 0)
    parts = inside.select("microbatch", "fold").unique().sort("microbatch", "fold")
    lead, tail = (
        inside.select(pl.col("node").alias(end), pl.col("microbatch").alias(mb), pl.col("fold").alias(to))
        for end, mb, to in (("src", "microbatch", "from"), ("dst", "mb", "to"))
    )
    links = (
        edges.select("src", "dst")
        .join(lead, on="src")
        .join(tail, on="dst")
        .filter((pl.col("microbatch") == pl.col("mb")) & (pl.col("from") != pl.col("to")))
        .select("microbatch", "from", "to")
        .unique()
        .sort("microbatch", "from", "to")
    )
    numbers = inside["microbatch"].unique().sort().to_list()
    pictures = [
        (
            parts.filter(pl.col("microbatch") == number).drop("microbatch").rows(),
            links.filter(pl.col("microbatch") == number).drop("microbatch").rows(),
        )
        for number in numbers
    ]
    return len(numbers), sum(picture != pictures[0] for picture in pictures)
