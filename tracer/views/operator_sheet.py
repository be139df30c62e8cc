"""Draw a sheet of operators: what is written on it, and its DOT text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from truedag.tracer.analysis.quantities import write_bytes, write_time
from truedag.tracer.views import captions
from truedag.tracer.views.colours import SHARES, group_tint, stage_colour, tint
from truedag.tracer.views.dot import Dot
from truedag.tracer.views.ends import PARAMETER
from truedag.tracer.views.faults import TOLD, mark_faults, write_faults
from truedag.tracer.views.gpus import list_gpus, write_gpus
from truedag.tracer.views.operator_columns import PORT_SIZE, port_lines
from truedag.tracer.views.operator_page import (
    COLUMN_HEAD,
    OperatorPage,
    lay_out_operators,
    move_down,
    shape_of,
)
from truedag.tracer.views.operators import Operator, Operators
from truedag.tracer.views.sheet import GREY, Link, Sheet, Sign, draw_head, plan_head

_MIN_WIDTH = 760.0
_MARGIN = 12.0
_DARK, _LIGHT = "#3a3a3a", "#9a9a9a"
_PORT_FILL, _PORT_LINE = "#f3f3f3", "#c4c4c4"
_SIGNS = (
    Sign(words="computation", shape="box", fill=tint(GREY, SHARES["box"])),
    Sign(words="communication", shape="ellipse", fill=tint(GREY, SHARES["ellipse"])),
    Sign(words="routing and aggregation", shape="parallelogram", fill=tint(GREY, SHARES["parallelogram"])),
    Sign(
        words="where data come from or go to: a column of this sheet, or another sheet",
        shape="box",
        fill=_PORT_FILL,
        colour=_PORT_LINE,
    ),
    Sign(words="data", colour=_DARK),
    Sign(words="gate selection", style="dashed", colour=_DARK),
    Sign(words="stage transfer", style="dashed", pen=2.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a sheet of operators is of.

    Attributes:
        name: the sheet's name.
        title: its title.
        stage: the pipeline stage.
        ranks: GPUs of the class.
        told: further sentences for the head.
        links: ways to other sheets.
        num_total: all nodes of the graph.
    """

    name: str
    title: str
    stage: int
    ranks: tuple[int, ...]
    told: tuple[str, ...]
    links: tuple[Link, ...]
    num_total: int


def draw_operators(contents: Sequence[tuple[Operators, Subject]]) -> list[Sheet]:
    """Draw sheets of operators, the lines between them, and what leads to other sheets."""
    read = [_take_parameters(sheet) for sheet, _ in contents]
    texts = [
        [[*_describe(one, names[i]), *write_faults(sheet.faults.get(i, ()))] for i, one in enumerate(sheet.operators)]
        for (sheet, _), (names, _) in zip(contents, read, strict=True)
    ]
    pages = lay_out_operators([(sheet, text) for (sheet, _), text in zip(contents, texts, strict=True)])
    return [
        _draw(sheet, subject, page, num) for (sheet, subject), page, (_, num) in zip(contents, pages, read, strict=True)
    ]


def _take_parameters(sheet: Operators) -> tuple[list[list[str]], int]:
    """Take the parameters out of the sources: which each operator reads, and by how many edges in all."""
    held = {text: ends for text, ends in sheet.sources.items() if _is_parameter(text)}
    sheet.sources = {text: ends for text, ends in sheet.sources.items() if not _is_parameter(text)}
    names: list[list[str]] = [[] for _ in sheet.operators]
    for text, ends in held.items():
        for number in ends:
            names[number].append(text.partition(" ")[2])
    return names, sum(told[0] for ends in held.values() for told in ends.values())


def _draw(sheet: Operators, subject: Subject, page: OperatorPage, num_parameter_edges: int) -> Sheet:
    width = max(page.width, _MIN_WIDTH)
    told = [*_tell(sheet, subject, page, num_parameter_edges), *subject.told]
    told += [f"{TOLD}; a click on one leads to its place on the page."] if sheet.faults else []
    head = plan_head(subject.title, told, _SIGNS, width=width, links=subject.links)
    move_down(page, head.height)
    dot = Dot(name=subject.title, width=width + _MARGIN, height=page.height + head.height + _MARGIN)
    colour = stage_colour(subject.stage)
    _draw_panels(dot, page, colour)
    draw_head(dot, head, sheet=subject.name)
    _draw_cards(dot, sheet, page, colour)
    _draw_boxes(dot, sheet, page, colour, subject.name)
    _draw_ports(dot, page)
    _draw_lines(dot, sheet, page, colour)
    return Sheet(
        name=subject.name,
        title=subject.title,
        dot=dot.text(comment="drawn by truedag from a recorded graph"),
        width=dot.width,
        height=dot.height,
        num_shown=len(sheet.operators),
        num_nodes=sheet.num_nodes,
    )


def _is_parameter(text: str) -> bool:
    return text.startswith(PARAMETER)


