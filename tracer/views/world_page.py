"""Where the world stands on its page: the batch, the stages with their classes, groups and GPUs, and what merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.views.colours import group_tint, stage_colour
from truedag.tracer.views.experts import ExpertMap
from truedag.tracer.views.faults import Fault, write_faults
from truedag.tracer.views.fitting import fit_text
from truedag.tracer.views.gpus import write_gpus
from truedag.tracer.views.layout import Rectangle
from truedag.tracer.views.packing import paper_side
from truedag.tracer.views.scope import Scope
from truedag.tracer.views.world import Traffic, World
from truedag.tracer.views.world_text import (
    describe_class,
    describe_experts,
    describe_merge,
    describe_merged,
    describe_part,
    describe_tokens,
    describe_traffic,
)

_BOX, _GAP, _PAD, MARGIN = 172.0, 14.0, 16.0, 12.0
_CELL_W, _CELL_H, _ROW_HEAD = 27.0, 13.0, 108.0
_STAGE_GAP, _STAGE_HEAD = 44.0, 34.0
_BLOCK_GAP = 8.0
_PART_GAP = 22.0
_MIN_ROWS = 8  # of a part of the map
_BUS = 38.0  # room for messages below the groups


@dataclass(slots=True)
class WorldNode:
    """A box: its lines of text, of which the first `num_bold` are the title, and how many nodes it stands for.

    `faults` are what an audit found in it.
    """

    name: str
    shape: str
    text: list[str]
    num_bold: int
    stage: int
    place: Rectangle
    stands_for: int
    ranks: tuple[int, ...]
    faults: tuple[Fault, ...]


@dataclass(slots=True)
class Cell:
    """One GPU on the map, and what an audit found of it."""

    rank: int
    place: Rectangle
    fill: str
    faults: tuple[Fault, ...]


@dataclass(slots=True)
class WorldPage:
    """Where all stands, in points, y downwards.

    Attributes:
        nodes: the boxes.
        cells: the GPUs.
        words: text alone: its left end, the text, its size, whether it is bold.
        stages: the frame of each stage.
        buses: for each stage how high messages run below its groups.
        faults: what an audit found of GPUs.
        width: of all.
        height: of all.
    """

    nodes: list[WorldNode] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    words: list[tuple[Rectangle, str, float, bool]] = field(default_factory=list)
    stages: dict[int, Rectangle] = field(default_factory=dict)
    buses: dict[int, float] = field(default_factory=dict)
    faults: Mapping[int, Sequence[Fault]] = field(default_factory=dict)
    width: float = 0.0
    height: float = 0.0


def lay_out_world(scope: Scope, world: World, experts: ExpertMap) -> WorldPage:
    """Place the batch, the stages, and what merges, below each other; stages in as many rows as fill a sheet best."""
    stages = sorted({one.stage for one in world.classes})
    width = max(max(_grid_width(scope, stage), _num_beside(world, stage) * (_BOX + _GAP)) for stage in stages)
    sizes = sorted({-(-len(stages) // rows) for rows in range(1, len(stages) + 1)})
    pages = [
        _lay_bands(scope, world, experts, [stages[i : i + size] for i in range(0, len(stages), size)], width)
        for size in sizes
    ]
    return min(pages, key=lambda page: paper_side(page.width, page.height))


def _lay_bands(
    scope: Scope, world: World, experts: ExpertMap, bands: Sequence[Sequence[int]], width: float
) -> WorldPage:
    page = WorldPage(faults=scope.faults.on_ranks({*scope.places, *world.missing}))
    y = _lay_split(page, scope, world)
    below = y
    for band in bands:
        lefts, x = {}, _PAD
        for stage in band:
            lefts[stage] = x
            x += width + 2 * _PAD + _STAGE_GAP
        low = max(_lay_groups(page, scope, world, stage, lefts[stage] + _PAD, y, width) for stage in band)
        ends = [
            _lay_grid(page, scope, world, experts, stage, (lefts[stage] + _PAD, low + _BUS), width) for stage in band
        ]
        below = max(ends) + _PAD
        for stage in band:
            wide = width + 2 * _PAD
            page.stages[stage] = Rectangle(lefts[stage] + wide / 2, (y + below) / 2, wide, below - y)
            page.buses[stage] = low + 6.0
        y = below + _STAGE_GAP
    page.width = max(place.right for place in page.stages.values())
    below = _lay_missing(page, world, below)
    page.height = _lay_merge(page, world, below + _STAGE_GAP)
    page.width = max(page.width, *(one.place.right for one in page.nodes))
    return page


def _num_beside(world: World, stage: int) -> int:
    most = max(sum(one.stage == stage for one in world.classes), len(_inner_traffic(world, stage)))
    return max(3, min(most, 8))


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
    name: str,
    shape: str,
    text: Sequence[str],
    stage: int,
    stands_for: int = 0,
    ranks: tuple[int, ...] = (),
    faults: Sequence[Fault] = (),
) -> WorldNode:
    fitted = fit_text([*text, *write_faults(faults)], shape, _BOX)
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
        faults=tuple(faults),
    )


def _lay_split(page: WorldPage, scope: Scope, world: World) -> float:
    if not world.parts:
        return 0.0
    page.words.append((Rectangle(_PAD, 8.0, 0.0, 0.0), "The batch is split", 14.0, True))
    each = f"{world.num_microbatches} microbatch{'' if world.num_microbatches == 1 else 'es'} on each GPU"
    batch = _node(
        "batch",
        "parallelogram",
        ["batch", describe_tokens(scope, world.num_sequences, world.num_tokens), each],
        -1,
    )
    bottom = _lay_row(page, [batch], _PAD, 22.0, _BOX)
    parts = [
        _node(f"part{i}", "parallelogram", describe_part(scope, part), -1, ranks=part.ranks)
        for i, part in enumerate(world.parts)
    ]
    low = _lay_row(page, parts, _PAD + _BOX + 60.0, 22.0, 8 * (_BOX + _GAP))
    return max(bottom, low) + _STAGE_GAP


def _lay_groups(
    page: WorldPage, scope: Scope, world: World, stage: int, left: float, top: float, width: float
) -> float:
    """Place a stage's rank classes, and below them what they talk over; return where these end."""
    classes = [
        _node(
            f"class{one.first}",
            "box",
            describe_class(scope, world, one),
            stage,
            one.num_nodes,
            one.ranks,
            _faults_of(page, one.ranks),
        )
        for one in world.classes
        if one.stage == stage
    ]
    y = _lay_row(page, classes, left, top + _STAGE_HEAD + 6, width) + 30.0
    talks = [_talk(world, i, describe_traffic(world.traffic[i])) for i in _inner_traffic(world, stage)]
    return _lay_row(page, talks, left, y, width)


