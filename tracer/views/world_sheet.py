"""Draw the world: every GPU in its stage, the groups they are in and what these move, the batch's way in and out.

Top to bottom: the batch and how it is split; the stages with their rank classes, their communications by axis and a map
of their GPUs; what merges the parts of the batch again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from truedag.tracer.analysis.quantities import write_bytes
from truedag.tracer.views import captions
from truedag.tracer.views.colours import DARK, LIGHT, SHARES, stage_colour, tint
from truedag.tracer.views.dot import Dot
from truedag.tracer.views.experts import ExpertMap
from truedag.tracer.views.faults import mark_faults
from truedag.tracer.views.gpus import list_gpus, write_gpus
from truedag.tracer.views.layout import Rectangle
from truedag.tracer.views.scope import Scope
from truedag.tracer.views.sheet import GREY, Link, Sheet, Sign, draw_head, find_way, frame_stage, plan_head
from truedag.tracer.views.world import World
from truedag.tracer.views.world_page import MARGIN, WorldPage, is_below, lay_out_world

_PALE = "#b4b4b4"  # of lines that say who takes part
_NUM_LANES = 9
_SIGNS = (
    Sign(words="a rank class: GPUs that run the same program", shape="box", fill=tint(GREY, SHARES["box"])),
    Sign(words="communication over an axis, or messages", shape="ellipse", fill=tint(GREY, SHARES["ellipse"])),
    Sign(words="split and merge of the batch", shape="parallelogram", fill=tint(GREY, SHARES["parallelogram"])),
    Sign(words="one GPU, in the shade of its row", shape="box", width=16, fill=tint(GREY, 0.3)),
    Sign(words="data", colour=DARK),
    Sign(words="takes part in", colour=_PALE, arrow="none"),
    Sign(words="stage transfer", style="dashed", pen=2.0),
)


def draw_world(
    scope: Scope, world: World, experts: ExpertMap, *, name: str, ways: Mapping[int, str], links: Sequence[Link]
) -> Sheet:
    """Draw it; `ways` has for a stage the sheet of all its layers."""
    page = lay_out_world(scope, world, experts)
    title = f"{scope.name} · {len(scope.places):,} GPUs, every one"
    stood = sum(one.stands_for for one in page.nodes)
    width = max(page.width, 900.0)
    told = _tell(scope, page, stood)
    told += scope.faults.tell([*(one.faults for one in page.nodes), *(one.faults for one in page.cells)])
    head = plan_head(title, told, _SIGNS, width=width, links=links)
    for place in [
        *(one.place for one in page.nodes),
        *(one.place for one in page.cells),
        *(one[0] for one in page.words),
        *page.stages.values(),
    ]:
        place.y += head.height
    page.buses = {stage: y + head.height for stage, y in page.buses.items()}
    dot = Dot(name=title, width=width + MARGIN, height=page.height + head.height + MARGIN)
    _draw_stages(dot, scope, page, ways, name)
    draw_head(dot, head, sheet=name)
    for i, (place, text, size, bold) in enumerate(page.words):
        dot.words(f"words {i}", (place.x, place.y), text, size=size, bold=bold, align="l")
    _draw_cells(dot, scope, page, name)
    for one in page.nodes:
        colour = stage_colour(one.stage)
        dot.node(
            one.name,
            one.place,
            one.text,
            num_bold=one.num_bold,
            shape=one.shape,
            fillcolor=tint(colour, SHARES[one.shape]),
            stands_for=one.stands_for,
            ranks=list_gpus(one.ranks),
            **{"color": colour, **mark_faults(name, one.faults)},
        )
    _draw_lines(dot, world, page)
    return Sheet(
        name=name,
        title=title,
        dot=dot.text(comment="drawn by truedag from a recorded graph"),
        width=dot.width,
        height=dot.height,
        num_shown=len(page.nodes),
        num_nodes=stood,
    )


def _draw_cells(dot: Dot, scope: Scope, page: WorldPage, name: str) -> None:
    for cell in sorted(page.cells, key=lambda one: len(one.faults) > 0):  # red frames above their neighbours'
        is_known = cell.rank in scope.places
        told = ", ".join(f"{axis} {scope.coordinate(cell.rank, axis)}" for axis in scope.axes)
        look: dict[str, object] = {"color": "#ffffff" if is_known else LIGHT, "penwidth": 0.6}
        marks = mark_faults(name, cell.faults)
        said = "; ".join([told if is_known else "recorded nothing", *(fault.title for fault in cell.faults)])
        dot.node(
            f"gpu{cell.rank}",
            cell.place,
            (str(cell.rank),),
            num_bold=0,
            shape="box",
            fillcolor=cell.fill,
            fontsize="7.5",
            ranks=cell.rank,
            **{**look, **marks, "penwidth": 1.6 if marks else 0.6, "tooltip": f"GPU {cell.rank}: {said}"},
        )


def _tell(scope: Scope, page: WorldPage, stood: int) -> list[str]:
    axes = ", ".join(f"{axis} {scope.size(axis)}" for axis in scope.axes)
    read = (
        f" One GPU of each of the {len(scope.members):,} rank classes was read; the others of it run the same program."
        if scope.is_folded
        else ""
    )
    num_missing = len(page.cells) - len(scope.places)
    missing = f" {captions.count(num_missing, 'GPU')} of these recorded nothing." if num_missing else ""
    return [
        f"{len(page.nodes):,} nodes shown of {scope.num_total:,}: they stand for {scope.about}{stood:,}, which are "
        "all operators (in the rank classes) and all communications (by stage and axis); parameters are counted in "
        "elements. "
        f"{len(page.cells):,} GPUs are drawn, all of them.{read}{missing}",
        f"Folded: what ran in a class and over an axis. Axes: {axes or 'none was told'}. Bytes are those that all GPUs "
        "send; times are means of a participant, transfer from the last one's arrival and the wait for it. A stage's "
        "heading leads to all of its layers.",
    ]


def _draw_stages(dot: Dot, scope: Scope, page: WorldPage, ways: Mapping[int, str], name: str) -> None:
    for stage, place in page.stages.items():
        cells = [one.rank for one in page.cells if one.rank in scope.places]
        inside = [f"gpu{rank}" for rank in cells if scope.coordinate(rank, "pp") == stage]
        inside += [one.name for one in page.nodes if one.stage == stage and place.top < one.place.y < place.bottom]
        frame_stage(dot, stage, place, inside)
        ranks = [rank for rank in sorted(scope.places) if scope.coordinate(rank, "pp") == stage]
        words = f"{'All ranks' if stage < 0 else f'Stage {stage}'} · {write_gpus(ranks)}"
        words += f" · {len(ranks):,} in all" if len(ranks) > 1 else ""
        link = {"URL": find_way(name, ways[stage]), "tooltip": "to all layers of the stage"} if stage in ways else {}
        dot.words(f"head {stage}", (place.left + 12, place.top + 18), words, size=18, bold=True, align="l", **link)


def _draw_lines(dot: Dot, world: World, page: WorldPage) -> None:
    places = {one.name: one.place for one in page.nodes}
    merging = [places[f"traffic{i}"] for i, talk in enumerate(world.traffic) if is_below(world, talk)]
    for i, talk in enumerate(world.traffic):
        there = places[f"traffic{i}"]
        for first in talk.classes:
            here = places[f"class{first}"]
            ends = ((here.x, here.bottom), (there.x, there.top))
            if is_below(world, talk):
                dot.hidden(f"class{first}", f"traffic{i}")
            elif talk.kind != "recv":
                dot.line(f"class{first}", f"traffic{i}", ends, color=_PALE, penwidth=0.8, dir="none")
            else:
                dot.line(f"traffic{i}", f"class{first}", (ends[1], ends[0]), color=_PALE, penwidth=0.8, dir="none")
        if is_below(world, talk) and "merged" in places:
            goal = places["merged"]
            bus = goal.top - 14.0
            lead: tuple[tuple[float, float], ...] = ((there.x, there.bottom), (there.x, bus))
            if any(other.x == there.x and there.bottom < other.top < bus for other in merging):
                beside = there.right + 7.0  # past the row below
                lead = ((there.right, there.y), (beside, there.y), (beside, bus))
            dot.line(f"traffic{i}", "merged", (*lead, (goal.x, bus), (goal.x, goal.top)), color=DARK)
    for i, part in enumerate(world.parts):
        a, b = places["batch"], places[f"part{i}"]
        above = b.top - 6.0
        way: tuple[tuple[float, float], ...] = (
            ((a.right - 9, b.y), (b.left + 6, b.y))
            if i == 0
            else ((a.right - 8, a.y - 8), (a.right + 14, a.y - 8), (a.right + 14, above), (b.x, above), (b.x, b.top))
        )
        dot.line("batch", f"part{i}", way, color=DARK, num_sequences=part.num_sequences)
        for one in world.classes:
            if set(one.ranks) & set(part.ranks):
                dot.hidden(f"part{i}", f"class{one.first}")
    _draw_batch(dot, world, page, places)
    _draw_transfers(dot, world, places, page)


def _draw_batch(dot: Dot, world: World, page: WorldPage, places: Mapping[str, Rectangle]) -> None:
    """Draw the batch's parts into the first stage, and what comes out of the last."""
    if not world.parts:
        return
    stage = page.stages[min(page.stages)]
    x, bus = places["batch"].x, max(places[f"part{i}"].bottom for i in range(len(world.parts))) + 14.0
    dot.node("into", Rectangle(x, stage.top, 1.0, 1.0), (), shape="point", style="invis")
    for i in range(len(world.parts)):
        part = places[f"part{i}"]
        way = ((part.x, part.bottom), (part.x, bus), (x, bus), (x, stage.top))
        dot.line(f"part{i}", "into", way, color=DARK, penwidth=1.4)
    if not any(is_below(world, one) for one in world.traffic):
        last, goal = page.stages[max(page.stages)], places["merged"]
        dot.node("out", Rectangle(last.x, last.bottom, 1.0, 1.0), (), shape="point", style="invis")
        down = ((last.x, last.bottom), (last.x, goal.y), (goal.right, goal.y))
        dot.line("out", "merged", down, color=DARK, penwidth=1.4)


