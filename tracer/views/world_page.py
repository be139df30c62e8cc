"""Where the world stands on its page: the batch, the stages with their classes, groups and GPUs, and what merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from truedag.tracer.analysis.quantities import write_bytes, write_runs, write_time
from truedag.tracer.views import captions
from truedag.tracer.views.colours import group_tint, stage_colour
from truedag.tracer.views.experts import ExpertMap
from truedag.tracer.views.fitting import fit_text
from truedag.tracer.views.gpus import write_gpus
from truedag.tracer.views.layout import Rectangle
from truedag.tracer.views.scope import Scope
from truedag.tracer.views.world import BatchPart, RankClass, Traffic, World

_BOX, _GAP, _PAD, MARGIN = 172.0, 14.0, 16.0, 12.0
_CELL_W, _CELL_H, _ROW_HEAD = 27.0, 13.0, 108.0
_STAGE_GAP, _STAGE_HEAD = 44.0, 34.0
_MAX_WIDTH = 3400.0
_BLOCK_GAP = 8.0
_BUS = 38.0  # room for messages below the groups


@dataclass(slots=True)
class WorldNode:
    """A box: its lines of text, of which the first `num_bold` are the title, and how many nodes it stands for."""

    name: str
    shape: str
    text: list[str]
    num_bold: int
    stage: int
    place: Rectangle
    stands_for: int
    ranks: tuple[int, ...]


@dataclass(slots=True)
class Cell:
    """One GPU on the map."""

    rank: int
    place: Rectangle
    fill: str


@dataclass(slots=True)
class WorldPage:
    """Where all stands, in points, y downwards.

    Attributes:
        nodes: the boxes.
        cells: the GPUs.
        words: text alone: its left end, the text, its size, whether it is bold.
        stages: the frame of each stage.
        buses: for each stage how high messages run below its groups.
        width: of all.
        height: of all.
    """

    nodes: list[WorldNode] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    words: list[tuple[Rectangle, str, float, bool]] = field(default_factory=list)
    stages: dict[int, Rectangle] = field(default_factory=dict)
    buses: dict[int, float] = field(default_factory=dict)
    width: float = 0.0
    height: float = 0.0


def lay_out_world(scope: Scope, world: World, experts: ExpertMap) -> WorldPage:
    """Place the batch, the stages, and what merges, below each other."""
    page = WorldPage()
    stages = sorted({one.stage for one in world.classes})
    widths = {stage: max(_grid_width(scope, stage), _num_beside(world, stage) * (_BOX + _GAP)) for stage in stages}
    y = _lay_split(page, scope, world)
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
    return [i for i, one in enumerate(world.traffic) if one.stage == stage and not is_below(world, one)]


def is_below(world: World, one: Traffic) -> bool:
    """Whether a communication stands below the stages: it merges what the parts gave, or goes across stages."""
    return one.is_merge or (one.stage < 0 and any(other.stage >= 0 for other in world.classes))


def _lay_row(page: WorldPage, nodes: Sequence[WorldNode], left: float, top: float, width: float) -> float:
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
) -> WorldNode:
    fitted = fit_text(text, shape, _BOX)
    place = Rectangle(0.0, 0.0, _BOX, fitted.height)
    return WorldNode(
        name=name,
        shape=shape,
        text=fitted.lines,
        num_bold=fitted.num_title,
        stage=stage,
        place=place,
        stands_for=stands_for,
        ranks=ranks,
    )


def _lay_split(page: WorldPage, scope: Scope, world: World) -> float:
    if not world.parts:
        return 0.0
    page.words.append((Rectangle(_PAD, 8.0, 0.0, 0.0), "The batch is split", 14.0, True))
    each = f"{world.num_microbatches} microbatch{'' if world.num_microbatches == 1 else 'es'} on each GPU"
    batch = _node(
        "batch",
        "parallelogram",
        ["batch", _describe_tokens(scope, world.num_sequences, world.num_tokens), each],
        -1,
    )
    bottom = _lay_row(page, [batch], _PAD, 22.0, _BOX)
    parts = [
        _node(f"part{i}", "parallelogram", _describe_part(scope, part), -1, ranks=part.ranks)
        for i, part in enumerate(world.parts)
    ]
    low = _lay_row(page, parts, _PAD + _BOX + 60.0, 22.0, 8 * (_BOX + _GAP))
    return max(bottom, low) + _STAGE_GAP


def _describe_tokens(scope: Scope, num_sequences: int, num_tokens: int) -> str:
    cut = f" on each of {scope.size('cp')} places on cp" if scope.size("cp") > 1 else ""
    return f"{captions.count(num_sequences, 'sequence')}, {num_tokens:,} tokens{cut}"


def _describe_part(scope: Scope, part: BatchPart) -> list[str]:
    split = f"over {part.num_places:,} places on dp" if part.num_places > 1 else ""
    return [
        f"part {part.place} ({part.axis} {part.place})",
        _describe_tokens(scope, part.num_sequences, part.num_tokens),
        split,
        write_gpus(part.ranks),
    ]


def _lay_groups(
    page: WorldPage, scope: Scope, world: World, stage: int, left: float, top: float, width: float
) -> float:
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
        f"each {scope.about}{' to '.join(f'{num:,}' for num in dict.fromkeys(one.num_operators))} operators, "
        f"{one.num_communications:,} communications",
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


def _lay_grid(page: WorldPage, scope: Scope, experts: ExpertMap, stage: int, left: float, top: float) -> float:
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
                page.cells.append(Cell(rank, Rectangle(x + _CELL_W / 2, y + _CELL_H / 2, _CELL_W, _CELL_H), fill))
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


def _lay_merge(page: WorldPage, world: World, top: float) -> float:
    merging = [i for i, one in enumerate(world.traffic) if is_below(world, one)]
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
    if not world.parts:
        return bottom + MARGIN
    merged = [_node("merged", "parallelogram", _describe_merged(world), -1)]
    return _lay_row(page, merged, _PAD, bottom + 34.0, _BOX) + MARGIN


def _describe_merged(world: World) -> list[str]:
    sequences = captions.count(world.num_sequences, "sequence")
    if world.num_decode_steps:
        return ["tokens", f"{sequences}, {captions.count(world.num_decode_steps, 'decode step')} after prefill"]
    if not world.has_backward:
        return ["one step", f"{sequences}, no backward pass was told"]
    merged = ", merged" if any(one.is_merge for one in world.traffic) else ""
    return ["one step", f"gradients of {sequences}{merged}"]


def _describe_merge(one: Traffic) -> list[str]:
    title, *rest = _describe_traffic(one)
    return [title + (f", stage {one.stage}" if one.stage >= 0 else ", across stages"), *rest]
