"""Draw the graph by layers: the strategy in one look, and each stage with all of its layers.

Ellipses are communication, rectangles computation, parallelograms routing and aggregation; dashed lines are gate
selection and stage transfers; colours are GPU groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import polars as pl

from truedag.tracer.analysis.quantities import write_bytes, write_runs
from truedag.tracer.views import captions
from truedag.tracer.views.blocks import Blocks
from truedag.tracer.views.boxes import ACROSS, STEP, Box
from truedag.tracer.views.colours import DARK, LIGHT, stage_colour
from truedag.tracer.views.dot import Dot
from truedag.tracer.views.faults import Faults, mark_faults, write_faults
from truedag.tracer.views.font_metrics import text_width
from truedag.tracer.views.gpus import list_gpus, write_gpus
from truedag.tracer.views.layout import Page, Rectangle, lay_out
from truedag.tracer.views.legend import group_colour, list_signs, name_stages, tell
from truedag.tracer.views.routes import find_routes
from truedag.tracer.views.scope import Scope
from truedag.tracer.views.sheet import Link, Sheet, draw_head, find_way, frame_stage, plan_head
from truedag.tracer.views.ties import Ties, count_levels, sort_ties

_MARGIN = 12.0
_MIN_WIDTH = 640.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSubject:
    """What a drawing by layers is of.

    Attributes:
        name: the sheet's name.
        title: its title.
        links: ways to other sheets.
        ways: for a stage the sheet that its heading leads to.
        stage: the only stage that is drawn; None: all.
    """

    name: str
    title: str
    links: tuple[Link, ...] = ()
    ways: dict[int, str] | None = None
    stage: int | None = None


def draw_layers(scope: Scope, blocks: Blocks, all_boxes: Sequence[Box], subject: LayerSubject) -> Sheet:
    """Draw boxes of blocks, all or those of one stage, with the lines between them."""
    boxes = [box for box in all_boxes if subject.stage is None or box.stage == subject.stage]
    ties = sort_ties(blocks.fold.edges, boxes)
    members = blocks.nodes.select("node", "rank", "layer").join(blocks.fold.members, on="node").rename({"fold": "box"})
    drawn = {box.fold for box in boxes}  # on other sheets stand other stages, and on none what goes in and out
    faults = {fold: found for fold, found in scope.faults.on(members).items() if fold in drawn}
    boxes = [
        _with_notes(box, [*ties.notes.get(box.fold, []), *write_faults(faults.get(box.fold, ()))]) for box in boxes
    ]
    levels = count_levels(blocks.fold.edges, boxes)
    width = max(lay_out(boxes, levels, top=0.0).width, _MIN_WIDTH)
    told = tell(scope, blocks, boxes, ties, is_part=subject.stage is not None)
    told += (scope.faults if subject.stage is None else Faults()).tell(faults.values())
    head = plan_head(subject.title, told, list_signs(boxes, blocks.alike.runs), width=width, links=subject.links)
    page = lay_out(boxes, levels, top=head.height)
    dot = Dot(name=subject.title, width=width + _MARGIN, height=page.height)
    _draw_sections(dot, blocks, boxes, page, subject)
    draw_head(dot, head, sheet=subject.name)
    colours = {box.fold: group_colour(box, boxes) for box in boxes}
    for box in boxes:
        dot.node(
            f"n{box.fold}",
            page.boxes[box.fold],
            page.lines[box.fold],
            num_bold=page.num_title[box.fold],
            shape=box.shape,
            fillcolor=colours[box.fold],
            stands_for=box.num_nodes,
            ranks=list_gpus(box.ranks),
            **{
                "color": stage_colour(box.stage),
                "tooltip": f"{box.text[0]}: {box.num_nodes:,} nodes of the graph",
                **mark_faults(subject.name, faults.get(box.fold, ())),
            },
        )
    _draw_lines(dot, ties, boxes, page)
    _draw_bundles(dot, ties, page)
    return Sheet(
        name=subject.name,
        title=subject.title,
        dot=dot.text(comment="drawn by truedag from a recorded graph"),
        width=dot.width,
        height=dot.height,
        num_shown=len(boxes),
        num_nodes=sum(box.num_nodes for box in boxes),
    )


def _with_notes(box: Box, notes: Sequence[str]) -> Box:
    return replace(box, text=(*box.text, *notes))


def _draw_sections(dot: Dot, blocks: Blocks, boxes: Sequence[Box], page: Page, subject: LayerSubject) -> None:
    for stage, place in page.stages.items():
        inside = [box for box in boxes if box.stage == stage and box.panel != ACROSS]
        frame_stage(dot, stage, place, [f"n{box.fold}" for box in inside])
        ranks = sorted({rank for box in inside for rank in box.ranks})
        firsts = sorted({box.column[1] for box in inside if box.column is not None and box.column[0] == 1})
        layers = [layer for first in firsts for layer in blocks.alike.layers.get((stage, first), (first,))]
        run = blocks.alike.runs.get(stage, (stage,))
        title = f"{name_stages(run)} · {write_gpus(ranks)}" + (f" · layers {write_runs(layers)}" if layers else "")
        if len(run) > 1 and layers:
            title += f", {len(layers) // len(run)} in each"
        size = min(22.0, 22.0 * (place.width - 24) / text_width(title, 22.0, bold=True))
        dot.words(
            f"head {stage}",
            (place.left + 12, place.top + 19),
            title,
            size=size,
            bold=True,
            align="l",
            **_way(subject, stage),
        )
    stepped = set(blocks.nodes.filter(pl.col("decode_step") >= 0)["phase"].unique().to_list())
    for (stage, name), place in page.panels.items():
        inside = [box for box in boxes if (box.stage, box.panel) == (stage, name)]
        dot.box(
            f"{name} {stage}",
            place,
            [f"n{box.fold}" for box in inside],
            style="filled,rounded",
            fillcolor="#ffffff",
            color="#d0d0d0",
        )
        often = "once per microbatch and decode step" if name in stepped else "once per microbatch"
        title = {STEP: "once per step", ACROSS: "across the stages"}.get(name, f"{name}, {often}")
        dot.words(f"head {name} {stage}", (place.left + 10, place.top + 13), title, size=15, bold=True, align="l")
        words = _tell_beside(blocks, stage, name)
        if words:
            right = place.left + 10 + text_width(title, 15, bold=True) + 14
            dot.words(f"transfers {name} {stage}", (right, place.top + 14), words, size=9, align="l")
    for (stage, name, column), place in page.groups.items():
        inside = [box for box in boxes if (box.stage, box.panel, box.column) == (stage, name, column)]
        look = {"style": "filled,rounded", "fillcolor": "#f6f6f6", "color": "#f6f6f6"}
        dot.box(f"column {name} {stage} {column}", place, [f"n{box.fold}" for box in inside], **look)
    _draw_heads(dot, blocks, page)


def _tell_beside(blocks: Blocks, stage: int, phase: str) -> str:
    """Say what leads from a panel into itself, which no line shows."""
    told = []
    num, _ = blocks.alike.transfers.get((stage, phase), (0, 0))
    if num:
        told.append(f"and {captions.count(num, 'transfer')} from one of these stages to the next")
    num, size = blocks.later.get((stage, phase), (0, 0))
    if num:
        told.append(f"each step follows from those before it: {captions.count(num, 'edge')}, {write_bytes(size)}")
    return "; ".join(told)


def _way(subject: LayerSubject, stage: int) -> dict[str, str]:
    way = (subject.ways or {}).get(stage)
    return {} if way is None else {"URL": find_way(subject.name, way), "tooltip": "to all layers of the stage"}


def _draw_heads(dot: Dot, blocks: Blocks, page: Page) -> None:
    parameters = _count_parameters(blocks)
    for (stage, name, column), place in page.heads.items():
        title = {0: "before the layers", 2: "after the layers"}.get(column[0]) or _name_layers(blocks, stage, column[1])
        if not any((other[0], other[2][0]) == (stage, 1) for other in page.heads):
            title = ""  # the program told of no layers
        notes: list[str] = []
        held = parameters.get((stage, column[1])) if column[0] == 1 else None
        if held is not None:
            notes = [f"{held / 1e6:,.1f} M parameters on all GPUs"]
        num, size = blocks.alike.repeats.get((stage, column[1]), (0, 0)) if column[0] == 1 else (0, 0)
        if num:
            notes = [f"each; {num:,} edges, {write_bytes(size)} to the next", *notes]
        dot.words(f"head {stage} {name} {column}", (place.x, place.y - 9), title, size=8.5, bold=True)
        for i, note in enumerate(reversed(notes)):
            dot.words(f"note {stage} {name} {column} {i}", (place.x, place.y + 1 + 9 * i), note, size=7.0)


def _name_layers(blocks: Blocks, stage: int, first: int) -> str:
    layers = blocks.alike.layers.get((stage, first), (first,))
    return captions.name_layers(layers)


def _count_parameters(blocks: Blocks) -> dict[tuple[int, int], int]:
    """Count the elements of each layer's parameters, on all GPUs that hold some of them."""
    held = blocks.nodes.filter((pl.col("kind") == "parameter") & (pl.col("layer") >= 0)).join(blocks.weights, on="node")
    counts: dict[tuple[int, int], float] = {}
    for stage, layer, text, weight in held.select("stage", "layer", "outputs", "weight").iter_rows():
        counts[stage, layer] = counts.get((stage, layer), 0) + weight * captions.count_elements(text or "")
    return {place: round(count) for place, count in counts.items()}


