"""`simplified`: the strategy in one look. Stages, groups, the communications between them; alike layers drawn once."""

from __future__ import annotations

from collections.abc import Callable

from truedag.tracer.views.blocks import fold_blocks
from truedag.tracer.views.boxes import make_boxes
from truedag.tracer.views.layers import LayerSubject, draw_layers
from truedag.tracer.views.scope import Scope
from truedag.tracer.views.sheet import Link, Sheet

NAME = "simplified"


def draw_simplified(scope: Scope, say: Callable[[str], None]) -> list[Sheet]:
    """Draw the strategy.

    Raises:
        GraphError: the dataset is broken.
    """
    say("folding the graph")
    blocks = fold_blocks(scope, alike=True)
    boxes = make_boxes(scope, blocks)
    links = (Link(words="all layers and operators", sheet="detailed"), Link(words="all GPUs", sheet="comprehensive"))
    stages = {box.stage for box in boxes if box.stage >= 0}
    ways = {stage: f"comprehensive/stage-{stage}" for stage in stages}
    title = f"{scope.name} · {len(scope.places):,} GPUs"
    return [draw_layers(scope, blocks, boxes, LayerSubject(name=NAME, title=title, links=links, ways=ways))]
