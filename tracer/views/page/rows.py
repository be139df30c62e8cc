"""What the page folds: rows of nodes, each with how many it stands for, edges between them, and who took part.

A graph's own rows stand for one node each. A class graph (`class_rows.py`) has the same in far fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.graph import Graph
from truedag.tracer.views.page.segments import Ints

COMMUNICATIONS = ("collective", "send", "recv")
PLACE = ("step", "decode_step", "phase", "stage", "layer", "module", "expert", "kind", "op", "label")
TOLD = ("category", "inputs", "outputs")
AMOUNTS = ("flops", "bytes_read", "bytes_written")
READ = tuple(
    dict.fromkeys(
        ("node", "rank", "thread", "stream", "microbatch", "start_ns", "end_ns", "timing", *PLACE, *TOLD, *AMOUNTS)
    )
)
_PARTS = ("node", "row", "rank", "kind", "lane", "microbatch", "arrive_ns", "start_ns", "end_ns", "timing", "bytes",
          "group")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A graph's nodes, edges and ranks, or rows that stand for several of each.

    Attributes:
        nodes: READ, by node, topologically; lane (in which calls are counted) and num (how many it stands for).
        edges: src, dst (places in nodes, src < dst), kind, num, bytes (of all that it stands for); no order.
        num_edges: how many edges of each kind the graph has.
        parts: one row for each of `nodes` on each rank that took part (of ranks that are alike, on one of them): node,
            row (its place), rank, kind, lane, microbatch, arrive_ns, start_ns, end_ns, timing, bytes (that the rank
            gave to a communication), group (what stands for its group; -1: no communication).
        ranks: rank, alike: which rank's parts are those of a rank as well; itself, where each is listed; like: which of
            these has the same parts but for the experts that they are of.
        groups: rank, told, group: which of a rank's groups a part's group is.
        find: places in nodes of some of the graph's node numbers; -1: there is no such node.
        turn: [teams + 1, ranks] what is to be added to `node` of a part, for collectives by `group` and last for all
            others; None: nothing, `node` is the graph's own number.
    """

    nodes: pl.DataFrame
    edges: pl.DataFrame
    num_edges: Mapping[str, int]
    parts: pl.DataFrame
    ranks: pl.DataFrame
    groups: pl.DataFrame
    find: Callable[[Ints], Ints]
    turn: NDArray[np.int32] | None


def read_rows(graph: Graph) -> Rows:
    """Read each node and edge of a graph."""
    nodes = graph.nodes.select(READ).collect()
    participants = graph.participants.select(
        "node", "rank", "group", "arrive_ns", "start_ns", "end_ns", "send_bytes"
    ).collect()
    nodes = _place_communications(nodes, participants, graph.ranks.select("rank", "pp").collect())
    ends = graph.edges.filter(pl.col("kind") != "order").select("src", "dst", "kind", "bytes").collect()
    numbers = nodes["node"].to_numpy()
    edges = ends.with_columns(
        *(pl.Series(name, np.searchsorted(numbers, ends[name].to_numpy())) for name in ("src", "dst")),
        num=pl.lit(1, pl.Int64),
    )
    counts = graph.edges.group_by("kind").len().sort("len", descending=True).collect()

    def find(wanted: Ints) -> Ints:
        places = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
        return np.where(numbers[places] == wanted, places, -1)

    ranks = graph.ranks.select(pl.col("rank").cast(pl.Int64)).collect()
    groups = graph.groups.select("group", rank="ranks").collect().explode("rank")
    return Rows(
        nodes=nodes,
        edges=edges,
        num_edges=dict(counts.iter_rows()),
        parts=_spread(nodes, participants),
        ranks=ranks.with_columns(alike="rank", like="rank"),
        groups=groups.select(pl.col("rank").cast(pl.Int64), told="group", group="group"),
        find=find,
        turn=None,
    )


def lay_parts(own: pl.DataFrame, met: pl.DataFrame) -> pl.DataFrame:
    """Lay what ranks ran by themselves and their parts in communications below each other.

    Args:
        own: node, row, rank, kind, thread, stream, microbatch, timing, start_ns, end_ns.
        met: node, row, rank, kind, microbatch, timing, arrive_ns, start_ns, end_ns, bytes, group.
    """
    # Lanes of a rank: threads, then streams, then communications.
    lane = pl.when(pl.col("stream") >= 0).then(1000 + pl.col("stream")).otherwise("thread").cast(pl.Int32)
    own = own.with_columns(
        lane=lane, arrive_ns=pl.lit(None, pl.Int64), bytes=pl.lit(0, pl.Int64), group=pl.lit(-1, pl.Int32)
    )
    met = met.with_columns(
        lane=pl.lit(2000, pl.Int32), bytes=pl.col("bytes").fill_null(0), group=pl.col("group").cast(pl.Int32)
    )
    return pl.concat([own.select(_PARTS), met.select(_PARTS)], how="vertical_relaxed")


def _place_communications(nodes: pl.DataFrame, participants: pl.DataFrame, ranks: pl.DataFrame) -> pl.DataFrame:
    """Add lane, in which calls are counted, and num; a collective within a stage is of that stage."""
    met = participants.join(ranks, on="rank", how="left").group_by("node")
    told = met.agg(group=pl.col("group").first(), low=pl.col("pp").min(), high=pl.col("pp").max())
    nodes = nodes.join(told, on="node", how="left", maintain_order="left")
    is_joint = pl.col("rank") < 0
    within = is_joint & (pl.col("stage") < 0) & (pl.col("low") == pl.col("high"))
    return nodes.with_columns(
        stage=pl.when(within).then(pl.col("low")).otherwise("stage"),
        lane=pl.when(is_joint).then(-1 - pl.col("group").fill_null(0)).otherwise("rank"),
        num=pl.lit(1, pl.Int64),
    ).drop("group", "low", "high")


def _spread(nodes: pl.DataFrame, participants: pl.DataFrame) -> pl.DataFrame:
    told = nodes.drop("lane").with_columns(row=pl.int_range(pl.len(), dtype=pl.Int64))
    met = told.select("node", "row", "kind", "microbatch", "timing").join(participants, on="node")
    return lay_parts(told.filter(~pl.col("kind").is_in(COMMUNICATIONS)), met.rename({"send_bytes": "bytes"}))
