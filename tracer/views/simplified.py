"""`simplified`: the strategy in one look. Stages, groups, the communications between them; alike layers drawn once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from truedag.tracer.views.blocks import fold_blocks
from truedag.tracer.views.boxes import make_boxes
from truedag.tracer.views.detailed import Choice
from truedag.tracer.views.layers import LayerSubject, draw_layers
from truedag.tracer.views.scope import Scope
from truedag.tracer.views.sheet import Sheet, link_views

NAME = "simplified"


def draw_simplified(scope: Scope, choice: Choice, say: Callable[[str], None], *, linked: Sequence[str]) -> list[Sheet]:
    """Draw the strategy; `linked` are the views that its links may lead to.

    Raises:
        GraphError: the dataset is broken.
    """
    say("folding the graph")
    blocks = fold_blocks(scope, alike=True)
    boxes = make_boxes(scope, blocks)
    links = link_views(linked, but=NAME)
    stages = {box.stage for box in boxes if box.stage >= 0 and choice.has_stage(box.stage)}
    ways = {stage: f"comprehensive/stage-{stage}" for stage in stages} if "comprehensive" in linked else {}
    title = f"{scope.name} · {len(scope.places):,} GPUs"
    return [draw_layers(scope, blocks, boxes, LayerSubject(name=NAME, title=title, links=links, ways=ways))]
