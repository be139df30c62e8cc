"""What the streams of a GPU say of the order of kernels: one after the other on a stream, and waits between streams.

API calls are numbered in the order in which they were made (`correlation`), and a stream runs what is launched on it in
that order. An event stands for what was launched on its stream before it was recorded. A wait of a stream for an event
holds back what is launched on that stream afterwards; a wait of the host holds back the host.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.kernels import NONE, SYNC_KINDS

_STREAM, _CONTEXT, _EVENT, _STREAM_WAIT = range(len(SYNC_KINDS))


def launch_order(kernels: NDArray[np.void]) -> NDArray[np.int64]:
    """Return the order (indices) in which streams come one after the other, each in the order of its launches."""
    return np.lexsort((kernels["start_ns"], kernels["correlation"], kernels["stream"], kernels["device"]))


def stream_pieces(kernels: NDArray[np.void]) -> list[tuple[int, int]]:
    """Return where each stream's kernels begin and end; `kernels` are in launch order."""
    if not len(kernels):
        return []
    changes = (np.diff(kernels["stream"]) != 0) | (np.diff(kernels["device"]) != 0)
    bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(kernels)]
    return list(pairwise(bounds))


def waited_for(kernels: NDArray[np.void], syncs: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair each synchronisation with the last kernel that it waits for on a stream (a context's: on every stream).

    An event that was recorded before the recording, or whose stream is unknown, is waited for by nobody.
    """
    by_event = np.isin(syncs["kind"], (_EVENT, _STREAM_WAIT))
    streams = np.where(by_event, syncs["event_stream"], syncs["stream"])
    limits = np.where(by_event, syncs["event_correlation"], syncs["correlation"])
    found_syncs, found_kernels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for begin, end in stream_pieces(kernels):
        here = (syncs["device"] == kernels["device"][begin]) & (limits != NONE)
        here &= (streams == kernels["stream"][begin]) | (syncs["kind"] == _CONTEXT)
        chosen = np.flatnonzero(here)
        last = np.searchsorted(kernels["correlation"][begin:end], limits[chosen], "left") - 1
        found_syncs.append(chosen[last >= 0])
        found_kernels.append(begin + last[last >= 0])
    return np.concatenate(found_syncs), np.concatenate(found_kernels)


def order_pairs(
    kernels: NDArray[np.void], syncs: NDArray[np.void], waits: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all (before, after) pairs of kernels that follow on a stream, or that a stream's wait sets in order."""
    before, after = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    wait, kernel = waits
    for begin, end in stream_pieces(kernels):
        numbers = np.arange(begin, end)
        before.append(numbers[:-1])
        after.append(numbers[1:])
        here = (syncs["device"][wait] == kernels["device"][begin]) & (syncs["stream"][wait] == kernels["stream"][begin])
        here &= syncs["kind"][wait] == _STREAM_WAIT
        held = np.searchsorted(kernels["correlation"][begin:end], syncs["correlation"][wait[here]], "right")
        before.append(kernel[here][held < end - begin])
        after.append(begin + held[held < end - begin])
    return np.concatenate(before), np.concatenate(after)


def host_waits(
    syncs: NDArray[np.void], waits: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pairs of `waited_for` in which it is the host that waits."""
    wait, kernel = waits
    is_host = syncs["kind"][wait] != _STREAM_WAIT
    return wait[is_host], kernel[is_host]
