"""Tie every kernel to the operator that launched it, and set the GPU's clock against the host's.

Theory of operation. A kernel carries the number of the API call that launched it, the call its thread and times; the
operator is the innermost one of that thread around the call. Kineto has brought the GPU's times onto the host's clock;
what is left shows where a kernel begins before its launch, or ends after the host has waited for it: both bound the
GPU clock's error, in windows of time, and where 0 is out of bounds the times are corrected. Kernels of NCCL tell when a
communication really ran. A group of communications is launched as one when its last call has been made, outside of
every operator: its kernel is that of the thread's communications since the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.merge.kernels import DeviceTrace
from truedag.tracer.merge.nodes import CommRecord, RankNodes
from truedag.tracer.merge.streams import host_waits, launch_order, waited_for
from truedag.tracer.record.trace import ThreadTrace

_NCCL = ("ncclDevKernel", "ncclKernel")
_WINDOW = 256  # kernels
_MAX_WINDOWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuClock:
    """What was added to the GPU's times at the first kernel, how much more at the last, and how wrong they may be."""

    correction_ns: int
    drift_ns: int
    error_ns: int | None  # against the rank's CLOCK_MONOTONIC; None: nothing bounds it


@dataclass(frozen=True, slots=True, kw_only=True)
class RankKernels:
    """One rank's kernels in launch order, and whose they are."""

    trace: DeviceTrace
    node: NDArray[np.int64]  # [kernels] the operator's local number; -1: launched outside of every operator
    call: NDArray[np.int64]  # [kernels] place in trace.calls; -1: launched before the recording
    thread: NDArray[np.int64]  # [calls] the recorder's number of the thread; -1: not one of its threads
    waits: tuple[NDArray[np.int64], NDArray[np.int64]]  # of `waited_for`
    clock: GpuClock
    groups: Mapping[int, list[int]]  # kernel of a group of communications -> the group's nodes; its own is the last

    @property
    def is_nccl(self) -> NDArray[np.bool_]:
        """[kernels] Which are a communication of NCCL."""
        named = np.array([name.startswith(_NCCL) for name in self.trace.names], bool)
        of_kernels: NDArray[np.bool_] = named[self.trace.kernels["name"]]
        return of_kernels

    def is_graph(self, kernel: int) -> bool:
        """Whether a CUDA graph's launch launched it."""
        call = int(self.call[kernel])
        named = call >= 0 and "GraphLaunch" in self.trace.names[int(self.trace.calls["name"][call])]
        return named or int(self.trace.kernels["graph"][kernel]) > 0


def tie_kernels(trace: DeviceTrace, nodes: RankNodes) -> RankKernels:
    """Find each kernel's launch and operator; all times are the host's afterwards."""
    kernels = trace.kernels[launch_order(trace.kernels)]
    calls = trace.calls
    call = calls_of(kernels, calls)
    waits = waited_for(kernels, trace.syncs)
    shift, clock = _calibrate(kernels, calls["start_ns"], call, trace.syncs["end_ns"], host_waits(trace.syncs, waits))
    if clock.error_ns is not None:
        clock = replace(clock, error_ns=clock.error_ns + trace.clock_error_ns)
    kernels["start_ns"] += shift
    kernels["end_ns"] += shift
    thread = _threads(calls["thread"], nodes.trace.threads)
    moments = (calls["start_ns"] + calls["end_ns"]) // 2  # away from the operator's ends, which are another clock's
    owner = innermost(moments, thread, nodes.thread, nodes.start_ns, nodes.end_ns)
    node = np.where(call >= 0, np.append(owner, -1)[call], -1)
    tied = RankKernels(
        trace=replace(trace, kernels=kernels),
        node=node,
        call=call,
        thread=thread,
        waits=waits,
        clock=clock,
        groups={},
    )
    groups = _groups(tied, nodes)
    for kernel, group in groups.items():
        node[kernel] = group[-1]
    return replace(tied, groups=groups)