def _tell(sheet: Operators, subject: Subject, page: OperatorPage, num_parameter_edges: int) -> list[str]:
    engine = f" Rows are depths: {page.engine}." if page.engine else ""
    what = "" if sheet.layers == (-1,) else "of one layer "
    calls = f"{captions.count(sheet.num_calls, 'call')} {what}by one GPU in one microbatch or decode step"
    alike = (
        "which all pass the same operators (checked)"
        if sheet.num_unlike == 0
        else f"of which {sheet.num_unlike:,} pass others than most do: a box says how many calls it is of"
    )
    if sheet.is_first_alone:
        alike += "; their orders differ so that lines which lead back are left out"
    if sheet.is_by_depth:
        alike += "; operators of one name, as deep in their call as the other, stand in one box: 57 ops x 8 are 57 in "
        alike += "each of 8 calls, 265 ops in 8 are 265 in all of them"
    return [
        f"{len(sheet.operators):,} nodes shown of {subject.num_total:,}: they stand for {sheet.num_nodes:,}, "
        f"which are every operator and communication of {write_gpus(subject.ranks)} here, and of all experts. "
        f"Folded: {calls}, {alike}. {num_parameter_edges:,} edges lead from parameters, which the boxes name.{engine}",
        "A box: operator and module, tensors in and out, GPUs, x calls, mean and longest time of a call; of a "
        "communication the group, bytes that a GPU sends, transfer from the last one's arrival, and waiting for it.",
    ]


def _describe(one: Operator, parameters: Sequence[str]) -> list[str]:
    last = one.path.rpartition(".")[2]
    title = one.label if not last else f"{one.label} · {last}"
    calls = captions.count_in_calls(one.num_runs, one.num_calls, one.fewest, one.most, "op")
    calls = f"x {one.num_calls:,}" if one.most == 1 else calls
    text = [
        title,
        captions.write_in_out(captions.write_shapes(one.inputs), captions.write_shapes(one.outputs)) or "no tensor",
    ]
    if parameters and one.expert < 0:
        many = f"{len(parameters):,} parameters" if one.most > 1 else ", ".join(parameters)
        text.append(f"reads {many}")
    if one.kind != "compute":
        text.append(f"{_groups(one)} · {write_bytes(one.num_bytes)} · {calls}")
        text.append(_time(one))
        if one.wait_ns is not None:
            mark = "est. " if one.is_estimated else ""
            text.append(f"{mark}wait {write_time(one.wait_ns)}, max {write_time(one.max_wait_ns)}")
        return text
    where = "" if one.expert >= 0 else f"{write_gpus(one.ranks)} · "
    if one.expert >= 0:
        text.append(f"{calls} · {_time(one)}")
    else:
        text += [f"{where}{calls}", _time(one)]
    return text


def _groups(one: Operator) -> str:
    first = "{" + list_gpus(tuple(one.groups[0])) + "}" if one.groups else "no group"
    if one.num_groups <= 1:
        return first
    if one.num_groups <= 3 and len(one.groups) == one.num_groups:
        return " ".join("{" + list_gpus(tuple(group)) + "}" for group in one.groups)
    return f"{first} and {one.num_groups - 1:,} more groups of {len(one.groups[0])}"


def _time(one: Operator) -> str:
    if one.mean_ns is None:
        return "not timed"
    return f"{'est. ' if one.is_estimated else ''}{write_time(one.mean_ns)}, max {write_time(one.max_ns)}"


def _draw_panels(dot: Dot, page: OperatorPage, colour: str) -> None:
    for number, column in enumerate(page.columns):
        place = page.panels[number]
        nodes = [f"op{one}" for one in column.numbers]
        nodes += [f"port {number} {i}" for i in range(len(column.ports))]
        dot.box(f"column {number}", place, nodes, style="filled,rounded", fillcolor=tint(colour, 0.03), color="#d0d0d0")
        words = f"{number + 1}. {column.title}"
        dot.words(
            f"head {number}", (place.left + 10, place.top + COLUMN_HEAD / 2), words, size=11, bold=True, align="l"
        )


def _draw_cards(dot: Dot, sheet: Operators, page: OperatorPage, colour: str) -> None:
    held = _held(sheet)
    groups = sorted(set(held.values()))
    for expert, place in page.cards.items():
        inside = [f"op{i}" for i, other in page.card_of.items() if other == expert]
        dot.box(
            f"expert {expert}",
            place,
            inside,
            style="filled,rounded",
            color=colour,
            penwidth=1.0,
            fillcolor=group_tint(colour, held[expert], groups),
        )
        dot.words(f"expert head {expert}", (place.x, place.top + 8), f"expert {expert}", size=9, bold=True)
        dot.words(f"expert gpus {expert}", (place.x, place.top + 18), write_gpus(held[expert]), size=7.5)


