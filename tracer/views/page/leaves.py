"""The finest nodes that the page shows: one operator of one module, over all ranks and microbatches that ran it.

Nodes of the graph are one leaf if they agree in pass, stage, layer, module, operator and in which of several such
calls they are. Of parameters, inputs and outputs those of one name are one leaf. Where that would make a circle, a leaf
is split (`segments.py`), so that the leaves are a DAG, numbered topologically. Many decode steps are one: edges that
lead from one step to another would make it a circle, and are counted instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from truedag.tracer.graph import Graph
from truedag.tracer.topology import number_nodes
from truedag.tracer.views.page.segments import Ints, find_circles, split_parts

COMMUNICATIONS = ("collective", "send", "recv")
_ENDS = ("parameter", "input", "output")
_PLACE = ("step", "decode_step", "phase", "stage", "layer", "module", "expert", "kind", "op", "label")
_TOLD = ("category", "inputs", "outputs")
_AMOUNTS = ("flops", "bytes_read", "bytes_written")
_MOST_DECODE_STEPS = 16  # that are told apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaves:
    """The graph's nodes as leaves, and what every node did on every rank.

    Attributes:
        table: one row a leaf in topological order: `_PLACE`, category, inputs, outputs (of its first node), num_nodes,
            num_shapes (how many different of these), flops, bytes_read, bytes_written, num_measured, num_estimated.
        edges: src, dst (leaves), kind, num_edges, bytes; data and messages alone, between different leaves.
        num_inner_edges: edges between nodes of one leaf.
        num_decode_steps: how many decode steps are one; 0: they are told apart, or there are none.
        num_carried_edges: edges from one of these to another.
        parts: one row for each node on each rank that took part: node, leaf, rank, kind, lane, microbatch, arrive_ns,
            start_ns, end_ns, timing, bytes (that a rank gave to a communication), group (-1: no communication).
        node, leaf: [nodes] the graph's numbers, rising, and their leaves.
    """

    table: pl.DataFrame
    edges: pl.DataFrame
    num_inner_edges: int
    num_decode_steps: int
    num_carried_edges: int
    parts: pl.DataFrame
    node: Ints
    leaf: Ints


def find_leaves(graph: Graph) -> Leaves:
    """Fold a graph to its leaves."""
    columns = dict.fromkeys(("node", "rank", "thread", "stream", "microbatch", "start_ns", "end_ns", "timing", *_PLACE))
    nodes = graph.nodes.select(*columns, *_TOLD, *_AMOUNTS).collect()
    participants = graph.participants.select(
        "node", "rank", "group", "arrive_ns", "start_ns", "end_ns", "send_bytes"
    ).collect()
    nodes = _place_communications(nodes, participants, graph.ranks.select("rank", "pp").collect())
    decode = nodes["decode_step"].to_numpy()
    num_decode_steps = nodes.filter(pl.col("decode_step") >= 0)["decode_step"].n_unique()
    is_one = num_decode_steps > _MOST_DECODE_STEPS
    nodes = nodes.with_columns(
        turn="decode_step", decode_step=pl.lit(-1, pl.Int32) if is_one else pl.col("decode_step")
    )
    key = _number(nodes)
    ends = graph.edges.filter(pl.col("kind") != "order").select("src", "dst", "kind", "bytes").collect()
    numbers = nodes["node"].to_numpy()
    src, dst = (np.searchsorted(numbers, ends[name].to_numpy()) for name in ("src", "dst"))
    carried = (decode[src] >= 0) & (decode[dst] >= 0) & (decode[src] != decode[dst]) & is_one
    ends, src, dst = ends.filter(pl.Series(~carried)), src[~carried], dst[~carried]
    leaf = _make_acyclic(key, src, dst)
    first = np.full(int(leaf.max(initial=-1)) + 1, len(numbers), np.int64)
    np.minimum.at(first, leaf, np.arange(len(leaf)))
    outer = leaf[src] != leaf[dst]
    order, circle = number_nodes(first, leaf[src[outer]], leaf[dst[outer]])
    assert not circle, "split parts are acyclic"
    leaf = order[leaf]
    edges = (
        ends.with_columns(src=pl.Series(leaf[src]), dst=pl.Series(leaf[dst]))
        .filter(pl.Series(outer))
        .group_by("src", "dst", "kind")
        .agg(num_edges=pl.len().cast(pl.Int64), bytes=pl.col("bytes").sum())
        .sort("src", "dst", "kind")
    )
    nodes = nodes.with_columns(leaf=pl.Series(leaf))
    return Leaves(
        table=_describe(nodes),
        edges=edges,
        num_inner_edges=int((~outer).sum()),
        num_decode_steps=num_decode_steps if is_one else 0,
        num_carried_edges=int(carried.sum()),
        parts=_spread(nodes, participants),
        node=numbers,
        leaf=leaf,
    )


def _place_communications(nodes: pl.DataFrame, participants: pl.DataFrame, ranks: pl.DataFrame) -> pl.DataFrame:
    """Add lane, in which calls are counted; a collective within a stage is of that stage."""
    met = participants.join(ranks, on="rank", how="left").group_by("node")
    told = met.agg(group=pl.col("group").first(), low=pl.col("pp").min(), high=pl.col("pp").max())
    nodes = nodes.join(told, on="node", how="left", maintain_order="left")
    is_joint = pl.col("rank") < 0
    within = is_joint & (pl.col("stage") < 0) & (pl.col("low") == pl.col("high"))
    return nodes.with_columns(
        stage=pl.when(within).then(pl.col("low")).otherwise("stage"),
        lane=pl.when(is_joint).then(-1 - pl.col("group").fill_null(0)).otherwise("rank"),
    ).drop("group", "low", "high")


def _number(nodes: pl.DataFrame) -> Ints:
    """Number what agrees in place and in which call it is: [nodes]."""
    call = pl.int_range(pl.len()).over(*_PLACE, "lane", "microbatch", "turn")
    told = nodes.select(*_PLACE, call=pl.when(pl.col("kind").is_in(_ENDS)).then(0).otherwise(call))
    by: Sequence[str] = (*_PLACE, "call")
    keys = told.unique(by, maintain_order=True).with_columns(key=pl.int_range(pl.len(), dtype=pl.Int64))
    joined = told.join(keys, on=by, how="left", nulls_equal=True, maintain_order="left")
    return joined["key"].to_numpy()


def _make_acyclic(key: Ints, src: Ints, dst: Ints) -> Ints:
    """Split keys that lead to each other in a circle: only their nodes are looked at."""
    count = int(key.max(initial=-1)) + 1
    pairs = np.unique(key[src] * np.int64(max(count, 1)) + key[dst])
    one, other = np.divmod(pairs, max(count, 1))
    circle = find_circles(count, one[one != other], other[one != other])
    stuck = np.flatnonzero(circle[key] >= 0)
    if not len(stuck):
        return key
    place = np.full(len(key), -1, np.int64)
    place[stuck] = np.arange(len(stuck))
    inner = (place[src] >= 0) & (place[dst] >= 0)
    dense = np.unique(key[stuck], return_inverse=True)[1].astype(np.int64)
    split = key.copy()
    split[stuck] = count + split_parts(dense, place[src[inner]], place[dst[inner]])
    return np.unique(split, return_inverse=True)[1].astype(np.int64)


def _describe(nodes: pl.DataFrame) -> pl.DataFrame:
    return (
        nodes.group_by("leaf")
        .agg(
            *(pl.col(name).first() for name in (*_PLACE, *_TOLD)),
            num_nodes=pl.len().cast(pl.Int64),
            num_shapes=pl.struct("inputs", "outputs").n_unique().cast(pl.Int64),
            num_measured=(pl.col("timing") == "measured").sum().cast(pl.Int64),
            num_estimated=(pl.col("timing") == "estimated").sum().cast(pl.Int64),
            **{name: pl.col(name).sum() for name in _AMOUNTS},
        )
        .sort("leaf")
    )


def _spread(nodes: pl.DataFrame, participants: pl.DataFrame) -> pl.DataFrame:
    """Lay operators and each rank's part in communications below each other."""
    shared = ("node", "leaf", "kind", "microbatch", "timing")
    # Lanes of a rank: threads, then streams, then communications.
    own = nodes.filter(~pl.col("kind").is_in(COMMUNICATIONS)).select(
        *shared, "rank", "start_ns", "end_ns",
        lane=pl.when(pl.col("stream") >= 0).then(1000 + pl.col("stream")).otherwise("thread").cast(pl.Int32),
        arrive_ns=pl.lit(None, pl.Int64), bytes=pl.lit(0, pl.Int64), group=pl.lit(-1, pl.Int32),
    )  # fmt: skip
    met = nodes.select(*shared, begin="start_ns", end="end_ns").join(participants, on="node")
    met = met.select(
        *shared, "rank", "arrive_ns", start_ns=pl.col("start_ns"), end_ns=pl.col("end_ns"),
        bytes=pl.col("send_bytes").fill_null(0), group=pl.col("group").cast(pl.Int32),
        lane=pl.lit(2000, pl.Int32),
    )  # fmt: skip
    order = ("node", "leaf", "rank", "kind", "lane", "microbatch", "arrive_ns", "start_ns", "end_ns", "timing", "bytes",
             "group")  # fmt: skip
    return pl.concat([own.select(order), met.select(order)], how="vertical_relaxed")
