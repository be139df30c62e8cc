"""Draw the world: every GPU in its stage, the groups they are in and what these move, the batch's way in and out.

Top to bottom: the batch and how it is split; the stages with their rank classes, their communications by axis and a map
of their GPUs; what merges the parts of the batch again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from truedag.tracer.analysis.quantities import write_bytes, write_runs, write_time
from truedag.tracer.views import captions
from truedag.tracer.views.colours import SHARES, group_tint, stage_colour, tint
from truedag.tracer.views.dot import Dot
from truedag.tracer.views.experts import ExpertMap
from truedag.tracer.views.fitting import fit_text
from truedag.tracer.views.gpus import write_gpus
from truedag.tracer.views.layout import Rectangle
from truedag.tracer.views.scope import Scope
from truedag.tracer.views.sheet import GREY, Link, Sheet, Sign, draw_head, find_way, plan_head
from truedag.tracer.views.world import BatchPart, RankClass, Traffic, World

_BOX, _GAP, _PAD, _MARGIN = 172.0, 14.0, 16.0, 12.0
_CELL_W, _CELL_H, _ROW_HEAD = 27.0, 13.0, 108.0
_STAGE_GAP, _STAGE_HEAD = 44.0, 34.0
_MAX_WIDTH = 3400.0
_BLOCK_GAP = 8.0
_BUS = 38.0  # room for messages below the groups
_DARK, _LIGHT = "#3a3a3a", "#b4b4b4"
_PLAIN: dict[str, Any] = {"regular": "false", "distortion": "0", "skew": "0"}
_SIGNS = (
    Sign(words="a rank class: GPUs that run the same program", shape="box", fill=tint(GREY, SHARES["box"])),
    Sign(words="communication over an axis, or messages", shape="ellipse", fill=tint(GREY, SHARES["ellipse"])),
    Sign(words="split and merge of the batch", shape="parallelogram", fill=tint(GREY, SHARES["parallelogram"])),
    Sign(words="one GPU, in the shade of its row", shape="box", width=16, fill=tint(GREY, 0.3)),
    Sign(words="data", colour=_DARK),
    Sign(words="takes part in", colour=_LIGHT, arrow="none"),
    Sign(words="stage transfer", style="dashed", pen=2.0),
)


@dataclass(slots=True)
class _Node:
    name: str
    shape: str
    text: list[str]
    num_bold: int
    stage: int
    place: Rectangle
    stands_for: int
    ranks: tuple[int, ...]


@dataclass(slots=True)
class _Cell:
    rank: int
    place: Rectangle
    fill: str


@dataclass(slots=True)
class _Page:
    nodes: list[_Node] = field(default_factory=list)
    cells: list[_Cell] = field(default_factory=list)
    words: list[tuple[Rectangle, str, float, bool]] = field(default_factory=list)
    stages: dict[int, Rectangle] = field(default_factory=dict)
    buses: dict[int, float] = field(default_factory=dict)
    width: float = 0.0
    height: float = 0.0


def draw_world(
    scope: Scope, world: World, experts: ExpertMap, *, name: str, ways: Mapping[int, str], links: Sequence[Link]
) -> Sheet:
    """Draw it; `ways` has for a stage the sheet of all its layers."""
    page = _lay_out(scope, world, experts)
    title = f"{scope.name} · {len(scope.places):,} GPUs, every one"
    stood = sum(one.stands_for for one in page.nodes)
    width = max(page.width, 900.0)
    head = plan_head(title, _tell(scope, page, stood), _SIGNS, width=width, links=links)
    for place in [
        *(one.place for one in page.nodes),
        *(one.place for one in page.cells),
        *(one[0] for one in page.words),
        *page.stages.values(),
    ]:
        place.y += head.height
    page.buses = {stage: y + head.height for stage, y in page.buses.items()}
    dot = Dot(name=title, width=width + _MARGIN, height=page.height + head.height + _MARGIN)
    _draw_stages(dot, scope, page, ways, name)
    draw_head(dot, head, sheet=name)
    for i, (place, text, size, bold) in enumerate(page.words):
        dot.words(f"words {i}", (place.x, place.y), text, size=size, bold=bold, align="l")
    for cell in page.cells:
        told = ", ".join(f"{axis} {scope.coordinate(cell.rank, axis)}" for axis in scope.axes)
        dot.node(
            f"gpu{cell.rank}",
            cell.place,
            (str(cell.rank),),
            num_bold=0,
            shape="box",
            fillcolor=cell.fill,
            color="#ffffff",
            fontsize="7.5",
            tooltip=f"GPU {cell.rank}: {told}",
            ranks=cell.rank,
            penwidth=0.6,
        )
    for one in page.nodes:
        colour = stage_colour(one.stage)
        dot.node(
            one.name,
            one.place,
            one.text,
            num_bold=one.num_bold,
            shape=one.shape,
            color=colour,
            fillcolor=tint(colour, SHARES[one.shape]),
            stands_for=one.stands_for,
            ranks=write_runs(one.ranks),
            **(_PLAIN if one.shape == "parallelogram" else {}),
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


def _tell(scope: Scope, page: _Page, stood: int) -> list[str]:
    axes = ", ".join(f"{axis} {scope.size(axis)}" for axis in scope.axes)
    read = (
        f" One GPU of each of the {len(scope.members):,} rank classes was read; the others of it run the same program."
        if scope.is_folded
        else ""
    )
    return [
        f"{len(page.nodes):,} nodes shown of {scope.num_total:,}: they stand for {stood:,}, which are all operators "
        "(in the rank classes) and all communications (by stage and axis); parameters are counted in elements. "
        f"{len(page.cells):,} GPUs are drawn, all of them.{read}",
        f"Folded: what ran in a class and over an axis. Axes: {axes or 'none was told'}. Bytes are those that all GPUs "
        "send; times are means of a participant, transfer from the last one's arrival and the wait for it. A stage's "
        "heading leads to all of its layers.",
    ]


def _lay_out(scope: Scope, world: World, experts: ExpertMap) -> _Page:
    page = _Page()
    stages = sorted({one.stage for one in world.classes})
    widths = {stage: max(_grid_width(scope, stage), _num_beside(world, stage) * (_BOX + _GAP)) for stage in stages}
    y = _lay_split(page, world)
    below = y
    for band in _bands(stages, widths):
        lefts, x = {}, _PAD
        for stage in band:
            lefts[stage] = x
            x += widths[stage] + 2 * _PAD + _STAGE_GAP
        low = max(_lay_groups(page, scope, world, stage, lefts[stage] + _PAD, y, widths[stage]) for stage in band)
        below = max(_lay_grid(page, scope, experts, stage, lefts[stage] + _PAD, low + _BUS) for stage in band) + _PAD
        for stage in band:
            wide = widths[stage] + 2 * _PAD
            page.stages[stage] = Rectangle(lefts[stage] + wide / 2, (y + below) / 2, wide, below - y)
            page.buses[stage] = low + 6.0
        y = below + _STAGE_GAP
    page.width = max(place.right for place in page.stages.values())
    page.height = _lay_merge(page, world, below + _STAGE_GAP)
    page.width = max(page.width, *(one.place.right for one in page.nodes))
    return page


def _bands(stages: Sequence[int], widths: Mapping[int, float]) -> list[list[int]]:
    """Spread the stages over rows that are about alike and not too wide."""
    wide = sum(widths[stage] + 2 * _PAD + _STAGE_GAP for stage in stages)
    size = -(-len(stages) // -(-int(wide) // int(_MAX_WIDTH)))
    return [list(stages[i : i + size]) for i in range(0, len(stages), size)]


def _num_beside(world: World, stage: int) -> int:
    most = max(sum(one.stage == stage for one in world.classes), len(_inner_traffic(world, stage)))
    return max(3, min(most, 6))


def _inner_traffic(world: World, stage: int) -> list[int]:
    return [i for i, one in enumerate(world.traffic) if one.stage == stage and not one.is_merge]


def _lay_row(page: _Page, nodes: Sequence[_Node], left: float, top: float, width: float) -> float:
    """Place nodes side by side, as many rows as it needs; return where the last ends."""
    x, y, tall = left, top, 0.0
    for one in nodes:
        if x > left and x + _BOX > left + width + 1.0:
            x, y, tall = left, y + tall + _GAP, 0.0
        one.place.x, one.place.y = x + _BOX / 2, y + one.place.height / 2
        x, tall = x + _BOX + _GAP, max(tall, one.place.height)
        page.nodes.append(one)
    return y + tall


def _node(
    name: str, shape: str, text: Sequence[str], stage: int, stands_for: int = 0, ranks: tuple[int, ...] = ()
) -> _Node:
    fitted = fit_text(text, shape, _BOX)
    place = Rectangle(0.0, 0.0, _BOX, fitted.height)
    return _Node(
        name=name,
        shape=shape,
        text=fitted.lines,
        num_bold=fitted.num_title,
        stage=stage,
        place=place,
        stands_for=stands_for,
        ranks=ranks,
    )


def _lay_split(page: _Page, world: World) -> float:
    if not world.parts:
        return 0.0
    page.words.append((Rectangle(_PAD, 8.0, 0.0, 0.0), "The batch is split", 14.0, True))
    each = f"{world.num_microbatches} microbatch{'' if world.num_microbatches == 1 else 'es'} on each GPU"
    batch = _node(
        "batch",
        "parallelogram",
        ["batch", f"{captions.count(world.num_sequences, 'sequence')}, {world.num_tokens:,} tokens", each],
        -1,
    )
    bottom = _lay_row(page, [batch], _PAD, 22.0, _BOX)
    parts = [
        _node(f"part{i}", "parallelogram", _describe_part(part), -1, ranks=part.ranks)
        for i, part in enumerate(world.parts)
    ]
    low = _lay_row(page, parts, _PAD + _BOX + 60.0, 22.0, 8 * (_BOX + _GAP))
    return max(bottom, low) + _STAGE_GAP


def _describe_part(part: BatchPart) -> list[str]:
    split = f"over {part.num_places:,} places on dp" if part.num_places > 1 else ""
    return [
        f"part {part.place} ({part.axis} {part.place})",
        f"{captions.count(part.num_sequences, 'sequence')}, {part.num_tokens:,} tokens",
        split,
        write_gpus(part.ranks),
    ]


def _lay_groups(page: _Page, scope: Scope, world: World, stage: int, left: float, top: float, width: float) -> float:
    """Place a stage's rank classes, and below them what they talk over; return where these end."""
    classes = [
        _node(f"class{one.first}", "box", _describe_class(scope, one), stage, one.num_nodes, one.ranks)
        for one in world.classes
        if one.stage == stage
    ]
    y = _lay_row(page, classes, left, top + _STAGE_HEAD + 6, width) + 30.0
    talks = [
        _node(
            f"traffic{i}", "ellipse", _describe_traffic(world.traffic[i]), stage, sum(world.traffic[i].calls.values())
        )
        for i in _inner_traffic(world, stage)
    ]
    return _lay_row(page, talks, left, y, width)


