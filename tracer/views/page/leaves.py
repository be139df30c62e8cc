"""The finest nodes that the page shows: one operator of one module, over all ranks and microbatches that ran it.

Nodes of the graph are one leaf if they agree in pass, stage, layer, module, operator and in which of several such
calls they are. Of parameters, inputs and outputs those of one name are one leaf. Where that would make a circle, a leaf
is split (`segments.py`), so that the leaves are a DAG, numbered topologically. Many decode steps are one: edges that
lead from one step to another would make it a circle, and are counted instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.graph import Graph
from truedag.tracer.topology import number_nodes
from truedag.tracer.views.page.class_rows import read_class_rows
from truedag.tracer.views.page.rows import AMOUNTS, PLACE, TOLD, read_rows
from truedag.tracer.views.page.segments import Ints, find_circles, split_parts

_ENDS = ("parameter", "input", "output")
_MOST_DECODE_STEPS = 16  # that are told apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaves:
    """The graph's nodes as leaves, and what every node did on every rank.

    Attributes:
        table: one row a leaf in topological order: `PLACE`, category, inputs, outputs (of its first node), num_nodes,
            num_shapes (how many different of these), flops, bytes_read, bytes_written, num_measured, num_estimated.
        edges: src, dst (leaves), kind, num_edges, bytes; data and messages alone, between different leaves.
        num_edges: how many edges of each kind the graph has.
        num_inner_edges: edges between nodes of one leaf.
        num_decode_steps: how many decode steps are one; 0: they are told apart, or there are none.
        num_carried_edges: edges from one of these to another.
        parts: as `Rows` has them, with the leaf.
        ranks, groups, turn: for which ranks each rank's parts stand, as `Rows` has it.
        leaf: [rows] the leaf of each of `Rows`' nodes.
        find: the places among these of the graph's node numbers.
    """

    table: pl.DataFrame
    edges: pl.DataFrame
    num_edges: Mapping[str, int]
    num_inner_edges: int
    num_decode_steps: int
    num_carried_edges: int
    parts: pl.DataFrame
    ranks: pl.DataFrame
    groups: pl.DataFrame
    leaf: Ints
    find: Callable[[Ints], Ints]
    turn: NDArray[np.int32] | None

    @property
    def num_nodes(self) -> int:
        """How many nodes the graph has."""
        return int(self.table["num_nodes"].sum())

    @property
    def has_times(self) -> bool:
        """Whether anything was measured or estimated."""
        return bool((self.table["num_measured"] + self.table["num_estimated"] > 0).any())

    def leaf_of(self, nodes: Sequence[int] | pl.Series) -> Ints:
        """Return the leaves of some of the graph's nodes; -1: there is no such node."""
        places = self.find(np.asarray(nodes, np.int64))
        return np.where(places >= 0, self.leaf[places], -1) if len(self.leaf) else places


def find_leaves(graph: Graph) -> Leaves:
    """Fold a graph to its leaves."""
    classes = graph.classes
    rows = read_rows(graph) if classes is None else read_class_rows(classes)
    nodes = rows.nodes
    decode = nodes["decode_step"].to_numpy()
    num_decode_steps = nodes.filter(pl.col("decode_step") >= 0)["decode_step"].n_unique()
    is_one = num_decode_steps > _MOST_DECODE_STEPS
    nodes = nodes.with_columns(
        turn="decode_step", decode_step=pl.lit(-1, pl.Int32) if is_one else pl.col("decode_step")
    )
    key = _number(nodes)
    src, dst = (rows.edges[name].to_numpy() for name in ("src", "dst"))
    carried = (decode[src] >= 0) & (decode[dst] >= 0) & (decode[src] != decode[dst]) & is_one
    ends, src, dst = rows.edges.filter(pl.Series(~carried)), src[~carried], dst[~carried]
    leaf = _make_acyclic(key, src, dst)
    first = np.full(int(leaf.max(initial=-1)) + 1, len(nodes), np.int64)
    np.minimum.at(first, leaf, np.arange(len(leaf)))
    outer = leaf[src] != leaf[dst]
    order, circle = number_nodes(first, leaf[src[outer]], leaf[dst[outer]])
    assert not circle, "split parts are acyclic"
    leaf = order[leaf]
    edges = (
        ends.with_columns(src=pl.Series(leaf[src]), dst=pl.Series(leaf[dst]))
        .filter(pl.Series(outer))
        .group_by("src", "dst", "kind")
        .agg(num_edges=pl.col("num").sum(), bytes=pl.col("bytes").sum())
        .sort("src", "dst", "kind")
    )
    return Leaves(
        table=_describe(nodes.with_columns(leaf=pl.Series(leaf))),
        edges=edges,
        num_edges=rows.num_edges,
        num_inner_edges=int(ends["num"].filter(pl.Series(~outer)).sum()),
        num_decode_steps=num_decode_steps if is_one else 0,
        num_carried_edges=int(rows.edges["num"].filter(pl.Series(carried)).sum()),
        parts=rows.parts.with_columns(leaf=pl.Series(leaf)[rows.parts["row"]]),
        ranks=rows.ranks,
        groups=rows.groups,
        leaf=leaf,
        find=rows.find,
        turn=rows.turn,
    )


def _number(nodes: pl.DataFrame) -> Ints:
    """Number what agrees in place and in which call it is: [nodes]."""
    call = pl.int_range(pl.len()).over(*PLACE, "lane", "microbatch", "turn")
    told = nodes.select(*PLACE, call=pl.when(pl.col("kind").is_in(_ENDS)).then(0).otherwise(call))
    by: Sequence[str] = (*PLACE, "call")
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
            *(pl.col(name).first() for name in (*PLACE, *TOLD)),
            num_nodes=pl.col("num").sum(),
            num_shapes=pl.struct("inputs", "outputs").n_unique().cast(pl.Int64),
            num_measured=pl.col("num").filter(pl.col("timing") == "measured").sum(),
            num_estimated=pl.col("num").filter(pl.col("timing") == "estimated").sum(),
            **{name: (pl.col(name) * pl.col("num")).sum() for name in AMOUNTS},
        )
        .sort("leaf")
    )