def _draw_lines(dot: Dot, ties: Ties, boxes: Sequence[Box], page: Page) -> None:
    roles = {box.fold: box for box in boxes}
    for route in find_routes(ties.lines, boxes, page):
        src, dst = roles[route.tie.src], roles[route.tie.dst]
        is_transfer = route.tie.kind == "p2p"
        is_gate = "router" in (src.role, dst.role) and {src.role, dst.role} <= {"router", "routing", "experts"}
        dot.line(
            f"n{route.tie.src}",
            f"n{route.tie.dst}",
            route.points,
            color=stage_colour(src.stage) if is_transfer else LIGHT if route.is_aside and not is_gate else DARK,
            style="dashed" if is_transfer or is_gate else "solid",
            penwidth=2.0 if is_transfer else 0.7 if route.is_aside else 1.0,
            kind=route.tie.kind,
            num_edges=route.tie.num_edges,
            bytes=route.tie.num_bytes,
            tooltip=route.tie.describe(),
        )


def _draw_bundles(dot: Dot, ties: Ties, page: Page) -> None:
    for tie in ties.bundled:
        a, b = page.boxes[tie.src], page.boxes[tie.dst]
        dot.line(
            f"n{tie.src}",
            f"n{tie.dst}",
            ((a.x, a.y), (b.x, b.y)),
            style="invis",
            kind=tie.kind,
            num_edges=tie.num_edges,
            bytes=tie.num_bytes,
        )
    for (stage, column, name, other), (num, size) in ties.links.items():
        above, below = page.panels[stage, name], page.panels[stage, other]
        x = page.heads[stage, other, column].x
        ends = [(x, above.bottom), (x, below.top)] if above.y < below.y else [(x, above.top), (x, below.bottom)]
        bundle = f"link {stage} {name} {other} {column}"
        for i, end in enumerate(ends):
            dot.node(f"{bundle} {i}", Rectangle(*end, 2.0, 2.0), (), shape="point", color=LIGHT)
        dot.line(f"{bundle} 0", f"{bundle} 1", ends, color=LIGHT, penwidth=2.2, tooltip=f"{num} edges")
        middle = (ends[0][1] + ends[1][1]) / 2
        words = f"{captions.count(num, 'edge')}, {write_bytes(size)}"
        dot.words(f"{bundle} text", (x + 6, middle), words, size=7, align="l")
    for is_in, stubs in ((True, ties.stubs_in), (False, ties.stubs_out)):
        for fold, places in stubs.items():
            spot = page.boxes[fold]
            base = spot.top if is_in else spot.bottom
            far = base - 9.0 if is_in else base + 9.0
            name = f"stub {fold} {'in' if is_in else 'out'}"
            dot.node(name, Rectangle(spot.x, far, 2.0, 2.0), (), shape="point", color=LIGHT)
            ends = [(spot.x, far), (spot.x, base)] if is_in else [(spot.x, base), (spot.x, far)]
            pair = (name, f"n{fold}") if is_in else (f"n{fold}", name)
            dot.line(*pair, ends, color=LIGHT, penwidth=1.6)
            said = "; ".join(
                f"{'from' if is_in else 'to'} {place}: {captions.count(num, 'edge')}, {write_bytes(size)}"
                for place, (num, size) in places.items()
            )
            dot.words(f"{name} text", (spot.x, far - 5 if is_in else far + 6), said, size=7)
