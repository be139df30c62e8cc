"""Which tensors were set to memory that no operator made: buffers of Python's, memory that processes share.

`aten::set_` gives a tensor a storage. Whether an operator has filled that storage, the trace tells: it was seen
before, at the same address, and its memory has not been given back since. Else what lies there came from outside.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.places import find_memory
from truedag.tracer.record.trace import ThreadTrace, Trace


def find_outside(trace: Trace, setters: Sequence[int]) -> set[tuple[int, int]]:
    """Return the events, by position of the thread and of the event, that set a tensor to memory from outside.

    Args:
        trace: one rank's trace.
        setters: the numbers of the operators that set tensors to storages; their last tensor is the result.
    """
    chosen = [np.flatnonzero(np.isin(thread.events["op"], setters)) for thread in trace.threads]
    if not any(len(events) for events in chosen):
        return set()
    results = [_last_refs(thread, events) for thread, events in zip(trace.threads, chosen, strict=True)]
    storages = np.unique(
        np.concatenate([thread.refs["storage"][refs] for thread, refs in zip(trace.threads, results, strict=True)])
    )
    seen: dict[tuple[int, int], list[int]] = {}  # storage, address: when an event began that had it
    asked: list[tuple[int, int, int, int, int]] = []
    for place, thread in enumerate(trace.threads):
        refs = np.flatnonzero(np.isin(thread.refs["storage"], storages))
        event = np.searchsorted(thread.events["first_ref"], refs, side="right") - 1
        address, _ = find_memory(trace, thread, refs, event)
        start = thread.events["start_ns"][event]
        storage = thread.refs["storage"][refs].astype(np.int64)
        for key in zip(storage.tolist(), address.tolist(), start.tolist(), strict=True):
            seen.setdefault(key[:2], []).append(key[2])
        at = np.searchsorted(refs, results[place])
        for index, i in zip(chosen[place].tolist(), at.tolist(), strict=True):
            asked.append((place, index, int(storage[i]), int(address[i]), int(start[i])))
    freed = _frees(trace)
    named = {int(told["storage"]) for told in trace.named_tensors}
    found = set()
    for place, index, number, where, begin in asked:
        before = max((time for time in seen[number, where] if time < begin), default=None)
        if before is None:
            is_outside = number not in named
        else:
            is_outside = any(before < time <= begin for time in freed.get(where, ()))
        if is_outside:
            found.add((place, index))
    return found


def _last_refs(thread: ThreadTrace, events: NDArray[np.int64]) -> NDArray[np.int64]:
    chosen = thread.events[events]
    last: NDArray[np.int64] = chosen["first_ref"].astype(np.int64) + chosen["num_inputs"] + chosen["num_outputs"] - 1
    return last


def _frees(trace: Trace) -> dict[int, list[int]]:
    freed: dict[int, list[int]] = {}
    for thread in trace.threads:
        for address, time in zip(thread.frees["address"].tolist(), thread.frees["time_ns"].tolist(), strict=True):
            freed.setdefault(address, []).append(time)
    return freed
