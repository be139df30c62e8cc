"""Declared folds of decode steps: one node for steps that are like one that is drawn in full, with its count.

``decode steps 1-15, each like decode step 0``, a line with its GPUs where it folds only what they run, and ``stands for
5,190 recorded``: steps x what the nodes of the step that they are like stand for, one where a node says nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from truedag.tracer.audit.drawing.numbers import list_of, read_numbers

_FOLD = re.compile(
    rf"\bsteps?\s*{list_of()}[\s,;:()]*(?:(?:each|all|both|are|is)\s+)*"
    r"(?:like|(?:the\s+)?same\s+as|identical\s+to|equal\s+to)\s+(?:the\s+)?(?:decode\s+)?step\s*(\d{1,9})",
    re.I,
)
_STANDS = re.compile(r"\bstands?\s+for\s+(\d{1,3}(?:,\d{3})+|\d{1,15})\s*(?:recorded|nodes?\b|operators?\b)", re.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """What a label says of the steps that its node stands for."""

    steps: tuple[int, ...]
    like: int
    """The step that is drawn in full, as they are."""


def read_fold(text: str) -> Fold | None:
    """Return the fold that a label declares; None: it declares none."""
    if (match := _FOLD.search(text)) is None:
        return None
    return Fold(steps=read_numbers(match.group(1)), like=int(match.group(2)))


def read_count(text: str) -> int | None:
    """Return how many recorded nodes a label says that it stands for; None: it says nothing of it."""
    if (match := _STANDS.search(text)) is None:
        return None
    return int(match.group(1).replace(",", ""))
