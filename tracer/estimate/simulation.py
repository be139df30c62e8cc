"""Run a class graph on its resources: when each node begins and ends, if each takes as long as it is told to.

Theory of operation. A GPU computes one operator at a time, in the order of the program; each of its process groups
communicates once at a time. Beyond that a node begins when what leads to it has ended. Nodes are taken by number, which
is a topological order and on each rank the program's. A collective begins when the last of its classes has arrived; a
message arrives when it was sent and is received. Pipeline bubbles come out of that: no formula is behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """When what began and ended, in ns from the beginning; in the order of the class graph's rows."""

    start_ns: Floats  # [nodes]
    end_ns: Floats  # [nodes]
    arrive_ns: dict[tuple[int, int], float]  # by node's row and class: when it came to a collective


def simulate(nodes: pl.DataFrame, edges: pl.DataFrame, parts: pl.DataFrame, duration_ns: Floats) -> Simulated:
    """Simulate a class graph.

    Args:
        nodes: its nodes, by number.
        edges: its edges.
        parts: its participants: which classes take part in a collective, and which team a message goes through.
        duration_ns: [nodes] how long each takes alone.
    """
    ids = nodes["node"].to_numpy()
    src, dst = (np.searchsorted(ids, edges[name].to_numpy()) for name in ("src", "dst"))
    order = np.argsort(dst, kind="stable")
    begins = np.searchsorted(dst[order], np.arange(len(ids) + 1)).tolist()
    source = src[order].tolist()
    of_class = edges["rank_class"].to_numpy()[order].tolist()
    is_message = (edges["kind"] == "p2p").to_numpy()[order].tolist()
    team_of: list[list[tuple[int, int]]] = [[] for _ in range(len(ids))]
    rows = np.searchsorted(ids, parts["node"].to_numpy()).tolist()
    for row, rank_class, team in zip(rows, parts["rank_class"].to_list(), parts["team"].to_list(), strict=True):
        team_of[row].append((rank_class, team))
    own = nodes["rank_class"].to_list()
    is_compute = (nodes["kind"] == "compute").to_list()
    takes = duration_ns.tolist()
    start, end = [0.0] * len(ids), [0.0] * len(ids)
    computes: dict[int, float] = {}
    communicates: dict[tuple[int, int], float] = {}
    arrivals: dict[tuple[int, int], float] = {}
    for node in range(len(ids)):
        ready = 0.0
        arrived: dict[int, float] = {}
        for edge in range(begins[node], begins[node + 1]):
            before = source[edge]
            moment = start[before] if is_message[edge] else end[before]
            ready = max(ready, moment)
            if team_of[node]:
                rank_class = own[node] if is_message[edge] else of_class[edge]
                arrived[rank_class] = max(arrived.get(rank_class, 0.0), 0.0 if is_message[edge] else moment)
        if is_compute[node]:
            ready = max(ready, computes.get(own[node], 0.0))
        for lane in team_of[node]:
            ready = max(ready, communicates.get(lane, 0.0))
            arrivals[node, lane[0]] = arrived.get(lane[0], 0.0)
        start[node], end[node] = ready, ready + takes[node]
        if is_compute[node]:
            computes[own[node]] = end[node]
        for lane in team_of[node]:
            communicates[lane] = end[node]
    return Simulated(start_ns=np.array(start), end_ns=np.array(end), arrive_ns=arrivals)