def _draw_transfers(dot: Dot, world: World, places: Mapping[str, Rectangle], page: WorldPage) -> None:
    """Draw messages below the groups; to another band down or up beside the stage's frame."""
    taken: dict[int, set[int]] = {}
    for (i, k), (num, size) in world.ties.items():
        a, b = places[f"traffic{i}"], places[f"traffic{k}"]
        src, dst = world.traffic[i].stage, world.traffic[k].stage
        passed = [stage for stage in page.stages if min(src, dst) <= stage <= max(src, dst)]
        used = set().union(*(taken.get(stage, set()) for stage in passed))
        lane = next(lane for lane in range(len(used) + 1) if lane not in used)
        for stage in passed:
            taken.setdefault(stage, set()).add(lane)
        shift = 3.5 * (lane % _NUM_LANES)
        low, goal = page.buses[src] + shift, page.buses[dst] + shift
        way: tuple[tuple[float, float], ...] = ((a.x, a.bottom), (a.x, low), (b.x, low), (b.x, b.bottom))
        if page.buses[src] != page.buses[dst]:
            side, gap = page.stages[src].right + 4.0 + shift, page.stages[min(src, dst)].bottom + 10.0 + shift
            near = page.stages[dst].right + 4.0 + shift
            way = (
                (a.x, a.bottom),
                (a.x, low),
                (side, low),
                (side, gap),
                (near, gap),
                (near, goal),
                (b.x, goal),
                (b.x, b.bottom),
            )
        dot.line(
            f"traffic{i}",
            f"traffic{k}",
            way,
            color=stage_colour(src),
            style="dashed",
            penwidth=2.0,
            kind="p2p",
            num_edges=num,
            bytes=size,
            tooltip=f"{captions.count(num, 'message')}, {write_bytes(size)}",
        )
