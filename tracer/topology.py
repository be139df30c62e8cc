"""Number the nodes so that every edge leads from a lower to a higher number (DESIGN rule 7).

Nodes are taken by time, which is nearly always such an order already and is checked as a whole; where it is not, they
are taken as their predecessors allow, earliest first. If that is impossible there is a cycle, and it is shown.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray


def number_nodes(
    time_ns: NDArray[np.int64], src: NDArray[np.int64], dst: NDArray[np.int64]
) -> tuple[NDArray[np.int64], list[int]]:
    """Return each node's number, and a cycle as a list of nodes (empty where there is none; then the numbers hold).

    Args:
        time_ns: [nodes] when each node began; ties keep their order.
        src: [edges] where edges begin.
        dst: [edges] where they end.
    """
    number = np.empty(len(time_ns), np.int64)
    number[np.argsort(time_ns, kind="stable")] = np.arange(len(time_ns))
    if bool(np.all(number[src] < number[dst])):
        return number, []
    return _by_predecessors(time_ns, src, dst)


def _by_predecessors(
    time_ns: NDArray[np.int64], src: NDArray[np.int64], dst: NDArray[np.int64]
) -> tuple[NDArray[np.int64], list[int]]:
    count = len(time_ns)
    order = np.argsort(src, kind="stable")
    targets = dst[order].tolist()
    begins = np.searchsorted(src[order], np.arange(count + 1)).tolist()
    waiting = np.bincount(dst, minlength=count).tolist()
    times = time_ns.tolist()
    ready = [(times[node], node) for node in range(count) if waiting[node] == 0]
    heapq.heapify(ready)
    number = np.full(count, -1, np.int64)
    done = 0
    while ready:
        _, node = heapq.heappop(ready)
        number[node] = done
        done += 1
        for target in targets[begins[node] : begins[node + 1]]:
            waiting[target] -= 1
            if waiting[target] == 0:
                heapq.heappush(ready, (times[target], target))
    if done == count:
        return number, []
    return number, _find_cycle(number, src, dst)


def _find_cycle(number: NDArray[np.int64], src: NDArray[np.int64], dst: NDArray[np.int64]) -> list[int]:
    """Walk backwards among the nodes that could not be numbered: each has a predecessor among them."""
    stuck = number < 0
    inside = stuck[src] & stuck[dst]
    before = dict(zip(dst[inside].tolist(), src[inside].tolist(), strict=True))
    node = next(iter(before))
    seen: dict[int, int] = {}
    path: list[int] = []
    while node not in seen:
        seen[node] = len(path)
        path.append(node)
        node = before[node]
    return path[seen[node] :][::-1]
