"""Draw the chain of layers: the first sheet of `detailed`, from which each layer's operators are one click away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truedag.tracer.analysis.quantities import write_bytes, write_runs, write_time
from truedag.tracer.views import captions
from truedag.tracer.views.chain import AFTER, ALONE, BEFORE, Chain, Part
from truedag.tracer.views.chain_page import PITCH, ROW_GAP, WIDTH, ChainPage, place_chain
from truedag.tracer.views.chain_ways import find_ways
from truedag.tracer.views.colours import DARK, LIGHT, SHARES, stage_colour, tint
from truedag.tracer.views.dot import Dot
from truedag.tracer.views.faults import Faults, mark_faults, write_faults
from truedag.tracer.views.fitting import fit_text
from truedag.tracer.views.gpus import list_gpus, write_gpus
from truedag.tracer.views.layout import Rectangle
from truedag.tracer.views.sheet import GREY, Link, Sheet, Sign, draw_head, find_way, frame_stage, plan_head

_MARGIN = 12.0
_SIGNS = (
    Sign(words="a layer in a phase", shape="box", fill=tint(GREY, SHARES["box"])),
    Sign(words="a message's end", shape="ellipse", fill=tint(GREY, SHARES["ellipse"])),
    Sign(words="data", colour=DARK),
    Sign(words="data of the same layer in another phase", pen=1.6, colour=LIGHT),
    Sign(words="stage transfer", style="dashed", pen=2.0),
)


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
        faults: what an audit found.
    """

    name: str
    title: str
    ranks: Mapping[int, tuple[int, ...]]
    ways: Mapping[tuple[int, str | None, int], str]
    told: tuple[str, ...]
    links: tuple[Link, ...]
    num_total: int
    about: str
    faults: Faults


def draw_chain(chain: Chain, subject: ChainSubject) -> Sheet:
    """Draw it: a section for each stage, in it a row for each phase, layers below layers."""
    texts = [[*_describe(part, subject), *write_faults(chain.faults.get(i, ()))] for i, part in enumerate(chain.parts)]
    page = place_chain(
        chain.parts, [fit_text(text, _shape(part), WIDTH).height for part, text in zip(chain.parts, texts, strict=True)]
    )
    width = max(page.width, 900.0)
    stood = sum(part.num_nodes for part in chain.parts)
    told = (
        f"{len(chain.parts):,} nodes shown of {subject.num_total:,}: they stand for {subject.about}{stood:,}, which "
        "one rank class of each stage runs. A box is a layer in a phase; a click on it leads to its operators. Folded: "
        "microbatches, decode steps and the GPUs of the class; 9 operators x 8: in each of 8 calls, 70 operators in 8: "
        "in all; a layer's time is the mean over its calls.",
        *subject.told,
        *subject.faults.tell(chain.faults.values()),
    )
    head = plan_head(subject.title, told, _SIGNS, width=width, links=subject.links)
    page.move_down(head.height)
    dot = Dot(name=subject.title, width=width + _MARGIN, height=page.bottom + 2 * _MARGIN)
    _draw_sections(dot, chain.parts, page.sections, subject)
    draw_head(dot, head, sheet=subject.name)
    for i, part in enumerate(chain.parts):
        shape = _shape(part)
        fitted = fit_text(texts[i], shape, WIDTH)
        way = subject.ways.get((part.stage, part.phase, part.slot))
        dot.node(
            f"part{i}",
            page.places[i],
            fitted.lines,
            num_bold=fitted.num_title,
            shape=shape,
            fillcolor=tint(stage_colour(part.stage), SHARES[shape]),
            stands_for=part.num_nodes,
            ranks=list_gpus(subject.ranks[part.stage]),
            **{
                "color": stage_colour(part.stage),
                **mark_faults(subject.name, chain.faults.get(i, ())),
                **({} if way is None else {"URL": find_way(subject.name, way), "tooltip": "to its operators"}),
            },
        )
    _draw_ties(dot, chain, page)
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
    shapes = captions.write_in_out(captions.write_shapes(part.inputs), captions.write_shapes(part.outputs))
    if part.boundaries:
        text.append(captions.write_boundaries(part.boundaries))
    if shapes:
        text.append(shapes)
    if part.num_parameters:
        text.append(f"{part.num_parameters / 1e6:,.2f} M parameters a GPU")
    noun = "message" if part.label else "operator"
    text.append(captions.count_in_calls(part.num_items, part.num_calls, part.fewest, part.most, noun))
    text.append(write_gpus(subject.ranks[part.stage]))
    text.append("not timed" if part.mean_ns is None else write_time(part.mean_ns))
    return text


def _draw_sections(dot: Dot, parts: Sequence[Part], sections: Mapping[int, Rectangle], subject: ChainSubject) -> None:
    for stage, place in sections.items():
        inside = [f"part{i}" for i, part in enumerate(parts) if part.stage == stage]
        frame_stage(dot, stage, place, inside)
        layers = {part.slot for part in parts if part.stage == stage and part.slot >= 0}
        words = f"Stage {stage}" if stage >= 0 else "No stage was told"
        words += f" · {write_gpus(subject.ranks[stage])}" + (f" · layers {write_runs(layers)}" if layers else "")
        dot.words(f"head {stage}", (place.left + 28, place.top + 15), words, size=16, bold=True, align="l")


def _draw_ties(dot: Dot, chain: Chain, page: ChainPage) -> None:
    ways = find_ways(chain, page)
    for (src, dst), (num, size, _) in chain.ties.items():
        one, other, a, b = chain.parts[src], chain.parts[dst], page.places[src], page.places[dst]
        told: dict[str, Any] = {
            "num_edges": num,
            "bytes": size,
            "tooltip": f"{captions.count(num, 'edge')}, {write_bytes(size)}",
        }
        pair = (f"part{src}", f"part{dst}")
        if (src, dst) in ways:
            told |= {"color": stage_colour(one.stage), "style": "dashed", "penwidth": 2.0}
            dot.line(*pair, ways[src, dst], **told)
        elif one.stage == other.stage and a.y == b.y and abs(a.x - b.x) < PITCH * 1.5:
            ends = ((a.right, a.y), (b.left, b.y)) if a.x < b.x else ((a.left, a.y), (b.right, b.y))
            dot.line(*pair, ends, color=DARK, **told)
        elif one.stage == other.stage and a.x == b.x and 0 < b.top - a.bottom < 2 * ROW_GAP:
            dot.line(*pair, ((a.x, a.bottom), (b.x, b.top)), color=LIGHT, penwidth=1.6, **told)
        else:
            dot.hidden(*pair, num_edges=num, bytes=size)
