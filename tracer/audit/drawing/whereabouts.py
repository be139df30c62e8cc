"""Where a label says that something is: its ranks, layers, experts, stages, microbatches and decode steps."""

from __future__ import annotations

import re

from truedag.tracer.audit.drawing.numbers import IN_A_LINE, MOST_NUMBERS, list_of, read_numbers

Places = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
"""Experts and their ranks."""

_RANKS = list_of("gpus?", "ranks?", "devices?", "[gr]")
_LAYERS = list_of("layers?", "blocks?", "l")
_EXPERTS = list_of("experts?", "exp", "[eE]")
_NUMBERS: dict[str, tuple[re.Pattern[str], ...]] = {
    "ranks": (
        re.compile(
            r"(?<![a-z])(?:[gntx]pus?|ranks?|devices?|workers?|cuda|dev)(?:[\s_]*(?:ids?|nos?\.?))?\s*[:=#_\-]?\s*"
            + _RANKS,
            re.I,
        ),
        re.compile(r"(?:^|[\s_(,|@])r[_ ]?" + _RANKS + r"(?![A-Za-z0-9.])"),
    ),
    "layers": (
        re.compile(r"(?<![a-z])(?:layers?|blocks?)\s*[:=#_\-]?\s*l?" + _LAYERS, re.I),
        re.compile(r"(?:^|[\s_(,|])l[_ ]?" + _LAYERS + r"(?![A-Za-z0-9.])", re.I),
        re.compile(r"(?<![A-Za-z])(?:h|blk)\.(\d{1,4})(?=\.)"),
    ),
    "experts": (
        re.compile(
            r"(?<![a-z])(?:experts?|exp)\s*[:=#_\-]?\s*e?" + _EXPERTS + r"(?!\s*(?:experts|active|total|per))", re.I
        ),
        re.compile(r"(?:^|[\s_(,|])[eE][_ ]?" + _EXPERTS + r"(?![A-Za-z0-9.])"),
    ),
    "stages": (re.compile(r"(?<![a-z])(?:pipeline\s+|pp\s*)?stages?\s*[:=#_\-]?\s*" + list_of("stages?", "s"), re.I),),
    "microbatch": (re.compile(r"(?<![a-z])(?:micro[\s\-_]?batch|mb)\s*[:=#_\-]?\s*" + list_of(), re.I),),
    "decode_step": (
        re.compile(r"(?<![a-z])(?:decode[\s\-_]?step|step)\s*[:=#_\-]?\s*" + list_of(), re.I),
        # One number after "steps" is how many there are.
        re.compile(r"(?<![a-z])steps\s*[:=]?\s*(?=\d+[\s_]*(?:[-,&\u2013]|to|and|\.\.))" + list_of(), re.I),
    ),
}
# One of several lines that say which experts are where.
_PLACED = re.compile(
    rf"^[ \t]*(?:experts?[ \t:]*e?|e(?=\d))({IN_A_LINE})[ \t]*(?::|@|->|on|at)[ \t]*(?:gpus?|ranks?|devices?)"
    rf"[ \t:=#_]*({IN_A_LINE})[ \t]*$",
    re.I | re.M,
)
# A range that names its word again at its end: GPU0-GPU7, cuda:0..cuda:7, L0-L11, #0-#7.
_SAID_TWICE = re.compile(
    r"(?<![A-Za-z])([A-Za-z]{1,7}[\s:_#]?|#)(\d{1,9})(\s*(?:-|\u2013|\u2014|to|through|\.\.\.?|\u2026)\s*)\1(\d{1,9})",
    re.I,
)
_SLICE = re.compile(r"\[(\d{1,9}):(\d{1,9})\]")
# Whether 7 is one of them nobody can tell.
_HALF_OPEN = re.compile(r"\(\d{1,9}:\d{1,9}\)")
# What another part is like, whose number is not this one's.
_LIKENESS = re.compile(
    r"(?:same|identical|similar|like|copy|repeat\w*)(?:\s+(?:as|to|of|in))*\s+\w+\s*\d+(?:\s*-\s*\d+)?", re.I
)
_LONGEST_LIST = 16_000
# One of so many, not a list of two: layer 3/16; but ranks 0/4.
_ONE_OF = re.compile(r"(?<![\d/])(?<!s)(?<!s[\s:])(?<!s:\s)(\d{1,9})(\s?/\s?)(\d{1,9})(?!\d|\s?/)")
# From GPU 0 to GPU 4 goes one message, not five ranks.
_FROM_TO = re.compile(r"(?<=\d)\s+to\s+(?=(?:[gntx]pus?|ranks?|devices?|cuda)[\s:_#]*\d)", re.I)


def say_once(text: str, *, is_message: bool) -> str:
    """Write slices and ranges that name their word twice as plain ranges, without half-open ones and the 16 of 3/16.

    `is_message`: the text is of a message, which leads from one rank to the other.
    """
    text = _ONE_OF.sub(_first_of, _HALF_OPEN.sub(" ", _SLICE.sub(_closed, text)))
    return _SAID_TWICE.sub(r"\1\2\3\4", _FROM_TO.sub(" and ", text) if is_message else text)


def name_numbers(text: str) -> dict[str, tuple[int, ...]]:
    """Return the numbers that a text names, by what they count."""
    counted = _LIKENESS.sub(" ", text)
    told = {}
    for name, patterns in _NUMBERS.items():
        found: set[int] = set()
        for pattern in patterns:
            for match in pattern.finditer(counted):
                if len(found) < MOST_NUMBERS:
                    found.update(read_numbers(match.group(1)))
            if found:
                break
        if found:
            told[name] = tuple(sorted(found))
    return told


def read_places(label: str) -> tuple[str, Places]:
    """Return a label without the lines that say which experts are where, and these experts with their ranks."""
    lines = _PLACED.findall(label[:_LONGEST_LIST])
    if len(lines) < 2:
        return label, ()
    places = []
    total = 0
    for experts, ranks in lines:
        places.append((read_numbers(experts), read_numbers(ranks)))
        total += len(places[-1][0]) * len(places[-1][1])
        if total > MOST_NUMBERS:
            return label, ()
    return _PLACED.sub("", label), tuple(places)


def _closed(match: re.Match[str]) -> str:
    """Write a slice, whose end is not in it, as a range whose end is."""
    return f"[{match[1]}-{int(match[2]) - 1}]" if int(match[2]) > int(match[1]) else " "


def _first_of(match: re.Match[str]) -> str:
    """Leave out how many there are; 0/1 may be two of them."""
    return match[1] if int(match[3]) - int(match[1]) > 1 else match[0]
