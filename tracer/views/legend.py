"""The drawing's head: what it is of, what its signs and colours mean, and what is shown out of how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.graph import Graph
from truedag.tracer.views import captions
from truedag.tracer.views.blocks import Blocks
from truedag.tracer.views.boxes import Box
from truedag.tracer.views.dot import Dot
from truedag.tracer.views.layout import Rectangle, text_width, wrap
from truedag.tracer.views.ties import Ties

_LEFT = 12.0
_TITLE = 44.0
_SIZE = 10.0
_LINE = 13.0
_SIGN_LINE = 20.0
# Okabe and Ito's palette, which people with any colour vision tell apart; black and yellow are left out.
# Source: Okabe, Ito, "Color Universal Design", 2008.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_ACROSS = "#6f6f6f"
_SHARES = {"ellipse": 0.42, "box": 0.16, "parallelogram": 0.27}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sign:
    words: str
    shape: str = ""  # none: a line
    style: str = "solid"
    pen: float = 1.0
    width: float = 34.0
    fill: str = ""
    colour: str = _ACROSS


def stage_colour(stage: int) -> str:
    """Return a stage's colour; grey for what is in none."""
    return _ACROSS if stage < 0 else _PALETTE[stage % len(_PALETTE)]


def tint(colour: str, share: float) -> str:
    """Mix a colour into white."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - (255 - part) * share):02x}" for part in parts)


def group_colour(box: Box, boxes: Sequence[Box]) -> str:
    """Return a box's colour: its stage's, in a shade by its kind, and for experts by their group of ranks."""
    colour = stage_colour(box.stage)
    if not box.experts:
        return tint(colour, _SHARES[box.shape])
    groups = sorted({other.ranks for other in boxes if other.stage == box.stage and other.experts})
    place = groups.index(box.ranks)
    return tint(colour, 0.30 + 0.35 * (place / max(1, len(groups) - 1)))


_SHAPES = tuple(
    _Sign(words=words, shape=shape, fill=tint(_ACROSS, _SHARES[shape]))
    for shape, words in (
        ("box", "computation"),
        ("ellipse", "communication"),
        ("parallelogram", "routing and aggregation"),
    )
)
_LINES = (
    _Sign(words="data", colour="#3a3a3a"),
    _Sign(words="data past the next node", pen=0.7, colour="#9a9a9a"),
    _Sign(words="gate selection", style="dashed", colour="#3a3a3a"),
    _Sign(words="stage transfer", style="dashed", pen=2.0, colour=_PALETTE[0]),
    _Sign(words="a bundle of edges, counted beside it", pen=2.2, colour="#9a9a9a"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Legend:
    """What the head of the page says, broken into lines as its width allows, and how tall that is, in points."""

    title: str
    told: tuple[str, ...]
    signs: tuple[tuple[float, float, _Sign], ...]
    height: float


def plan_legend(graph: Graph, blocks: Blocks, boxes: Sequence[Box], ties: Ties, *, width: float) -> Legend:
    """Say what the drawing is of, what its signs and colours mean, and what is shown out of how much."""
    meta = graph.meta
    names = (meta.get("deployment") or "recorded program", meta.get("strategy"), f"{meta['world_size']} ranks")
    characters = int(width / text_width("x", _SIZE))
    told = wrap((_write_counts(blocks, boxes, ties), _write_folding(blocks), _TIMES), characters)
    x, y = _LEFT, _TITLE + _LINE * len(told) + _LINE
    signs = []
    for sign in (*_SHAPES, *_LINES, *_name_groups(boxes)):
        wide = sign.width + 6 + text_width(sign.words, _SIZE) + 16
        if x > _LEFT and x + wide > width:
            x, y = _LEFT, y + _SIGN_LINE
        signs.append((x, y, sign))
        x += wide
    title = " · ".join(str(name) for name in names if name)
    return Legend(title=title, told=tuple(told), signs=tuple(signs), height=y + _SIGN_LINE)


def draw_legend(dot: Dot, legend: Legend) -> None:
    """Draw the head of the page."""
    dot.words("title", (_LEFT, 20), legend.title, size=24, bold=True, align="l")
    for i, text in enumerate(legend.told):
        dot.words(f"told {i}", (_LEFT, _TITLE + _LINE * i), text, size=_SIZE, align="l")
    for i, (x, y, sign) in enumerate(legend.signs):
        if sign.shape:
            place = Rectangle(x + sign.width / 2, y, sign.width, 14)
            dot.node(f"sign {i}", place, (), shape=sign.shape, fillcolor=sign.fill, color=sign.colour)
        else:
            ends = [(x, y), (x + sign.width, y)]
            for end, at in zip(("begin", "end"), ends, strict=True):
                dot.node(f"sign {i} {end}", Rectangle(*at, 1.0, 1.0), (), shape="point", style="invis")
            look = {"style": sign.style, "penwidth": sign.pen, "color": sign.colour}
            dot.line(f"sign {i} begin", f"sign {i} end", ends, **look)
        dot.words(f"sign {i} text", (x + sign.width + 6, y), sign.words, size=_SIZE, align="l")


def _name_groups(boxes: Sequence[Box]) -> list[_Sign]:
    """Say which GPUs each shade stands for."""
    signs = []
    for stage, ranks in sorted({(box.stage, box.ranks) for box in boxes if box.experts}):
        alike = [box for box in boxes if (box.stage, box.ranks) == (stage, ranks) and box.experts]
        held = write_runs(int(one) for box in alike for one in box.experts.split(","))
        words = f"experts {held} of stage {stage} on {captions.write_ranks(ranks)}"
        fill = group_colour(alike[0], boxes)
        signs.append(_Sign(words=words, shape="box", width=16, fill=fill, colour=stage_colour(stage)))
    return signs


_TIMES = (
    "33 ops x 8: operators in each of so many calls; a call is what one rank runs in one microbatch, or once per step. "
    "Times are measured: the mean of a call and the longest; for communication the mean of a participant, from the "
    "last one's arrival; what it waited for that stands below."
)


def _write_counts(blocks: Blocks, boxes: Sequence[Box], ties: Ties) -> str:
    ends = blocks.nodes.filter(pl.col("kind").is_in(["parameter", "input", "output"]))["kind"].value_counts()
    counted = ", ".join(
        captions.count(row["count"], row["kind"]) for row in ends.sort("kind", descending=True).to_dicts()
    )
    drawn, bundled = sum(tie.num_edges for tie in ties.lines), sum(tie.num_edges for tie in ties.bundled)
    total = len(blocks.edges)
    others = total - drawn - bundled - _inner(blocks)
    return (
        f"{len(boxes):,} nodes shown of {len(blocks.nodes):,}: they stand for "
        f"{sum(box.num_nodes for box in boxes):,}; the others are {counted}. "
        f"Of {total:,} edges of data and messages {drawn:,} are drawn as {len(ties.lines):,} lines, "
        f"{bundled:,} bundled, {_inner(blocks):,} inside a node, {others:,} from and to parameters, inputs and outputs."
    )


def _inner(blocks: Blocks) -> int:
    return blocks.fold.num_inner_edges


def _write_folding(blocks: Blocks) -> str:
    alike = ""
    if blocks.num_microbatches > 1 and blocks.num_unlike == 0:
        alike = f"; its {blocks.num_microbatches} microbatches pass the same nodes and edges (checked)"
    elif blocks.num_microbatches > 1:
        alike = f"; {blocks.num_unlike} of its {blocks.num_microbatches} microbatches pass others than the first"
    return (
        f"Folded over {blocks.folded}{alike}. What is shown is a DAG (checked), folded from the recorded one: nothing "
        "is added, and only program order is left out."
    )
