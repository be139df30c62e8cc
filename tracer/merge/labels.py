"""What is known of where each operator belongs: module, layer, expert, microbatch, phase, step.

A label is what was said when the operator ran; an operator of the backward pass takes module and microbatch from the
forward operator whose autograd node runs, found by autograd's sequence numbers. What nobody said is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from truedag.tracer.record.format import EventFlags
from truedag.tracer.record.trace import Trace

_MODULUS = 1 << 32
# More nodes than one operator makes: where the numbers of two operators are this far apart, others lie between them.
_LARGEST_GAP = 1 << 16


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


class Labels:
    """The labels of one rank's events."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._forward = _forward_labels(trace)
        self._known: dict[tuple[int, int, int, int, bool], Label] = {}

    def of(self, thread: int, index: int, event: np.void) -> Label:
        """Return the label of the event at `index` of a thread's events."""
        label, context = int(event["label"]), int(event["context"])
        backward = bool(int(event["flags"]) & int(EventFlags.IN_BACKWARD))
        forward = self._forward.get((thread, index), (0, 0))
        key = (label, context, *forward, backward)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._make(label, context, forward, backward)
        return known

    def _make(self, label: int, context: int, forward: tuple[int, int], backward: bool) -> Label:
        module = self._trace.labels.get(label or forward[0], {})
        said = self._trace.contexts.get(context, {})
        of_forward = self._trace.contexts.get(forward[1], {})
        microbatch = said.get("microbatch")
        if microbatch is None and backward:
            microbatch = of_forward.get("microbatch")
        return Label(
            module=module.get("module"),
            layer=module.get("layer"),
            expert=module.get("expert"),
            category=module.get("category"),
            microbatch=microbatch,
            phase="backward" if backward else said.get("phase"),
            step=said.get("step"),
            decode_step=said.get("decode_step"),
        )


def _forward_labels(trace: Trace) -> dict[tuple[int, int], tuple[int, int]]:
    """(thread, position of event) -> (label, context) of the forward operator that a backward one belongs to.

    Autograd numbers its nodes in each thread; an operator carries the number of the newest node, if any was made since
    the operator before it: these are its own. What runs in the backward pass carries the number and thread of its node.
    An operator of a backward pass can itself make nodes (double backward, recomputation): these belong to what it
    belongs to. The numbers are modulo 2^32.
    """
    rows = [
        (int(thread.events["start_ns"][index]), place, int(index))
        for place, thread in enumerate(trace.threads)
        for index in np.flatnonzero((thread.events["sequence"] >= 0) | (thread.events["backward_sequence"] >= 0))
    ]
    made: dict[tuple[int, int], tuple[int, int]] = {}
    newest: dict[int, int] = {}
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for _, place, index in sorted(rows):
        thread = trace.threads[place]
        event = thread.events[index]
        said = (int(event["label"]), int(event["context"]))
        if event["backward_sequence"] >= 0:
            node = (int(event["fwd_thread"]), int(event["backward_sequence"]))
            found[thread.thread, index] = made.get(node, (0, 0))
            forward = found[thread.thread, index]
            said = (said[0] or forward[0], forward[1] or said[1])
        number = int(event["sequence"])
        if number >= 0:
            made[thread.autograd_thread, number] = said
            gap = (number - newest.get(place, number)) % _MODULUS
            for back in range(1, gap if gap < _LARGEST_GAP else 0):
                made.setdefault((thread.autograd_thread, (number - back) % _MODULUS), said)
            newest[place] = number
    return found
