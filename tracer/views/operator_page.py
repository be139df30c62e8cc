"""Where the operators of a sheet stand: columns that are read down and then to the right, the experts in a panel.

The operators are cut into columns where one module ends and the next begins. A column is laid out in layers. Data that
leave a column end in a port, which says where they go, and another port says in the next column where they come from.
The experts stand in a panel of cards, one for each, with their operators below each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from truedag.tracer.views.engine import Layout, Problem, lay_out_layers
from truedag.tracer.views.fitting import fit_text
from truedag.tracer.views.font_metrics import text_width
from truedag.tracer.views.layout import Rectangle
from truedag.tracer.views.operator_columns import MAX_ROW, Column, cut_columns, find_cards, port_size
from truedag.tracer.views.operators import Operator, Operators
from truedag.tracer.views.packing import pack

BOX = 142.0
CARD = 150.0
CARD_HEAD = 26.0
_CARD_GAP = 8.0
_OP_GAP = 9.0
COLUMN_GAP = 26.0
_ROW_GAP = 18.0
COLUMN_HEAD = 30.0
COLUMN_PAD = 12.0
_SHAPES = {"communication": "ellipse", "routing": "parallelogram"}


@dataclass(slots=True)
class OperatorPage:
    """Where all stands, in points, y downwards.

    Attributes:
        columns: in reading order.
        places: of the operators, by number.
        texts: their lines, as broken.
        num_title: how many of these are the title.
        card_of: for the operators on an expert's card, by number, the expert.
        cards: of the experts, by number.
        ports: of ports, by column and place in it.
        panels: of the columns.
        engine: why graphviz did not lay it out; '': it did.
        height: of all.
        width: of all.
    """

    columns: list[Column]
    card_of: Mapping[int, int]
    places: dict[int, Rectangle] = field(default_factory=dict)
    texts: dict[int, list[str]] = field(default_factory=dict)
    num_title: dict[int, int] = field(default_factory=dict)
    cards: dict[int, Rectangle] = field(default_factory=dict)
    ports: dict[tuple[int, int], Rectangle] = field(default_factory=dict)
    panels: dict[int, Rectangle] = field(default_factory=dict)
    engine: str = ""
    width: float = 0.0
    height: float = 0.0


def shape_of(one: Operator) -> str:
    """Return the shape that the conventions give an operator."""
    return _SHAPES.get(one.category, "box") if one.kind == "compute" else "ellipse"


def lay_out_operators(sheets: Sequence[tuple[Operators, Sequence[Sequence[str]]]]) -> list[OperatorPage]:
    """Place the operators of sheets.

    Args:
        sheets: for each its operators, and of each of these the lines of its text, the first is the title.
    """
    pages, problems = [], []
    for sheet, texts in sheets:
        page = _begin_page(sheet, texts)
        pages.append(page)
        problems += [_problem(sheet, column, page) for column in page.columns if not column.is_experts]
    made = zip(*lay_out_layers(problems), strict=True)
    for page in pages:
        for column in page.columns:
            if not column.is_experts:
                column.layout, why = next(made)
                page.engine = page.engine or why
        _end_page(page)
    return pages


def _begin_page(sheet: Operators, texts: Sequence[Sequence[str]]) -> OperatorPage:
    """Break the texts, and cut the operators into columns."""
    cards = find_cards(sheet)
    page = OperatorPage(columns=cut_columns(sheet, cards), card_of=cards)
    for i, one in enumerate(sheet.operators):
        shape, width = shape_of(one), CARD - 12 if i in cards else BOX
        fitted = fit_text(texts[i], shape, width)
        page.num_title[i], page.texts[i] = fitted.num_title, fitted.lines
        page.places[i] = Rectangle(0.0, 0.0, width, fitted.height)
    return page


def _end_page(page: OperatorPage) -> None:
    """Place the columns, which are laid out, and the experts, in rows of as many cards as make the smallest sheet."""
    packings = [(_size_columns(page, num), num) for num in _list_card_rows(len(set(page.card_of.values())))]
    packing, num = min(
        ((pack(sizes, (COLUMN_GAP, _ROW_GAP)), num) for sizes, num in packings), key=lambda one: one[0].side
    )
    for number, (column, (x, y)) in enumerate(zip(page.columns, packing.corners, strict=True)):
        width, height = _place(page, number, num)
        _move_column(page, number, column, x + COLUMN_PAD, y)
        page.panels[number] = Rectangle(x + COLUMN_PAD + width / 2, y + height / 2, width, height)
    page.width = packing.width + 2 * COLUMN_PAD
    page.height = packing.height


def _list_card_rows(num_cards: int) -> list[int]:
    """List how many cards a row may have so that all rows have as many; of a prime number, about as many."""
    whole = [num for num in range(1, num_cards + 1) if num_cards % num == 0]
    if len(whole) > 2 or num_cards < 5:
        return whole or [1]
    return sorted({-(-num_cards // rows) for rows in range(1, num_cards + 1)})


def _size_columns(page: OperatorPage, num: int) -> list[tuple[float, float]]:
    return [_place(page, number, num) for number in range(len(page.columns))]


def _place(page: OperatorPage, number: int, num: int) -> tuple[float, float]:
    """Place what is in a column, or in the panel of experts with `num` cards in a row; return its size."""
    column = page.columns[number]
    if column.layout is None:
        return _place_cards(page, number, column, num)
    return _place_column(page, number, column, column.layout)


def move_down(page: OperatorPage, distance: float) -> None:
    """Move all of a page down, as the head above it needs."""
    for group in (page.places, page.cards, page.panels):
        for place in group.values():
            place.y += distance
    for place in page.ports.values():
        place.y += distance


def _move_column(page: OperatorPage, number: int, column: Column, x: float, y: float) -> None:
    places = [page.places[one] for one in column.numbers]
    places += [page.ports[number, i] for i in range(len(column.ports))]
    if column.is_experts:
        places += list(page.cards.values())
    for place in places:
        place.x, place.y = place.x + x, place.y + y


def _problem(sheet: Operators, column: Column, page: OperatorPage) -> Problem:
    spot = {number: i for i, number in enumerate(column.numbers)}
    sizes = [(page.places[number].width, page.places[number].height) for number in column.numbers]
    lines = [(spot[sheet.lines[i].src], spot[sheet.lines[i].dst]) for i in column.lines]
    for place, port in enumerate(column.ports, len(sizes)):
        lines += [(place, spot[end]) if port.is_source else (spot[end], place) for end in port.ends]
    sizes += [port_size(port) for port in column.ports]
    shapes = [shape_of(sheet.operators[number]) for number in column.numbers] + ["box"] * len(column.ports)
    return Problem(sizes=tuple(sizes), shapes=tuple(shapes), lines=tuple(lines), orders=_wrap_rows(len(sizes), lines))


def _wrap_rows(num: int, lines: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Put boxes that read and give the same below each other where they would make a row too wide."""
    into: list[set[int]] = [set() for _ in range(num)]
    out: list[set[int]] = [set() for _ in range(num)]
    for src, dst in lines:
        out[src].add(dst)
        into[dst].add(src)
    alike: dict[tuple[frozenset[int], frozenset[int]], list[int]] = {}
    for box in range(num):
        alike.setdefault((frozenset(into[box]), frozenset(out[box])), []).append(box)
    rows = [boxes for boxes in alike.values() if len(boxes) > MAX_ROW]
    return tuple(pair for boxes in rows for pair in zip(boxes, boxes[MAX_ROW:], strict=False))


