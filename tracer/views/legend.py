"""The layer-level drawing's head: what it is of, what its signs and colours mean, what is shown out of how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from truedag.tracer.analysis.quantities import write_bytes, write_runs
from truedag.tracer.graph.fold import ENDS
from truedag.tracer.views import captions
from truedag.tracer.views.blocks import Blocks
from truedag.tracer.views.boxes import Box
from truedag.tracer.views.colours import ACROSS, DARK, LIGHT, PALETTE, SHARES, group_tint, stage_colour, tint
from truedag.tracer.views.gpus import write_gpus
from truedag.tracer.views.scope import Scope
from truedag.tracer.views.sheet import Sign
from truedag.tracer.views.ties import Ties

_MAX_GROUPS = 24  # of experts, in the legend; the drawing's boxes name all


def group_colour(box: Box, boxes: Sequence[Box]) -> str:
    """Return a box's colour: its stage's, in a shade by its kind, and for experts by their group of ranks."""
    colour = stage_colour(box.stage)
    if not box.experts:
        return tint(colour, SHARES[box.shape])
    return group_tint(colour, box.ranks, sorted({one.ranks for one in boxes if one.stage == box.stage and one.experts}))


_SHAPES = tuple(
    Sign(words=words, shape=shape, fill=tint(ACROSS, SHARES[shape]))
    for shape, words in (
        ("box", "computation"),
        ("ellipse", "communication"),
        ("parallelogram", "routing and aggregation"),
    )
)
_LINES = (
    Sign(words="data", colour=DARK),
    Sign(words="data past the next node", pen=0.7, colour=LIGHT),
    Sign(words="gate selection", style="dashed", colour=DARK),
    Sign(words="stage transfer", style="dashed", pen=2.0, colour=PALETTE[0]),
    Sign(words="a bundle of edges, counted beside it", pen=2.2, colour=LIGHT),
)


def name_stages(run: Sequence[int]) -> str:
    """Name the stages that are drawn as one."""
    if run[0] < 0:
        return "All ranks"
    return f"Stage {run[0]}" if len(run) == 1 else f"Stages {write_runs(run)}, alike"


def list_signs(boxes: Sequence[Box], runs: Mapping[int, Sequence[int]]) -> list[Sign]:
    """List what the signs of the drawing mean, and which GPUs each shade stands for."""
    signs = []
    for stage, ranks in sorted({(box.stage, box.ranks) for box in boxes if box.experts})[:_MAX_GROUPS]:
        alike = [box for box in boxes if (box.stage, box.ranks) == (stage, ranks) and box.experts]
        held = write_runs(int(one) for box in alike for one in box.experts.split(","))
        run = runs.get(stage, (stage,))
        words = f"experts {held} of stage{'s' if len(run) > 1 else ''} {write_runs(run)} on {write_gpus(ranks)}"
        fill = group_colour(alike[0], boxes)
        signs.append(Sign(words=words, shape="box", width=16, fill=fill, colour=stage_colour(stage)))
    return [*_SHAPES, *_LINES, *signs]


_CALLS = (
    "33 ops x 8: operators in each of so many calls, 265 ops in 8: in all of them; a call is what one rank runs in one "
    "microbatch, or once per step. "
)
_TIMES = (
    f"{_CALLS}Times are measured: the mean of a call and the longest; for communication the mean of a participant, "
    "from the last one's arrival; what it waited for that stands below."
)
_NO_TIMES = f"{_CALLS}Nothing was timed."


def tell(scope: Scope, blocks: Blocks, boxes: Sequence[Box], ties: Ties, *, is_part: bool) -> list[str]:
    """Say what is shown out of how much, and what is folded; of a part, that the rest is on other sheets."""
    counts = _write_part(scope, boxes, ties) if is_part else _write_counts(scope, blocks, boxes, ties)
    times = _TIMES if any(box.time_ns is not None for box in boxes) else _NO_TIMES
    return [counts, _write_folding(scope, blocks), times]


def _write_counts(scope: Scope, blocks: Blocks, boxes: Sequence[Box], ties: Ties) -> str:
    ends = blocks.nodes.join(blocks.weights, on="node").filter(pl.col("kind").is_in(ENDS))
    rows = ends.group_by("kind").agg(pl.col("weight").sum()).sort("kind", descending=True).iter_rows()
    counted = ", ".join(captions.count(round(weight), kind) for kind, weight in rows)
    drawn, bundled = sum(tie.num_edges for tie in ties.lines), sum(tie.num_edges for tie in ties.bundled)
    repeated = sum(num for num, _ in blocks.alike.repeats.values())
    later = sum(num for num, _ in blocks.later.values())
    passed = sum(num for _, num in blocks.alike.transfers.values())
    total, inner = len(blocks.edges), blocks.fold.num_inner_edges
    others = total - drawn - bundled - inner - repeated - passed - later
    of_classes = " of one GPU of each rank class" if scope.is_folded else ""
    between = f"{repeated:,} lead from a layer to one that is drawn as the same, " if repeated else ""
    if passed:
        between += f"{passed:,} from a stage to one that is drawn as the same, "
    if later:
        size = sum(size for _, size in blocks.later.values())
        between += f"{later:,} from a decode step to a later one ({write_bytes(size)}), "
    return (
        f"{len(boxes):,} nodes shown of {scope.num_total:,}: they stand for "
        f"{scope.about}{sum(box.num_nodes for box in boxes):,}; the others are {counted}. "
        f"Of {total:,} edges of data and messages{of_classes} {drawn:,} are drawn as {len(ties.lines):,} lines, "
        f"{bundled:,} bundled, {between}{inner:,} inside a node, {others:,} from and to parameters, inputs and outputs."
    )


def _write_part(scope: Scope, boxes: Sequence[Box], ties: Ties) -> str:
    drawn, bundled = sum(tie.num_edges for tie in ties.lines), sum(tie.num_edges for tie in ties.bundled)
    return (
        f"{len(boxes):,} nodes shown of {scope.num_total:,}: they stand for {scope.about}"
        f"{sum(box.num_nodes for box in boxes):,}; the others are on the sheets of other stages. "
        f"{drawn:,} edges are drawn as {len(ties.lines):,} lines, {bundled:,} bundled."
    )


def _write_folding(scope: Scope, blocks: Blocks) -> str:
    alike = ""
    if blocks.num_microbatches > 1 and blocks.num_unlike == 0:
        alike = f"; its {blocks.num_microbatches} microbatches pass the same nodes and edges (checked)"
    elif blocks.num_microbatches > 1:
        alike = f"; {blocks.num_unlike} of its {blocks.num_microbatches} microbatches pass others than the first"
    runs = [write_runs(one) for one in blocks.alike.layers.values() if len(one) > 1]
    told = f"; layers {', '.join(runs)} pass the same nodes and edges (checked)" if runs else ""
    stages = [write_runs(one) for one in blocks.alike.runs.values() if len(one) > 1]
    told += f", and so do stages {', '.join(stages)}" if stages else ""
    classes = (
        f" One GPU of each of the {len(scope.members):,} rank classes was read; the others of it run the same program."
        if scope.is_folded
        else ""
    )
    return (
        f"Folded over {blocks.folded}{alike}{told}.{classes} What is shown is a DAG (checked), folded from the "
        "recorded one: nothing is added, and only program order is left out."
    )