def _describe_class(scope: Scope, one: RankClass) -> list[str]:
    noun = "GPU" if len(one.ranks) == 1 else "GPUs"
    spans = []
    for axis in scope.axes:
        places = {scope.coordinate(rank, axis) for rank in one.ranks}
        spans.append(f"{axis} {write_runs(places)}")
    return [
        f"class of GPU {one.first}: {len(one.ranks):,} {noun}",
        write_gpus(one.ranks),
        ", ".join(spans),
        f"each {one.num_operators:,} operators, {one.num_communications:,} communications",
        f"each {one.num_parameters / 1e6:,.2f} M parameters",
        "not timed" if one.busy_ns is None else f"{write_time(one.busy_ns)} in operators, mean of a GPU",
    ]


def _describe_traffic(one: Traffic) -> list[str]:
    if one.kind != "collective":
        labels = ", ".join(one.calls)
        title = f"{labels}: {one.phase}" if one.phase else labels
        calls = [captions.count(sum(one.calls.values()), "message")]
    else:
        title = f"over {one.axis}" if one.axis else "over a group of no told axis"
        groups = "{" + write_gpus(one.first).partition(" ")[2] + "}"
        sizes = " or ".join(map(str, one.sizes))
        more = (
            f"{one.num_groups:,} groups of {sizes}, the first {groups}" if one.num_groups > 1 else f"one group {groups}"
        )
        calls = [more, ", ".join(f"{label.rpartition(' ')[0] or label} x {num:,}" for label, num in one.calls.items())]
    into, out = one.shapes
    return [
        title,
        *calls,
        f"{into} → {out}" if into or out else "",
        write_bytes(one.num_bytes),
        "not timed" if one.transfer_ns is None else f"{write_time(one.transfer_ns)}, wait {write_time(one.wait_ns)}",
    ]


