"""Draw the chain of layers: the first sheet of `detailed`, from which each layer's operators are one click away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truedag.tracer.analysis.quantities import write_bytes, write_runs, write_time
from truedag.tracer.views import captions
from truedag.tracer.views.chain import AFTER, ALONE, BEFORE, Chain, Part
from truedag.tracer.views.colours import DARK, LIGHT, SHARES, stage_colour, tint
from truedag.tracer.views.dot import Dot
from truedag.tracer.views.faults import TOLD, mark_faults, write_faults
from truedag.tracer.views.fitting import fit_text
from truedag.tracer.views.gpus import write_gpus
from truedag.tracer.views.layout import Rectangle
from truedag.tracer.views.operator_sheet import SIGNS
from truedag.tracer.views.sheet import Link, Sheet, draw_head, find_way, frame_stage, plan_head

_WIDTH, _PITCH, _ROW_GAP = 112.0, 132.0, 34.0
_MARGIN, _STAGE_HEAD, _PAD = 12.0, 30.0, 12.0
_PER_ROW = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSubject:
    """What the chain is of.

    Attributes:
        name: the sheet's name.
        title: its title.
        ranks: the GPUs of the class of each stage.
        ways: for stage, phase and slot the sheet of its operators.
        told: sentences for the head.
        links: further links.
        num_total: all nodes of the graph.
        about: what stands before counts of nodes, as `Scope.about`.
    """

    name: str
    title: str
    ranks: Mapping[int, tuple[int, ...]]
    ways: Mapping[tuple[int, str | None, int], str]
    told: tuple[str, ...]
    links: tuple[Link, ...]
    num_total: int
    about: str


def draw_chain(chain: Chain, subject: ChainSubject) -> Sheet:
    """Draw it: a section for each stage, in it a row for each phase, layers below layers."""
    texts = [[*_describe(part, subject), *write_faults(chain.faults.get(i, ()))] for i, part in enumerate(chain.parts)]
    places, sections, width, bottom = _place(chain.parts, texts)
    width = max(width, 900.0)
    stood = sum(part.num_nodes for part in chain.parts)
    told = (
        f"{len(chain.parts):,} nodes shown of {subject.num_total:,}: they stand for {subject.about}{stood:,}, which "
        "one rank class of each stage runs. A box is a layer in a phase; a click on it leads to its operators. Folded: "
        "microbatches, decode steps and the GPUs of the class; 9 operators x 8: in each of 8 calls, 70 operators in 8: "
        "in all; a layer's time is the mean over its calls.",
        *subject.told,
        *([f"{TOLD}."] if chain.faults else []),
    )
    head = plan_head(subject.title, told, (*SIGNS[:3], *SIGNS[4:]), width=width, links=subject.links)
    for place in (*places, *sections.values()):
        place.y += head.height
    dot = Dot(name=subject.title, width=width + _MARGIN, height=bottom + head.height + _MARGIN)
    _draw_sections(dot, chain.parts, sections, subject)
    draw_head(dot, head, sheet=subject.name)
    for i, part in enumerate(chain.parts):
        shape = _shape(part)
        fitted = fit_text(texts[i], shape, _WIDTH)
        way = subject.ways.get((part.stage, part.phase, part.slot))
        dot.node(
            f"part{i}",
            places[i],
            fitted.lines,
            num_bold=fitted.num_title,
            shape=shape,
            fillcolor=tint(stage_colour(part.stage), SHARES[shape]),
            stands_for=part.num_nodes,
            ranks=write_runs(subject.ranks[part.stage]),
            **{
                "color": stage_colour(part.stage),
                **mark_faults(subject.name, chain.faults.get(i, ())),
                **({} if way is None else {"URL": find_way(subject.name, way), "tooltip": "to its operators"}),
            },
        )
    _draw_ties(dot, chain, places)
    return Sheet(
        name=subject.name,
        title=subject.title,
        dot=dot.text(comment="drawn by truedag from a recorded graph"),
        width=dot.width,
        height=dot.height,
        num_shown=len(chain.parts),
        num_nodes=stood,
    )


def _shape(part: Part) -> str:
    return "ellipse" if part.label else "box"


def _describe(part: Part, subject: ChainSubject) -> list[str]:
    names = {BEFORE: "before the layers", AFTER: "after the layers", ALONE: part.phase or "outside the phases"}
    title = part.label or names.get(part.slot) or f"layer {part.slot}"
    text = [title if part.label or part.slot == ALONE else f"{title}: {part.phase}"]
    into, out = (" ".join(captions.write_shapes(one)) for one in (part.inputs, part.outputs))
    if into or out:
        text.append(f"{into} → {out}")
    if part.num_parameters:
        text.append(f"{part.num_parameters / 1e6:,.2f} M parameters a GPU")
    noun = "message" if part.label else "operator"
    text.append(captions.count_in_calls(part.num_items, part.num_calls, part.fewest, part.most, noun))
    text.append(write_gpus(subject.ranks[part.stage]))
    text.append("not timed" if part.mean_ns is None else write_time(part.mean_ns))
    return text


def _place(
    parts: Sequence[Part], texts: Sequence[Sequence[str]]
) -> tuple[list[Rectangle], dict[int, Rectangle], float, float]:
    sizes = [fit_text(texts[i], _shape(part), _WIDTH).height for i, part in enumerate(parts)]
    ways = [_place_in(parts, sizes, count) for count in range(1, len({part.stage for part in parts}) + 1)]
    return min(ways, key=lambda way: (max(way[2], way[3]), way[3]))


def _place_in(
    parts: Sequence[Part], sizes: Sequence[float], num_columns: int
) -> tuple[list[Rectangle], dict[int, Rectangle], float, float]:
    """Place the sections of stages below each other, in so many columns."""
    places = [Rectangle(0.0, 0.0, _WIDTH, size) for size in sizes]
    sections: dict[int, Rectangle] = {}
    stages = sorted({part.stage for part in parts})
    per_column = -(-len(stages) // num_columns)
    left, lowest = 0.0, 0.0
    for begin in range(0, len(stages), per_column):
        top, right = 0.0, left
        for stage in stages[begin : begin + per_column]:
            section = _place_stage(parts, sizes, places, stage, (left, top))
            sections[stage] = section
            top, right = section.bottom + _ROW_GAP, max(right, section.right + _PAD)
        left, lowest = right + _PAD, max(lowest, top - _ROW_GAP)
    return places, sections, left - _PAD, lowest


def _place_stage(
    parts: Sequence[Part], sizes: Sequence[float], places: Sequence[Rectangle], stage: int, corner: tuple[float, float]
) -> Rectangle:
    """Place the parts of a stage, a row for each phase; return its section."""
    left, top = corner
    inside = [i for i, part in enumerate(parts) if part.stage == stage]
    y, wide = top + _STAGE_HEAD, 0.0
    phases = dict.fromkeys(parts[i].phase for i in inside if parts[i].slot != ALONE)
    rows = [[i for i in inside if parts[i].phase == phase and parts[i].slot != ALONE] for phase in phases]
    rows += [[i for i in inside if parts[i].slot == ALONE]]
    for row in rows:
        ordered = sorted(row, key=lambda i: _column(parts, parts[i]))
        for begin in range(0, len(ordered), _PER_ROW):
            line = ordered[begin : begin + _PER_ROW]
            tall = max(sizes[i] for i in line)
            for k, i in enumerate(line):
                places[i].x, places[i].y = left + _PAD * 2 + (k + 0.5) * _PITCH, y + tall / 2
            wide = max(wide, len(line) * _PITCH)
            y += tall + _ROW_GAP
    bottom = y - _ROW_GAP + _PAD
    return Rectangle(left + _PAD + (wide + 2 * _PAD) / 2, (top + bottom) / 2, wide + 2 * _PAD, bottom - top)


def _column(parts: Sequence[Part], part: Part) -> tuple[int, int, str]:
    """Order a row: what comes in stands on the side of the first layer, what goes out on the other."""
    layers = [one.slot for one in parts if one.stage == part.stage and one.phase == part.phase and one.slot >= 0]
    is_falling = len(layers) > 1 and layers[0] > layers[-1]
    # What is received is read by the layers, what is sent may come from what runs after them.
    away = {BEFORE: -1 if part.label else -2, AFTER: 2 if part.label else 1}.get(part.slot, 0)
    return (-away if is_falling else away, part.slot, part.label)


def _draw_sections(dot: Dot, parts: Sequence[Part], sections: Mapping[int, Rectangle], subject: ChainSubject) -> None:
    for stage, place in sections.items():
        inside = [f"part{i}" for i, part in enumerate(parts) if part.stage == stage]
        frame_stage(dot, stage, place, inside)
        layers = {part.slot for part in parts if part.stage == stage and part.slot >= 0}
        words = f"Stage {stage}" if stage >= 0 else "No stage was told"
        words += f" · {write_gpus(subject.ranks[stage])}" + (f" · layers {write_runs(layers)}" if layers else "")
        dot.words(f"head {stage}", (place.left + 12, place.top + 15), words, size=16, bold=True, align="l")


def _draw_ties(dot: Dot, chain: Chain, places: Sequence[Rectangle]) -> None:
    lane = 0
    for (src, dst), (num, size, is_message) in chain.ties.items():
        one, other, a, b = chain.parts[src], chain.parts[dst], places[src], places[dst]
        told: dict[str, Any] = {
            "num_edges": num,
            "bytes": size,
            "tooltip": f"{captions.count(num, 'edge')}, {write_bytes(size)}",
        }
        pair = (f"part{src}", f"part{dst}")
        if is_message:
            told |= {"color": stage_colour(one.stage), "style": "dashed", "penwidth": 2.0}
            dot.line(*pair, _around(a, b, lane), **told)
            lane = (lane + 1) % 4
        elif one.stage == other.stage and a.y == b.y and abs(a.x - b.x) < _PITCH * 1.5:
            ends = ((a.right, a.y), (b.left, b.y)) if a.x < b.x else ((a.left, a.y), (b.right, b.y))
            dot.line(*pair, ends, color=DARK, **told)
        elif one.stage == other.stage and a.x == b.x and 0 < b.top - a.bottom < 2 * _ROW_GAP:
            dot.line(*pair, ((a.x, a.bottom), (b.x, b.top)), color=LIGHT, penwidth=1.6, **told)
        else:
            dot.hidden(*pair, num_edges=num, bytes=size)


def _around(a: Rectangle, b: Rectangle, lane: int) -> tuple[tuple[float, float], ...]:
    """Lead a message from a stage to another below or above it, through the gap between rows."""
    shift = 3.0 * lane
    if b.y > a.y:
        gap = a.bottom + 9.0 + shift
        return ((a.x, a.bottom), (a.x, gap), (b.left - 12 - shift, gap), (b.left - 12 - shift, b.y), (b.left, b.y))
    gap = a.top - 9.0 - shift
    return ((a.x, a.top), (a.x, gap), (b.left - 12 - shift, gap), (b.left - 12 - shift, b.y), (b.left, b.y))