def _talk(world: World, number: int, text: Sequence[str]) -> WorldNode:
    one = world.traffic[number]
    calls = sum(one.calls.values())
    return _node(f"traffic{number}", "ellipse", text, one.stage, calls, faults=world.faults.get(number, ()))


def _faults_of(page: WorldPage, ranks: Sequence[int]) -> list[Fault]:
    found = {fault.number: fault for rank in ranks for fault in page.faults.get(rank, ())}
    return [fault for _, fault in sorted(found.items())]


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


def _lay_grid(
    page: WorldPage,
    scope: Scope,
    world: World,
    experts: ExpertMap,
    stage: int,
    corner: tuple[float, float],
    width: float,
) -> float:
    """Place a stage's GPUs, in as many parts beside each other as there is room for; return where they end."""
    left, top = corner
    axis = _row_axis(scope)
    rows = _rows(scope, stage)
    blocks_of = [tuple(rank for block in blocks for rank in block) for blocks in rows.values()]
    num_blocks = max(len(blocks) for blocks in rows.values())
    note = f"GPUs: a row is a place on {axis}" if axis else "GPUs"
    note += f"; {num_blocks} blocks are the places on edp" if num_blocks > 1 else ""
    heads = _head_columns(scope, world, list(rows.values()))
    note += "; above a column its attention heads" if heads else ""
    page.words.append((Rectangle(left, top, 0.0, 0.0), note, 9.0, True))
    wide = _grid_width(scope, stage) + _PART_GAP
    num_parts = max(1, min(int((width + _PART_GAP) // wide), -(-len(rows) // _MIN_ROWS)))
    per_part = -(-len(rows) // num_parts)
    first = top + (20.0 if heads else 12.0)
    for part in range(-(-len(rows) // per_part)):
        for x, text in heads:
            place = Rectangle(left + part * wide + _ROW_HEAD + x, top + 12.0, 0.0, 0.0)
            page.words.append((place, text, 6.5, False))
    for i, (row, blocks) in enumerate(rows.items()):
        x, y = left + (i // per_part) * wide, first + (i % per_part) * _CELL_H
        text = _name_row(world, axis, row, experts.held.get(blocks[0][0], {}))
        page.words.append((Rectangle(x, y + _CELL_H / 2, 0.0, 0.0), text, 7.5, False))
        x += _ROW_HEAD
        fill = group_tint(stage_colour(stage), blocks_of[i], blocks_of)
        for block in blocks:
            for rank in block:
                page.cells.append(_cell(page, rank, x, y, fill))
                x += _CELL_W
            x += _BLOCK_GAP
    return first + per_part * _CELL_H


def _name_row(world: World, axis: str, row: int, held: Mapping[int, tuple[int, ...]]) -> str:
    text = f"{axis} {row}" if axis else ""
    if held:
        text += f": {describe_experts(held)}"
    elif axis == "tp" and world.heads is not None:
        text += f": heads {write_runs(world.heads.of([row]))}"
    return text


def _cell(page: WorldPage, rank: int, left: float, top: float, fill: str) -> Cell:
    place = Rectangle(left + _CELL_W / 2, top + _CELL_H / 2, _CELL_W, _CELL_H)
    return Cell(rank=rank, place=place, fill=fill, faults=tuple(page.faults.get(rank, ())))


def _head_columns(scope: Scope, world: World, rows: Sequence[Sequence[Sequence[int]]]) -> list[tuple[float, str]]:
    """Return where columns of the map begin and which heads their GPUs compute; none where a column has several."""
    if world.heads is None:
        return []
    found: dict[float, set[int]] = {}
    for blocks in rows:
        x = 0.0
        for block in blocks:
            for rank in block:
                found.setdefault(x, set()).add(scope.coordinate(rank, "tp"))
                x += _CELL_W
            x += _BLOCK_GAP
    if any(len(places) > 1 for places in found.values()):
        return []
    return [(x + 3.0, write_runs(world.heads.of(places))) for x, places in sorted(found.items())]


def _lay_missing(page: WorldPage, world: World, top: float) -> float:
    """Place the GPUs that recorded nothing, of which nobody knows where they stand; return where they end."""
    if not world.missing:
        return top
    y = top + _STAGE_GAP
    title = f"Recorded nothing, so that nobody knows their place: {write_gpus(world.missing)}"
    page.words.append((Rectangle(_PAD, y, 0.0, 0.0), title, 14.0, True))
    per_row = max(1, int((page.width - 2 * _PAD) // _CELL_W))
    y += 14.0
    for i, rank in enumerate(world.missing):
        page.cells.append(_cell(page, rank, _PAD + (i % per_row) * _CELL_W, y + (i // per_row) * _CELL_H, "#ffffff"))
    return y + -(-len(world.missing) // per_row) * _CELL_H


def _lay_merge(page: WorldPage, world: World, top: float) -> float:
    merging = [i for i, one in enumerate(world.traffic) if is_below(world, one)]
    talks = [_talk(world, i, describe_merge(world.traffic[i])) for i in merging]
    if not talks and not world.parts:
        return top - _STAGE_GAP
    page.words.append(
        (Rectangle(_PAD, top, 0.0, 0.0), "What the parts gave is merged, and what goes across stages", 14.0, True)
    )
    bottom = _lay_row(page, talks, _PAD, top + 16.0, max(page.width - 2 * _PAD, _BOX)) if talks else top
    if not world.parts:
        return bottom + MARGIN
    merged = [_node("merged", "parallelogram", describe_merged(world), -1)]
    return _lay_row(page, merged, _PAD, bottom + 34.0, _BOX) + MARGIN
