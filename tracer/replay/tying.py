"""Which recorded call, and which named value, each node of the graph is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from truedag.tracer.errors import ReplayError
from truedag.tracer.graph import Graph
from truedag.tracer.replay.calls import Call, NamedValue, RankRecording


def tie_calls(
    graph: Graph, nodes: pl.DataFrame, recordings: Mapping[int, RankRecording]
) -> dict[int, tuple[Call, ...]]:
    """Return each operator's call, and each collective's calls by rank: by the moment at which the rank made it.

    Raises:
        ReplayError: the graph is of other traces.
    """
    origin = int(graph.meta["clock_origin_ns"])
    offsets = dict(graph.ranks.select("rank", "clock_offset_ns").collect().rows())
    moments: list[tuple[int, int, int]] = (
        nodes.filter(
            pl.col("kind").is_in(["compute", "send", "recv"]) | (pl.col("kind") == "collective") & (pl.col("rank") >= 0)
        )
        .select("node", "rank", "host_start_ns")
        .rows()
    )
    whole = nodes.filter((pl.col("kind") == "collective") & (pl.col("rank") < 0)).select("node")
    parts = graph.participants.collect().join(whole, on="node", how="semi")
    moments += parts.select("node", "rank", "arrive_ns").rows()
    ops = dict(nodes.select("node", "op").rows())
    found: dict[int, tuple[Call, ...]] = {}
    for node, rank, time in sorted(moments):
        recording = recordings.get(rank)
        index = None if recording is None else recording.starts.get(time + origin - offsets[rank])
        call = None if recording is None or index is None else recording.call(index)
        if call is None or call.op.rpartition(".")[0] != ops[node]:
            raise ReplayError(
                f"node {node} ({ops[node]} on rank {rank}) is not in the traces: merge these traces again"
            )
        found[node] = (*found.get(node, ()), call)
    return found


def tie_outputs(nodes: pl.DataFrame, named: Sequence[NamedValue]) -> dict[int, list[NamedValue]]:
    """Return for each output the values that it may be, in the order in which they were named."""
    outputs = nodes.filter(pl.col("kind") == "output").select("node", "rank", "label").rows()
    has_final = {value.ref.key[0] for value in named if value.is_final}
    found: dict[int, list[NamedValue]] = {}
    for node, rank, label in outputs:
        found[node] = [
            value
            for value in named
            if value.name == label
            and value.ref.key[0] == rank
            and (value.role == "output" or (value.role == "parameter" and (value.is_final or rank not in has_final)))
        ]
    return found