def _place_column(page: OperatorPage, number: int, column: Column, layout: Layout) -> tuple[float, float]:
    x, y = COLUMN_PAD, COLUMN_HEAD
    for i, operator in enumerate(column.numbers):
        page.places[operator].x, page.places[operator].y = layout.middles[i][0] + x, layout.middles[i][1] + y
    for i, port in enumerate(column.ports):
        at = layout.middles[len(column.numbers) + i]
        page.ports[number, i] = Rectangle(at[0] + x, at[1] + y, *port_size(port))
    wide = max(layout.width, text_width(column.title, 11.0, bold=True) + 40)
    return wide + 2 * COLUMN_PAD, layout.height + COLUMN_HEAD + COLUMN_PAD


def _place_cards(page: OperatorPage, number: int, column: Column, num: int) -> tuple[float, float]:
    """Place the experts' cards in rows of `num`, all as high."""
    held: dict[int, list[int]] = {}
    for operator in column.numbers:
        held.setdefault(page.card_of[operator], []).append(operator)
    card_height = CARD_HEAD + max(sum(page.places[one].height + _OP_GAP for one in inside) for inside in held.values())
    width = num * (CARD + _CARD_GAP) - _CARD_GAP
    above = _place_strip(page, number, column, COLUMN_PAD, COLUMN_HEAD, width, is_source=True)
    for i, expert in enumerate(sorted(held)):
        x = COLUMN_PAD + (i % num) * (CARD + _CARD_GAP)
        y = above + (i // num) * (card_height + _CARD_GAP)
        page.cards[expert] = Rectangle(x + CARD / 2, y + card_height / 2, CARD, card_height)
        y += CARD_HEAD
        for one in held[expert]:
            place = page.places[one]
            place.x, place.y = x + CARD / 2, y + place.height / 2
            y += place.height + _OP_GAP
    below = above + -(-len(held) // num) * (card_height + _CARD_GAP) + 6
    end = _place_strip(page, number, column, COLUMN_PAD, below, width, is_source=False)
    return width + 2 * COLUMN_PAD, end + COLUMN_PAD


def _place_strip(
    page: OperatorPage, number: int, column: Column, left: float, top: float, width: float, *, is_source: bool
) -> float:
    """Place the ports of one direction in rows; return where they end."""
    x, y, tall = left, top, 0.0
    for i, port in enumerate(column.ports):
        if port.is_source != is_source:
            continue
        wide, high = port_size(port)
        if x > left and x + wide > left + width:
            x, y, tall = left, y + tall + 5, 0.0
        page.ports[number, i] = Rectangle(x + wide / 2, y + high / 2, wide, high)
        x, tall = x + wide + 8, max(tall, high)
    return y + tall + 10
