"""Where the storages of tensors had their memory when an event began: address and size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.record.trace import ThreadTrace, Trace


def find_memory(
    trace: Trace, thread: ThreadTrace, refs: NDArray[np.int64], event: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return address and bytes of the storages of refs, as this thread saw them last, or as they were seen first.

    Args:
        trace: one rank's trace.
        thread: one of its threads.
        refs: positions in the thread's refs.
        event: of each, the position of its event.
    """
    storage = thread.refs["storage"][refs].astype(np.int64)
    found = []
    places = thread.places
    width = len(thread.events) + 2
    order = np.lexsort((np.arange(len(places)), places["event"], places["storage"]))
    key = places["storage"][order].astype(np.int64) * width + np.minimum(places["event"][order], width - 1)
    last = np.searchsorted(key, storage * width + event, side="right") - 1
    told = (last >= 0) & (np.append(places["storage"][order], 0)[last] == storage)
    for name in ("address", "bytes"):
        first = np.concatenate([np.zeros(1, np.uint64), trace.storage_records[name]])[storage].astype(np.int64)
        latest = np.append(places[name][order], 0)[last].astype(np.int64)
        found.append(np.where(told, latest, first))
    return found[0], found[1]
