"""What is known of where each operator belongs: module, layer, expert, microbatch, phase, step.

A label is what was said when the operator ran; an operator of the backward pass takes module and microbatch from the
forward operator whose autograd node runs, found by autograd's sequence numbers. What nobody said is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.events import Events
from truedag.tracer.record.format import EventFlags
from truedag.tracer.record.trace import Trace

UNKNOWN = np.iinfo(np.int32).min  # of a number; of text it is -1
NUMBERS = ("layer", "expert", "microbatch", "step", "decode_step")
TEXTS = ("module", "category", "phase", "gradient")

_MODULUS = 1 << 32
# More nodes than one operator makes: where the numbers of two operators are this far apart, others lie between them.
_LARGEST_GAP = 1 << 16
# How deep backward passes of backward passes are followed for all events at once.
_DEPTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What is known of where a node belongs; None is unknown."""

    module: str | None = None
    layer: int | None = None
    expert: int | None = None
    category: str | None = None
    microbatch: int | None = None
    phase: str | None = None
    step: int | None = None
    decode_step: int | None = None
    gradient: str | None = None  # the parameter whose gradient this adds to


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelColumns:
    """The labels of many nodes: numbers (`UNKNOWN`: nobody said), and texts as places in `texts` (-1: nobody said)."""

    columns: dict[str, NDArray[np.int32]]  # of NUMBERS and TEXTS
    texts: list[str]

    def __len__(self) -> int:
        return len(self.columns["layer"])

    def label(self, node: int) -> Label:
        """Return one node's label."""
        said: dict[str, Any] = {}
        for name, column in self.columns.items():
            value = int(column[node])
            if name in TEXTS:
                said[name] = None if value < 0 else self.texts[value]
            else:
                said[name] = None if value == UNKNOWN else value
        return Label(**said)

    def labels(self) -> list[Label]:
        """Return all labels."""
        said = [
            [None if value < 0 else self.texts[value] for value in column.tolist()]
            if name in TEXTS
            else [None if value == UNKNOWN else value for value in column.tolist()]
            for name, column in self.columns.items()
        ]
        return [Label(**dict(zip(self.columns, row, strict=True))) for row in zip(*said, strict=True)]


class Texts:
    """Numbers texts as they come."""

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self._places = {text: place for place, text in enumerate(texts)}

    def place(self, text: str | None) -> int:
        """Return a text's place, -1 for none."""
        return -1 if text is None else self._places.setdefault(text, len(self._places))

    def told(self) -> list[str]:
        """Return the texts by place."""
        return list(self._places)


def label_columns(labels: Sequence[Label]) -> LabelColumns:
    """Turn labels into columns."""
    texts = Texts()
    columns = {
        name: np.array(
            [
                texts.place(value) if name in TEXTS else UNKNOWN if value is None else value
                for value in (getattr(label, name) for label in labels)
            ],
            np.int32,
        )
        for name in (*NUMBERS, *TEXTS)
    }
    return LabelColumns(columns=columns, texts=texts.told())


def find_labels(trace: Trace, events: Events, chosen: NDArray[np.int64]) -> LabelColumns:
    """Return the labels of the chosen events."""
    texts = Texts()
    modules = {
        name: _table(trace.labels, name, texts if name in TEXTS else None)
        for name in ("module", "layer", "expert", "category")
    }
    said = {
        name: _table(trace.contexts, name, texts if name in TEXTS else None)
        for name in ("microbatch", "phase", "step", "decode_step")
    }
    forward_label, forward_context = _forward_labels(trace, events)
    own = events.label[chosen]
    of_module = _rows(trace.labels, np.where(own > 0, own, forward_label[chosen]))
    context = _rows(trace.contexts, events.context[chosen])
    of_forward = _rows(trace.contexts, forward_context[chosen])
    is_backward = (events.flags[chosen] & int(EventFlags.IN_BACKWARD)) != 0
    microbatch = said["microbatch"][context]
    microbatch = np.where((microbatch == UNKNOWN) & is_backward, said["microbatch"][of_forward], microbatch)
    backward = texts.place("backward")
    columns = {
        **{name: table[of_module] for name, table in modules.items()},
        "microbatch": microbatch,
        "phase": np.where(is_backward, np.int32(backward), said["phase"][context]),
        "step": said["step"][context],
        "decode_step": said["decode_step"][context],
        "gradient": np.full(len(chosen), -1, np.int32),
    }
    return LabelColumns(columns=columns, texts=texts.told())