def _held(sheet: Operators) -> Mapping[int, tuple[int, ...]]:
    held: dict[int, set[int]] = {}
    for one in sheet.operators:
        if one.expert >= 0:
            held.setdefault(one.expert, set()).update(one.ranks)
    return {expert: tuple(sorted(ranks)) for expert, ranks in sorted(held.items())}


def _draw_boxes(dot: Dot, sheet: Operators, page: OperatorPage, colour: str, name: str) -> None:
    for i, one in enumerate(sheet.operators):
        shape = shape_of(one)
        module = f" in {one.path}" if one.path else ""
        dot.node(
            f"op{i}",
            page.places[i],
            page.texts[i],
            num_bold=page.num_title[i],
            shape=shape,
            fillcolor="#ffffff" if one.expert >= 0 and shape == "box" else tint(colour, SHARES[shape]),
            stands_for=one.num_nodes,
            ranks=list_gpus(one.ranks),
            **{
                "color": colour,
                "tooltip": f"{one.op}{module}: {one.num_nodes:,} nodes of the graph",
                **mark_faults(name, sheet.faults.get(i, ())),
            },
        )


def _draw_ports(dot: Dot, page: OperatorPage) -> None:
    for (number, i), place in page.ports.items():
        port = page.columns[number].ports[i]
        edges = f"{captions.count(port.num_edges, 'edge')}, {write_bytes(port.num_bytes)}"
        dot.node(
            f"port {number} {i}",
            place,
            port_lines(port),
            num_bold=0,
            shape="box",
            style="filled,rounded",
            fillcolor=_PORT_FILL,
            color=_PORT_LINE,
            fontsize=PORT_SIZE,
            fontcolor="#444444",
            tooltip=f"{port.text}: {edges}",
            num_edges=port.num_edges,
            bytes=port.num_bytes,
        )


def _draw_lines(dot: Dot, sheet: Operators, page: OperatorPage, colour: str) -> None:
    drawn: set[int] = set()
    for number, column in enumerate(page.columns):
        layout = column.layout
        if layout is None:
            _draw_card_lines(dot, sheet, page, column.lines, drawn)
            continue
        frame = page.panels[number]
        shift = (frame.left + 12.0, frame.top + COLUMN_HEAD)
        ways = [tuple((x + shift[0], y + shift[1]) for x, y in way) for way in layout.ways]
        for i, way in zip(column.lines, ways, strict=False):
            drawn.add(i)
            _draw_way(dot, sheet, i, way, colour, splines=layout.splines)
        rest = iter(ways[len(column.lines) :])
        for k, port in enumerate(column.ports):
            for end in port.ends:
                pair = (f"port {number} {k}", f"op{end}") if port.is_source else (f"op{end}", f"port {number} {k}")
                way = next(rest)
                add = dot.spline if layout.splines else dot.line
                add(*pair, way, color=_LIGHT, penwidth=0.7)
    for i, line in enumerate(sheet.lines):
        if i not in drawn:
            dot.hidden(f"op{line.src}", f"op{line.dst}", kind=line.kind, num_edges=line.num_edges, bytes=line.num_bytes)


def _draw_way(
    dot: Dot, sheet: Operators, number: int, way: Sequence[tuple[float, float]], colour: str, *, splines: bool
) -> None:
    line = sheet.lines[number]
    src, dst = sheet.operators[line.src], sheet.operators[line.dst]
    is_gate = {src.category, dst.category} == {"routing"}
    is_transfer = line.kind == "p2p"
    tip = f"{captions.count(line.num_edges, 'edge')}, {write_bytes(line.num_bytes)}"
    add = dot.spline if splines else dot.line
    add(
        f"op{line.src}",
        f"op{line.dst}",
        way,
        color=colour if is_transfer else _DARK,
        style="dashed" if is_gate or is_transfer else "solid",
        penwidth=2.0 if is_transfer else 0.9,
        kind=line.kind,
        num_edges=line.num_edges,
        bytes=line.num_bytes,
        tooltip=tip,
    )


def _draw_card_lines(dot: Dot, sheet: Operators, page: OperatorPage, lines: Sequence[int], drawn: set[int]) -> None:
    """Draw the lines inside cards: to the next operator straight, past others along the card's right side."""
    for i in lines:
        line = sheet.lines[i]
        if page.card_of[line.src] != page.card_of[line.dst]:
            continue
        drawn.add(i)
        a, b = page.places[line.src], page.places[line.dst]
        told = {"kind": line.kind, "num_edges": line.num_edges, "bytes": line.num_bytes}
        if b.top - a.bottom < 20:
            dot.line(
                f"op{line.src}", f"op{line.dst}", ((a.x, a.bottom), (b.x, b.top)), color=_DARK, penwidth=0.8, **told
            )
        else:
            aside = a.right + 3.5
            way = ((a.right, a.y + 3), (aside, a.y + 3), (aside, b.y - 3), (b.right, b.y - 3))
            dot.line(f"op{line.src}", f"op{line.dst}", way, color=_LIGHT, penwidth=0.6, **told)