def _row_axis(scope: Scope) -> str:
    return next((axis for axis in ("ep", "dp", "tp") if scope.size(axis) > 1), "")


def _rows(scope: Scope, stage: int) -> dict[int, list[list[int]]]:
    """Return for each place on the rows' axis its ranks, in blocks that share all but the tensor-parallel axes."""
    axis = _row_axis(scope)
    rows: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for rank in sorted(scope.places):
        if scope.coordinate(rank, "pp") == stage:
            block = tuple(scope.coordinate(rank, one) for one in ("edp", "cp"))
            row = scope.coordinate(rank, axis) if axis else 0
            rows.setdefault(row, {}).setdefault(block, []).append(rank)
    return {row: list(blocks.values()) for row, blocks in sorted(rows.items())}


def _grid_width(scope: Scope, stage: int) -> float:
    rows = _rows(scope, stage).values()
    return _ROW_HEAD + max(
        sum(len(block) for block in blocks) * _CELL_W + (len(blocks) - 1) * _BLOCK_GAP for blocks in rows
    )


def _lay_grid(page: _Page, scope: Scope, experts: ExpertMap, stage: int, left: float, top: float) -> float:
    axis = _row_axis(scope)
    rows = _rows(scope, stage)
    blocks_of = [tuple(rank for block in blocks for rank in block) for blocks in rows.values()]
    num_blocks = max(len(blocks) for blocks in rows.values())
    note = f"GPUs: a row is a place on {axis}" if axis else "GPUs"
    note += f"; {num_blocks} blocks are the places on edp" if num_blocks > 1 else ""
    page.words.append((Rectangle(left, top, 0.0, 0.0), note, 9.0, True))
    y = top + 12.0
    for i, (row, blocks) in enumerate(rows.items()):
        held = experts.held.get(blocks[0][0], {})
        text = f"{axis} {row}" if axis else ""
        if held:
            text += f": {_describe_experts(held)}"
        page.words.append((Rectangle(left, y + _CELL_H / 2, 0.0, 0.0), text, 7.5, False))
        x = left + _ROW_HEAD
        fill = group_tint(stage_colour(stage), blocks_of[i], blocks_of)
        for block in blocks:
            for rank in block:
                page.cells.append(_Cell(rank, Rectangle(x + _CELL_W / 2, y + _CELL_H / 2, _CELL_W, _CELL_H), fill))
                x += _CELL_W
            x += _BLOCK_GAP
        y += _CELL_H
    return y


