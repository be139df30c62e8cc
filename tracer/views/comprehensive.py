"""`comprehensive`: every rank class with its GPUs and groups, the batch's split and merge, each stage's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from truedag.tracer.views.blocks import fold_blocks
from truedag.tracer.views.boxes import make_boxes
from truedag.tracer.views.detailed import Choice
from truedag.tracer.views.experts import ExpertMap
from truedag.tracer.views.layers import LayerSubject, draw_layers
from truedag.tracer.views.scope import Scope
from truedag.tracer.views.sheet import Link, Sheet, link_views
from truedag.tracer.views.world import read_world
from truedag.tracer.views.world_sheet import draw_world

NAME = "comprehensive"


def draw_comprehensive(
    scope: Scope, choice: Choice, say: Callable[[str], None], *, linked: Sequence[str]
) -> list[Sheet]:
    """Draw the world, and every layer of each stage; `linked` are the views that links may lead to.

    Raises:
        GraphError: the dataset is broken.
        DrawError: a stage that was chosen is not in the graph.
    """
    say("reading the world")
    world = read_world(scope)
    say("folding the layers")
    blocks = fold_blocks(scope, alike=False)
    boxes = make_boxes(scope, blocks)
    stages = sorted({box.stage for box in boxes if box.stage >= 0})
    choice.check_stages(stages, scope)
    chosen = [stage for stage in stages if choice.has_stage(stage)]
    ways = {stage: f"{NAME}/stage-{stage}" for stage in chosen}
    links = (
        *link_views(linked, but=NAME),
        *(Link(words=f"layers of stage {stage}", sheet=way) for stage, way in ways.items()),
    )
    sheets = [draw_world(scope, world, ExpertMap(scope), name=NAME, ways=ways, links=links)]
    for i, stage in enumerate(chosen):
        near = [*chosen[max(0, i - 1) : i], *chosen[i + 1 : i + 2]]
        more = tuple(Link(words=f"stage {other}", sheet=ways[other]) for other in near)
        subject = LayerSubject(
            name=ways[stage],
            title=f"{scope.name}: all layers of stage {stage}",
            stage=stage,
            links=(*link_views(linked, but=""), *more),
        )
        sheets.append(draw_layers(scope, blocks, boxes, subject))
    return sheets
