"""The columns of a sheet of operators: cut where a module ends and the next begins, with ports for what leaves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from truedag.tracer.views.engine import Layout
from truedag.tracer.views.font_metrics import text_width
from truedag.tracer.views.layout_text import wrap
from truedag.tracer.views.operators import Operators

MAX_ROW = 5  # boxes side by side that read and give the same
PORT_SIZE = 7.0
_MAX_COLUMN = 26  # operators
_PORT = 150.0
_PORT_LINE = 8.6


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


def cut_columns(sheet: Operators, cards: Mapping[int, int]) -> list[Column]:
    """Cut the operators into columns, those on cards into a panel of experts, and name what leaves them."""
    numbers = range(len(sheet.operators))
    experts = sorted(cards)
    first = min((i for i in experts if sheet.operators[i].expert >= 0), default=len(sheet.operators))
    leads = _leads_to(sheet, experts)
    before = [i for i in numbers if i not in cards and (i < first or i in leads)]
    after = [i for i in numbers if i not in cards and not (i < first or i in leads)]
    columns = [_column(sheet, part) for part in _pack(sheet, before)]
    if experts:
        columns.append(Column(title="experts", numbers=tuple(experts), is_experts=True))
    columns += [_column(sheet, part) for part in _pack(sheet, after)]
    _add_ports(sheet, columns)
    return columns


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
        is_shared = columns[place].is_experts or len(found) > MAX_ROW
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


def port_size(port: Port) -> tuple[float, float]:
    """Return how wide and high a port is."""
    lines = port_lines(port)
    wide = max(text_width(line, PORT_SIZE) for line in lines) + 12
    return min(wide, _PORT + 8), _PORT_LINE * len(lines) + 5


def port_lines(port: Port) -> list[str]:
    """Break a port's text as its box needs."""
    return wrap([port.text], _PORT - 8, size=PORT_SIZE)