def _describe_experts(held: Mapping[int, tuple[int, ...]]) -> str:
    kinds = set(held.values())
    if len(kinds) > 1:
        return "experts differ by layer"
    (one,) = kinds
    return f"expert{'' if len(one) == 1 else 's'} {write_runs(one)}"


def _lay_merge(page: _Page, world: World, top: float) -> float:
    merging = [i for i, one in enumerate(world.traffic) if one.is_merge or one.stage < 0]
    talks = [
        _node(
            f"traffic{i}",
            "ellipse",
            _describe_merge(world.traffic[i]),
            world.traffic[i].stage,
            sum(world.traffic[i].calls.values()),
        )
        for i in merging
    ]
    if not talks and not world.parts:
        return top - _STAGE_GAP
    page.words.append(
        (Rectangle(_PAD, top, 0.0, 0.0), "What the parts gave is merged, and what goes across stages", 14.0, True)
    )
    bottom = _lay_row(page, talks, _PAD, top + 16.0, max(page.width - 2 * _PAD, _BOX)) if talks else top
    said = (
        [
            "tokens",
            f"{captions.count(world.num_sequences, 'sequence')}, {world.num_decode_steps} decode steps after prefill",
        ]
        if world.num_decode_steps
        else ["one step", f"gradients of {captions.count(world.num_sequences, 'sequence')}, merged"]
    )
    if not world.parts:
        return bottom + _MARGIN
    return _lay_row(page, [_node("merged", "parallelogram", said, -1)], _PAD, bottom + 34.0, _BOX) + _MARGIN


def _describe_merge(one: Traffic) -> list[str]:
    title, *rest = _describe_traffic(one)
    return [title + (f", stage {one.stage}" if one.stage >= 0 else ", across stages"), *rest]