def _rows(told: Mapping[int, Any], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where `_table` puts what has these numbers; 0: nothing has."""
    given = np.array([*sorted(told), np.iinfo(np.int64).max], np.int64)
    if len(given) == 1:
        return np.zeros(len(numbers), np.int64)
    if int(given[-2]) < 2 * len(given) + (1 << 16):
        row = np.zeros(int(given[-2]) + 2, np.int64)
        row[given[:-1]] = np.arange(1, len(given))
        return row[np.minimum(numbers, len(row) - 1)]
    place = np.searchsorted(given, numbers)
    return np.where(given[place] == numbers, place + 1, 0)


def _table(told: Mapping[int, Mapping[str, Any]], name: str, texts: Texts | None) -> NDArray[np.int32]:
    """One field of what was told, by number, after a row for what nobody said."""
    values: list[Any] = [None, *(told[number].get(name) for number in sorted(told))]
    if texts is not None:
        return np.array([texts.place(None if value is None else str(value)) for value in values], np.int32)
    return np.array([UNKNOWN if value is None else int(value) for value in values], np.int32)


def _forward_labels(trace: Trace, events: Events) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[events] The label and the context of the forward operator that an operator of a backward pass belongs to, or 0.

    Autograd numbers its nodes in each thread; an operator carries the number of the newest node, if any was made since
    the operator before it: these are its own. What runs in the backward pass carries the number and thread of its node.
    An operator of a backward pass can itself make nodes (double backward, recomputation): these belong to what it
    belongs to. The numbers are modulo 2^32.
    """
    maker = np.flatnonzero(events.sequence >= 0)
    wants = np.flatnonzero(events.backward_sequence >= 0)
    label, context = np.zeros((2, len(events.op)), np.int64)
    if not len(wants):
        return label, context
    parent = _makers(trace, events, maker, wants)
    parent_of = np.full(len(events.op), -1, np.int64)
    parent_of[wants] = parent
    has_parent = parent_of >= 0
    asked, done = np.flatnonzero(has_parent), ~has_parent
    own_label, own_context = events.label, events.context
    for _ in range(_DEPTH):
        ready = asked[done[parent_of[asked]]]
        if not len(ready):
            break
        above = parent_of[ready]
        label[ready] = np.where(own_label[above] > 0, own_label[above], label[above])
        context[ready] = np.where(context[above] > 0, context[above], own_context[above])
        done[ready] = True
        asked = asked[~done[asked]]
    for event in asked.tolist():
        before = int(parent_of[event])
        label[event] = own_label[before] or label[before]
        context[event] = context[before] or own_context[before]
    return label, context


def _makers(trace: Trace, events: Events, maker: NDArray[np.int64], wants: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each event that runs a node: the event before it that made the node, -1 if none did.

    That is the first of the node's thread to carry the node's number or a higher one.
    """
    threads = np.array([thread.autograd_thread for thread in trace.threads], np.int64)
    thread_of = threads[events.place[maker]]
    found = np.full(len(wants), -1)
    for thread in np.unique(thread_of).tolist():
        makers = maker[thread_of == thread]
        carried = events.sequence[makers]
        carried = carried[0] + np.concatenate(([0], np.cumsum(np.diff(carried) % _MODULUS)))
        asked = np.flatnonzero(events.fwd_thread[wants] == thread)
        newest = np.searchsorted(makers, wants[asked]) - 1  # by then
        asked, newest = asked[newest >= 0], carried[newest[newest >= 0]]
        number = newest - (newest - events.backward_sequence[wants[asked]]) % _MODULUS
        place = np.searchsorted(carried, number)
        gap = carried[place] - carried[np.maximum(place - 1, 0)]
        is_known = (carried[place] == number) | ((place > 0) & (gap < _LARGEST_GAP))
        found[asked[is_known]] = makers[place[is_known]]
    return found
