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
from truedag.tracer.views.layout_text import wrap
from truedag.tracer.views.operators import Operator, Operators
from truedag.tracer.views.packing import pack

BOX = 142.0
CARD = 150.0
CARD_HEAD = 26.0
_CARD_GAP = 8.0
_OP_GAP = 9.0
_MAX_COLUMN = 26  # operators
_PORT = 150.0
PORT_SIZE = 7.0
_PORT_LINE = 8.6
COLUMN_GAP = 26.0
_ROW_GAP = 18.0
_MAX_ROW = 5  # boxes side by side that read and give the same
COLUMN_HEAD = 30.0
COLUMN_PAD = 12.0
_SHAPES = {"communication": "ellipse", "routing": "parallelogram"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """Where data come from or go to: its text, its operators (by number), their edges and bytes in all."""

    text: str
    is_source: bool
    ends: tuple[int, ...]
    num_edges: int
    num_bytes: int


@dataclass(slots=True)
class Column:
    """A column of the page, or the panel of experts.

    Attributes:
        title: the modules in it.
        numbers: its operators.
        ports: what they read from elsewhere and give to elsewhere.
        lines: indices into `Operators.lines` that are drawn in it.
        layout: where they stand, ports after operators; None: experts.
    """

    title: str
    numbers: tuple[int, ...]
    is_experts: bool
    ports: list[Port] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    layout: Layout | None = None


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
    page = OperatorPage(columns=_cut_columns(sheet, cards), card_of=cards)
    for i, one in enumerate(sheet.operators):
        shape, width = shape_of(one), CARD - 12 if i in cards else BOX
        fitted = fit_text(texts[i], shape, width)
        page.num_title[i], page.texts[i] = fitted.num_title, fitted.lines
        page.places[i] = Rectangle(0.0, 0.0, width, fitted.height)
    _add_ports(sheet, page.columns)
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


def port_lines(port: Port) -> list[str]:
    """Break a port's text as its box needs."""
    return wrap([port.text], _PORT - 8, size=PORT_SIZE)


def _cut_columns(sheet: Operators, cards: Mapping[int, int]) -> list[Column]:
    numbers = range(len(sheet.operators))
    experts = sorted(cards)
    first = min((i for i in experts if sheet.operators[i].expert >= 0), default=len(sheet.operators))
    leads = _leads_to(sheet, experts)
    before = [i for i in numbers if i not in cards and (i < first or i in leads)]
    after = [i for i in numbers if i not in cards and not (i < first or i in leads)]
    columns = [_column(sheet, part) for part in _pack(sheet, before)]
    if experts:
        columns.append(Column(title="experts", numbers=tuple(experts), is_experts=True))
    return columns + [_column(sheet, part) for part in _pack(sheet, after)]


def find_cards(sheet: Operators) -> dict[int, int]:
    """Return for the operators on an expert's card the expert: its own, and those that work for it alone."""
    cards = {i: one.expert for i, one in enumerate(sheet.operators) if one.expert >= 0}
    into: dict[int, list[int]] = {}
    out: dict[int, list[int]] = {}
    for line in sheet.lines:
        into.setdefault(line.dst, []).append(line.src)
        out.setdefault(line.src, []).append(line.dst)
    for i in reversed(range(len(sheet.operators))):
        goals = {cards.get(dst) for dst in out.get(i, ())}
        if i not in cards and len(goals) == 1 and None not in goals and not into.get(i) and _is_own(sheet, i):
            cards[i] = next(goal for goal in goals if goal is not None)
    return cards


def _is_own(sheet: Operators, number: int) -> bool:
    """Whether an operator leads to nothing but what is on the sheet."""
    return not any(number in ends for ends in sheet.targets.values())


def _leads_to(sheet: Operators, experts: Sequence[int]) -> set[int]:
    """Return what any expert follows from."""
    before: dict[int, list[int]] = {}
    for line in sheet.lines:
        before.setdefault(line.dst, []).append(line.src)
    found: set[int] = set()
    todo = list(experts)
    while todo:
        for src in before.get(todo.pop(), ()):
            if src not in found:
                found.add(src)
                todo.append(src)
    return found


def _pack(sheet: Operators, numbers: Sequence[int]) -> list[list[int]]:
    """Cut into columns of about equal size, at the ends of modules where that is near."""
    if not numbers:
        return []
    count = -(-len(numbers) // _MAX_COLUMN)
    size = -(-len(numbers) // count)
    columns: list[list[int]] = [[]]
    for i, number in enumerate(numbers):
        is_boundary = i > 0 and _module(sheet, number) != _module(sheet, numbers[i - 1])
        full = len(columns[-1])
        if full >= size + 6 or (is_boundary and full >= size - 6 and len(numbers) - i > 4):
            columns.append([])
        columns[-1].append(number)
    return columns


def _module(sheet: Operators, number: int) -> str:
    return ".".join(sheet.operators[number].path.split(".")[:2])


def _column(sheet: Operators, numbers: Sequence[int]) -> Column:
    itself = "in no module" if sheet.layers == (-1,) else "the layer itself"
    names = dict.fromkeys(sheet.operators[i].path.split(".")[0] or itself for i in numbers)
    return Column(title=", ".join(names), numbers=tuple(numbers), is_experts=False)


def _add_ports(sheet: Operators, columns: Sequence[Column]) -> None:
    """Give each column its lines, and ports for what comes from and goes to other columns and sheets."""
    home = {number: i for i, column in enumerate(columns) for number in column.numbers}
    coming: dict[tuple[int, str], list[int]] = {}
    going: dict[int, list[int]] = {}
    for i, line in enumerate(sheet.lines):
        if home[line.src] == home[line.dst]:
            columns[home[line.src]].lines.append(i)
        else:
            coming.setdefault((home[line.dst], _name(sheet, columns, home, line.src)), []).append(i)
            going.setdefault(line.src, []).append(i)
    for (place, text), lines in coming.items():
        columns[place].ports.append(_port(sheet, f"from {text}", lines, is_source=True))
    leaving: dict[tuple[int, str], list[list[int]]] = {}
    for src, lines in going.items():
        places: dict[int, list[str]] = {}
        for i in lines:
            dst = sheet.lines[i].dst
            places.setdefault(home[dst], []).append(sheet.operators[dst].label)
        text = "; ".join(_name_goal(columns, place, labels) for place, labels in sorted(places.items()))
        leaving.setdefault((home[src], text), []).append(lines)
    for (place, text), found in leaving.items():
        # What many give away is said once for all of them; else an operator has a port of its own.
        is_shared = columns[place].is_experts or len(found) > _MAX_ROW
        for lines in [[i for one in found for i in one]] if is_shared else found:
            columns[place].ports.append(_port(sheet, f"to {text}", lines, is_source=False))
    for is_source, texts in ((True, sheet.sources), (False, sheet.targets)):
        for text, ends in texts.items():
            for place, column in enumerate(columns):
                here = {number: told for number, told in ends.items() if home[number] == place}
                if here:
                    num, size = (sum(told[k] for told in here.values()) for k in (0, 1))
                    said = f"{'from' if is_source else 'to'} {text}"
                    column.ports.append(
                        Port(text=said, is_source=is_source, ends=tuple(here), num_edges=num, num_bytes=size)
                    )


def _name(sheet: Operators, columns: Sequence[Column], home: Mapping[int, int], src: int) -> str:
    one = sheet.operators[src]
    return f"{'experts' if columns[home[src]].is_experts else f'column {home[src] + 1}'}: {one.label}"


def _name_goal(columns: Sequence[Column], place: int, labels: Sequence[str]) -> str:
    counted = [
        f"{label} x {labels.count(label)}" if labels.count(label) > 1 else label for label in dict.fromkeys(labels)
    ]
    return f"{'experts' if columns[place].is_experts else f'column {place + 1}'}: {', '.join(counted)}"


def _port(sheet: Operators, text: str, lines: Sequence[int], *, is_source: bool) -> Port:
    told = [sheet.lines[i] for i in lines]
    return Port(
        text=text,
        is_source=is_source,
        ends=tuple(sorted({line.dst if is_source else line.src for line in told})),
        num_edges=sum(line.num_edges for line in told),
        num_bytes=sum(line.num_bytes for line in told),
    )


def _port_size(port: Port) -> tuple[float, float]:
    lines = port_lines(port)
    wide = max(text_width(line, PORT_SIZE) for line in lines) + 12
    return min(wide, _PORT + 8), _PORT_LINE * len(lines) + 5


def _problem(sheet: Operators, column: Column, page: OperatorPage) -> Problem:
    spot = {number: i for i, number in enumerate(column.numbers)}
    sizes = [(page.places[number].width, page.places[number].height) for number in column.numbers]
    lines = [(spot[sheet.lines[i].src], spot[sheet.lines[i].dst]) for i in column.lines]
    for place, port in enumerate(column.ports, len(sizes)):
        lines += [(place, spot[end]) if port.is_source else (spot[end], place) for end in port.ends]
    sizes += [_port_size(port) for port in column.ports]
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
    rows = [boxes for boxes in alike.values() if len(boxes) > _MAX_ROW]
    return tuple(pair for boxes in rows for pair in zip(boxes, boxes[_MAX_ROW:], strict=False))


def _place_column(page: OperatorPage, number: int, column: Column, layout: Layout) -> tuple[float, float]:
    x, y = COLUMN_PAD, COLUMN_HEAD
    for i, operator in enumerate(column.numbers):
        page.places[operator].x, page.places[operator].y = layout.middles[i][0] + x, layout.middles[i][1] + y
    for i, port in enumerate(column.ports):
        at = layout.middles[len(column.numbers) + i]
        page.ports[number, i] = Rectangle(at[0] + x, at[1] + y, *_port_size(port))
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
        wide, high = _port_size(port)
        if x > left and x + wide > left + width:
            x, y, tall = left, y + tall + 5, 0.0
        page.ports[number, i] = Rectangle(x + wide / 2, y + high / 2, wide, high)
        x, tall = x + wide + 8, max(tall, high)
    return y + tall + 10