def _draw_stages(dot: Dot, scope: Scope, page: _Page, ways: Mapping[int, str], name: str) -> None:
    for stage, place in page.stages.items():
        colour = stage_colour(stage)
        inside = [f"gpu{one.rank}" for one in page.cells if scope.coordinate(one.rank, "pp") == stage]
        inside += [one.name for one in page.nodes if one.stage == stage and place.top < one.place.y < place.bottom]
        dot.box(
            f"stage {stage}",
            place,
            inside,
            style="filled,rounded",
            fillcolor=tint(colour, 0.05),
            color=colour,
            penwidth=1.6,
        )
        ranks = [rank for rank in sorted(scope.places) if scope.coordinate(rank, "pp") == stage]
        words = f"{'All ranks' if stage < 0 else f'Stage {stage}'} · {write_gpus(ranks)}"
        words += f" · {len(ranks):,} in all" if len(ranks) > 1 else ""
        link = {"URL": find_way(name, ways[stage]), "tooltip": "to all layers of the stage"} if stage in ways else {}
        dot.words(f"head {stage}", (place.left + 12, place.top + 18), words, size=18, bold=True, align="l", **link)


def _draw_lines(dot: Dot, world: World, page: _Page) -> None:
    places = {one.name: one.place for one in page.nodes}
    for i, talk in enumerate(world.traffic):
        there = places[f"traffic{i}"]
        for first in talk.classes:
            here = places[f"class{first}"]
            ends = ((here.x, here.bottom), (there.x, there.top))
            if talk.is_merge or talk.stage < 0:
                dot.hidden(f"class{first}", f"traffic{i}")
            elif talk.kind != "recv":
                dot.line(f"class{first}", f"traffic{i}", ends, color=_LIGHT, penwidth=0.8, dir="none")
            else:
                dot.line(f"traffic{i}", f"class{first}", (ends[1], ends[0]), color=_LIGHT, penwidth=0.8, dir="none")
        if (talk.is_merge or talk.stage < 0) and "merged" in places:
            goal = places["merged"]
            dot.line(
                f"traffic{i}",
                "merged",
                ((there.x, there.bottom), (there.x, goal.top - 14.0), (goal.x, goal.top - 14.0), (goal.x, goal.top)),
                color=_DARK,
            )
    for i, part in enumerate(world.parts):
        a, b = places["batch"], places[f"part{i}"]
        above = b.top - 6.0
        way: tuple[tuple[float, float], ...] = (
            ((a.right - 9, b.y), (b.left + 6, b.y))
            if i == 0
            else ((a.right - 8, a.y - 8), (a.right + 14, a.y - 8), (a.right + 14, above), (b.x, above), (b.x, b.top))
        )
        dot.line("batch", f"part{i}", way, color=_DARK, num_sequences=part.num_sequences)
        for one in world.classes:
            if set(one.ranks) & set(part.ranks):
                dot.hidden(f"part{i}", f"class{one.first}")
    _draw_batch(dot, world, page, places)
    _draw_transfers(dot, world, places, page)


def _draw_batch(dot: Dot, world: World, page: _Page, places: Mapping[str, Rectangle]) -> None:
    """Draw the batch's parts into the first stage, and what comes out of the last."""
    if not world.parts:
        return
    stage = page.stages[min(page.stages)]
    x, bus = places["batch"].x, max(places[f"part{i}"].bottom for i in range(len(world.parts))) + 14.0
    dot.node("into", Rectangle(x, stage.top, 1.0, 1.0), (), shape="point", style="invis")
    for i in range(len(world.parts)):
        part = places[f"part{i}"]
        way = ((part.x, part.bottom), (part.x, bus), (x, bus), (x, stage.top))
        dot.line(f"part{i}", "into", way, color=_DARK, penwidth=1.4)
    if not any(one.is_merge or one.stage < 0 for one in world.traffic):
        last, goal = page.stages[max(page.stages)], places["merged"]
        dot.node("out", Rectangle(last.x, last.bottom, 1.0, 1.0), (), shape="point", style="invis")
        down = ((last.x, last.bottom), (last.x, goal.y), (goal.right, goal.y))
        dot.line("out", "merged", down, color=_DARK, penwidth=1.4)


def _draw_transfers(dot: Dot, world: World, places: Mapping[str, Rectangle], page: _Page) -> None:
    """Draw messages below the groups; to another band down or up beside the stage's frame."""
    for lane, ((i, k), (num, size)) in enumerate(world.ties.items()):
        a, b, shift = places[f"traffic{i}"], places[f"traffic{k}"], 3.5 * (lane % 6)
        src, dst = world.traffic[i].stage, world.traffic[k].stage
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