def innermost(
    moments: NDArray[np.int64],
    threads: NDArray[np.int64],
    node_threads: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the innermost interval of the same thread around each moment, -1 where there is none.

    Args:
        moments: [moments] when.
        threads: [moments] the thread of each, -1 for one that is in no interval.
        node_threads: [intervals] the thread of each.
        starts: [intervals] ascending; two intervals of a thread are apart, or one is inside the other.
        ends: [intervals].
    """
    found = np.full(len(moments), -1, np.int64)
    for thread in np.unique(threads[threads >= 0]).tolist():
        mine = np.flatnonzero(node_threads == thread)
        chosen = threads == thread
        start, end = starts[mine], ends[mine]
        around = _around(start, end)
        at = np.searchsorted(start, moments[chosen], "right") - 1
        while (over := (at >= 0) & (np.append(end, 0)[at] < moments[chosen])).any():
            at[over] = around[at[over]]
        found[chosen] = np.where(at >= 0, np.append(mine, -1)[at], -1)
    return found


def _around(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each interval's next larger one around it, or -1."""
    around = np.full(len(starts), -1, np.int64)
    if not bool(np.any(starts[1:] < ends[:-1])):
        return around
    stack: list[int] = []
    for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        while stack and (ends[stack[-1]] < end or ends[stack[-1]] <= start):
            stack.pop()
        around[i] = stack[-1] if stack else -1
        stack.append(i)
    return around


def calls_of(records: NDArray[np.void], calls: NDArray[np.void]) -> NDArray[np.int64]:
    """Return the call of each record's number (-1: none), the outermost where one has made another of the same."""
    order = np.lexsort((calls["start_ns"], calls["correlation"]))
    numbers = np.append(calls["correlation"][order], np.iinfo(np.int64).max)
    place = np.searchsorted(numbers, records["correlation"], "left")
    return np.where(numbers[place] == records["correlation"], np.append(order, -1)[place], -1)


def _threads(threads: NDArray[np.int64], recorded: Sequence[ThreadTrace]) -> NDArray[np.int64]:
    """The recorder's numbers of Kineto's threads.

    Kineto names a thread that it has not met by the lower half of its pthread_t without the sign, and of a recording
    without CPU activities it has met none.
    """
    numbers: dict[int, int] = {}
    for one in recorded:
        low = one.pthread & 0xFFFFFFFF
        numbers[min(low, (1 << 32) - low)] = one.thread
    numbers |= {one.os_thread: one.thread for one in recorded}
    numbers.pop(0, None)  # a trace that does not say
    some, place = np.unique(threads, return_inverse=True)
    known = np.array([numbers.get(thread, -1) for thread in some.tolist()], np.int64)
    return known[place] if len(some) else np.zeros(0, np.int64)


def _calibrate(
    kernels: NDArray[np.void],
    call_starts: NDArray[np.int64],
    call: NDArray[np.int64],
    sync_ends: NDArray[np.int64],
    waits: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> tuple[NDArray[np.int64], GpuClock]:
    """What to add to each kernel's times so that it begins after its launch and ends before the host has waited."""
    launched = np.flatnonzero(call >= 0)
    nothing = np.zeros(len(kernels), np.int64)
    if not len(launched):
        return nothing, GpuClock(correction_ns=0, drift_ns=0, error_ns=None)
    starts = kernels["start_ns"]
    least = call_starts[call[launched]] - starts[launched]  # the shift is at least that, and at most this:
    waited = waits[1]
    most = sync_ends[waits[0]] - kernels["end_ns"][waited]
    first, last = int(starts[launched].min()), int(starts[launched].max())
    count = min(_MAX_WINDOWS, 1 + len(launched) // _WINDOW)
    width = (last - first) // count + 1
    window = np.clip((starts - first) // width, 0, count - 1)
    low, high = np.full(count, np.iinfo(np.int64).min // 2), np.full(count, np.iinfo(np.int64).max // 2)
    np.maximum.at(low, window[launched], least)
    np.minimum.at(high, window[waited], most)
    wanted = np.maximum(np.minimum(0, high), low)  # where they contradict each other, causality of the launch holds
    wanted = np.where(low > np.iinfo(np.int64).min // 2, wanted, 0)
    shift = np.rint(np.interp(starts - first, (np.arange(count) + 0.5) * width, wanted)).astype(np.int64)
    shift += max(0, int((least - shift[launched]).max()))
    ends = shift[[int(starts.argmin()), int(starts.argmax())]].tolist()
    error = None
    if len(waited):
        slack = np.full((2, count), np.iinfo(np.int64).max)
        np.minimum.at(slack[0], window[launched], shift[launched] - least)
        np.minimum.at(slack[1], window[waited], most - shift[waited])
        known = slack[slack < np.iinfo(np.int64).max]
        error = int(np.abs(known).max()) + int(np.abs(np.diff(wanted)).max(initial=0))
    return shift, GpuClock(correction_ns=ends[0], drift_ns=ends[1] - ends[0], error_ns=error)


def _groups(tied: RankKernels, nodes: RankNodes) -> dict[int, list[int]]:
    """Kernels of NCCL outside of every operator, with the communications (local nodes) that each must be.

    These are the thread's communications without a kernel since the last that had one. A group of several
    communicators has several kernels, and nothing says which is whose: they stay alone.
    """
    trace, is_nccl = tied.trace, tied.is_nccl
    alone: dict[tuple[int, int], list[int]] = {}
    with_kernel = set(tied.node[is_nccl].tolist())
    by_thread: dict[int, list[int]] = {}
    for record in nodes.comms:
        by_thread.setdefault(int(nodes.thread[record.node]), []).append(record.node)
    for kernel in np.flatnonzero(is_nccl & (tied.node < 0) & (tied.call >= 0)).tolist():
        call = int(tied.call[kernel])
        mine = by_thread.get(int(tied.thread[call]), [])
        before = int(np.searchsorted(nodes.start_ns[mine], trace.calls["start_ns"][call])) if mine else 0
        alone.setdefault((int(tied.thread[call]), before), []).append(kernel)
    found: dict[int, list[int]] = {}
    done: dict[int, int] = {}
    for (thread, before), kernels in sorted(alone.items()):
        first = before
        while first > done.get(thread, 0) and by_thread[thread][first - 1] not in with_kernel:
            first -= 1
        if len(kernels) == 1 and first < before:
            found[kernels[0]] = by_thread[thread][first:before]
        done[thread] = before
    return found


def with_works(nodes: RankNodes, tied: RankKernels) -> list[CommRecord]:
    """Return the communications with the times of their kernels of NCCL as those of the work itself."""
    kernels = tied.trace.kernels
    times: dict[int, tuple[int, int]] = {}
    for kernel in np.flatnonzero(tied.is_nccl & (tied.node >= 0)).tolist():
        start, end = int(kernels["start_ns"][kernel]), int(kernels["end_ns"][kernel])
        for node in tied.groups.get(kernel, [int(tied.node[kernel])]):
            known = times.get(node, (start, end))
            times[node] = (min(start, known[0]), max(end, known[1]))
    return [
        replace(record, work_start_ns=times[record.node][0], work_end_ns=times[record.node][1])
        if record.node in times
        else record
        for record in nodes.comms
    ]
