"""Draw the graph at layer level: the strategy in one look, as DOT, SVG and PNG.

Ellipses are communication, rectangles computation, parallelograms routing and aggregation; dashed lines are gate
selection and stage transfers; colours are GPU groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from truedag.tracer.analysis.quantities import write_bytes, write_runs
from truedag.tracer.errors import DrawError
from truedag.tracer.graph import Graph
from truedag.tracer.views import captions
from truedag.tracer.views.blocks import Blocks, fold_blocks
from truedag.tracer.views.boxes import ACROSS, STEP, Box, make_boxes
from truedag.tracer.views.dot import Dot
from truedag.tracer.views.layout import Page, Rectangle, lay_out
from truedag.tracer.views.legend import draw_legend, group_colour, plan_legend, stage_colour, tint
from truedag.tracer.views.notebook import Picture
from truedag.tracer.views.render import render
from truedag.tracer.views.routes import find_routes
from truedag.tracer.views.ties import Ties, count_levels, sort_ties

MAX_PIXELS = 4000
_DPI = 96.0
_MARGIN = 12.0
_MIN_WIDTH = 640.0
_DARK, _GREY = "#3a3a3a", "#9a9a9a"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing(Picture):
    """What was drawn.

    Attributes:
        dot: the DOT file, with every folded node and edge.
        svg: the picture to zoom into.
        png: the picture to look at, at most MAX_PIXELS on a side.
        num_shown: nodes in the picture.
        num_nodes: nodes of the dataset that they stand for.
        num_total: all nodes of the dataset; the others are parameters, inputs and outputs, which are counted in words.
    """

    dot: Path
    svg: Path
    png: Path
    num_shown: int
    num_nodes: int
    num_total: int


def draw(dag_dir: Path, views_dir: Path, *, progress: Callable[[str], None] | None = None) -> Drawing:
    """Draw a dataset at layer level into `views_dir`/simplified.{dot,svg,png}.

    Raises:
        GraphError: there is no dataset, or it is broken.
        DrawError: graphviz could not draw it, or the files cannot be written. What was there before may be replaced.
    """
    say = progress or (lambda _: None)
    graph = Graph.open(dag_dir)
    say("folding the graph")
    blocks = fold_blocks(graph)
    boxes = make_boxes(graph, blocks)
    if not boxes:
        raise DrawError(f"{graph.path} holds no operator: there is nothing to draw")
    text, width, height = _write_dot(graph, blocks, boxes)
    paths = {suffix: views_dir / f"simplified.{suffix}" for suffix in ("dot", "svg", "png")}
    try:
        views_dir.mkdir(parents=True, exist_ok=True)
        paths["dot"].write_text(text, encoding="utf-8")
    except OSError as error:
        raise DrawError(f"cannot write the drawing {paths['dot']}: {error}") from error
    say(f"drawing {len(boxes):,} nodes")
    dpi = min(_DPI, MAX_PIXELS / (max(width, height) + 2 * _MARGIN) * 72.0)
    render(paths["dot"], [paths["svg"], paths["png"]], dpi=dpi)
    return Drawing(
        dot=paths["dot"],
        svg=paths["svg"],
        png=paths["png"],
        num_shown=len(boxes),
        num_nodes=sum(box.num_nodes for box in boxes),
        num_total=len(blocks.nodes),
    )


def _write_dot(graph: Graph, blocks: Blocks, boxes: list[Box]) -> tuple[str, float, float]:
    ties = sort_ties(blocks.fold.edges, boxes)
    boxes = [_with_notes(box, ties.notes.get(box.fold, [])) for box in boxes]
    levels = count_levels(blocks.fold.edges, boxes)
    width = max(lay_out(boxes, levels, top=0.0).width, _MIN_WIDTH)
    legend = plan_legend(graph, blocks, boxes, ties, width=width)
    page = lay_out(boxes, levels, top=legend.height)
    dot = Dot(name="truedag", width=width + _MARGIN, height=page.height)
    _draw_sections(dot, blocks, boxes, page)
    draw_legend(dot, legend)
    colours = {box.fold: group_colour(box, boxes) for box in boxes}
    for box in boxes:
        dot.node(
            f"n{box.fold}",
            page.boxes[box.fold],
            page.lines[box.fold],
            num_bold=page.num_title[box.fold],
            shape=box.shape,
            fillcolor=colours[box.fold],
            color=stage_colour(box.stage),
            stands_for=box.num_nodes,
            ranks=",".join(map(str, box.ranks)),
            tooltip=f"{box.text[0]}: {box.num_nodes:,} nodes of the graph",
            **({"regular": "false", "distortion": "0", "skew": "0"} if box.shape == "parallelogram" else {}),
        )
    _draw_lines(dot, ties, boxes, page)
    _draw_bundles(dot, ties, page)
    return dot.text(comment="drawn by truedag from a recorded graph"), dot.width, dot.height


def _with_notes(box: Box, notes: Sequence[str]) -> Box:
    return replace(box, text=(*box.text, *notes))


def _draw_sections(dot: Dot, blocks: Blocks, boxes: Sequence[Box], page: Page) -> None:
    for stage, place in page.stages.items():
        inside = [box for box in boxes if box.stage == stage and box.panel != ACROSS]
        dot.box(
            f"stage {stage}",
            place,
            [f"n{box.fold}" for box in inside],
            style="filled,rounded",
            fillcolor=tint(stage_colour(stage), 0.05),
            color=stage_colour(stage),
            penwidth=1.6,
        )
        ranks = sorted({rank for box in inside for rank in box.ranks})
        layers = sorted({box.column[1] for box in inside if box.column is not None and box.column[0] == 1})
        name = "all ranks" if stage < 0 else f"Stage {stage}"
        title = f"{name} · {captions.write_ranks(ranks)}" + (f" · layers {write_runs(layers)}" if layers else "")
        dot.words(f"head {stage}", (place.left + 12, place.top + 19), title, size=22, bold=True, align="l")
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
        title = {STEP: "once per step", ACROSS: "across the stages"}.get(name, f"{name}, once per microbatch")
        dot.words(f"head {name} {stage}", (place.left + 10, place.top + 13), title, size=15, bold=True, align="l")
    _draw_heads(dot, blocks, page)


def _draw_heads(dot: Dot, blocks: Blocks, page: Page) -> None:
    rows = (
        blocks.nodes.filter((pl.col("kind") == "parameter") & (pl.col("layer") >= 0))
        .group_by("stage", "layer")
        .agg(pl.len(), "outputs")
    )
    parameters = {(row["stage"], row["layer"]): row for row in rows.to_dicts()}
    for (stage, name, column), place in page.heads.items():
        title = {0: "before the layers", 2: "after the layers"}.get(column[0], f"layer {column[1]}")
        if not any((other[0], other[2][0]) == (stage, 1) for other in page.heads):
            title = ""  # the program told of no layers
        held = parameters.get((stage, column[1])) if column[0] == 1 else None
        if held is not None:
            elements = sum(captions.count_elements(text) for text in held["outputs"])
            title += f": {held['len']} parameters, {elements / 1e6:,.1f} M"
        dot.words(f"head {stage} {name} {column}", (place.x, place.y - 1), title, size=8.5, bold=True)


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
            color=stage_colour(src.stage) if is_transfer else _GREY if route.is_aside and not is_gate else _DARK,
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
            dot.node(f"{bundle} {i}", Rectangle(*end, 2.0, 2.0), (), shape="point", color=_GREY)
        dot.line(f"{bundle} 0", f"{bundle} 1", ends, color=_GREY, penwidth=2.2, tooltip=f"{num} edges")
        middle = (ends[0][1] + ends[1][1]) / 2
        words = f"{captions.count(num, 'edge')}, {write_bytes(size)}"
        dot.words(f"{bundle} text", (x + 6, middle), words, size=7, align="l")
    for is_in, stubs in ((True, ties.stubs_in), (False, ties.stubs_out)):
        for fold, places in stubs.items():
            spot = page.boxes[fold]
            base = spot.top if is_in else spot.bottom
            far = base - 9.0 if is_in else base + 9.0
            name = f"stub {fold} {'in' if is_in else 'out'}"
            dot.node(name, Rectangle(spot.x, far, 2.0, 2.0), (), shape="point", color=_GREY)
            ends = [(spot.x, far), (spot.x, base)] if is_in else [(spot.x, base), (spot.x, far)]
            pair = (name, f"n{fold}") if is_in else (f"n{fold}", name)
            dot.line(*pair, ends, color=_GREY, penwidth=1.6)
            said = "; ".join(
                f"{'from' if is_in else 'to'} {place}: {captions.count(num, 'edge')}, {write_bytes(size)}"
                for place, (num, size) in places.items()
            )
            dot.words(f"{name} text", (spot.x, far - 5 if is_in else far + 6), said, size=7)
