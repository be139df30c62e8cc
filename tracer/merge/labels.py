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
from truedag.tracer.merge.sorting import renumber, stable_order
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

    Autograd numbers its nodes in each thread; an operator that makes one carries its number, and what runs in the
    backward pass carries the number and thread of its node. Operators that make none carry the next number as well, so
    the last to carry a number before the node runs is the one that made it. An operator of a backward pass can itself
    make nodes (double backward, recomputation): these belong to what it belongs to. The numbers are modulo 2^32.
    """
    if trace.meta.get("recorder") == "python":  # it sees only the last of the nodes made since the operator before
        return _forward_labels_of_gaps(trace, events)
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
    """For each event that runs a node: the last event before it that carried the node's number, -1 if none did."""
    threads = np.array([thread.autograd_thread for thread in trace.threads], np.int64)
    event = np.concatenate((maker, wants))
    number = np.concatenate((events.sequence[maker], events.backward_sequence[wants]))
    thread = renumber(np.concatenate((threads[events.place[maker]], events.fwd_thread[wants])))[1]
    # By node, and there in program order; what an event makes comes after what it runs in.
    order = stable_order(2 * event + (np.arange(len(event)) < len(maker)))
    node = (thread << 32) | (number % _MODULUS)
    order = order[stable_order(node[order])]
    is_maker, place = order < len(maker), np.arange(len(order))
    begins = np.diff(node[order], prepend=-1) != 0
    last = np.maximum.accumulate(np.where(is_maker, place, -1))
    first = np.maximum.accumulate(np.where(begins, place, 0))
    found = np.empty(len(event), np.int64)
    found[order] = np.where(last >= first, event[order][np.maximum(last, 0)], -1)
    return found[len(maker) :]


def _forward_labels_of_gaps(trace: Trace, events: Events) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same for a recorder that sees only the last of the nodes that an operator made."""
    label, context = np.zeros((2, len(events.op)), np.int64)
    made: dict[tuple[int, int], tuple[int, int]] = {}
    newest: dict[int, int] = {}
    asked = np.flatnonzero((events.sequence >= 0) | (events.backward_sequence >= 0))
    names = ("place", "label", "context", "fwd_thread", "backward_sequence", "sequence")
    columns = (getattr(events, name)[asked].tolist() for name in names)
    for event, place, *said, fwd_thread, backward_sequence, number in zip(asked.tolist(), *columns, strict=True):
        own_label, own_context = said
        if backward_sequence >= 0:
            forward = made.get((fwd_thread, backward_sequence), (0, 0))
            label[event], context[event] = forward
            own_label, own_context = own_label or forward[0], forward[1] or own_context
        if number >= 0:
            thread = trace.threads[place].autograd_thread
            made[thread, number] = own_label, own_context
            gap = (number - newest.get(place, number)) % _MODULUS
            for back in range(1, gap if gap < _LARGEST_GAP else 0):
                made.setdefault((thread, (number - back) % _MODULUS), (own_label, own_context))
            newest[place] = number
    return label, context
