"""Slices for the page's time line: every timed operator and every rank's part in a communication.

Theory of operation. Ranks of a class have the same slices but for two things: the numbers of their nodes, which differ
by the turn of the rank, or of the group that a collective is in; and where they hold other experts, their leaves. So
the slices are those of one rank of each class, with tables of both; the page makes a rank's of them when it is to be
shown. Where each rank was read node by node, it is a class of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.views.page.leaves import Leaves
from truedag.tracer.views.page.segments import Ints
from truedag.tracer.views.page.tree import Tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Slices:
    """Slices of some ranks, which stand for those of all.

    Attributes:
        table: rank, lane, node, leaf (its place in the walk), microbatch, wait, start, span (in ticks from the
            window's start; of a communication from the last arrival on, `wait` before it), is_estimated, team (of the
            collective's group; -1: none, or each rank was read); by rank, lane and start.
        tick_ns: how long a tick is.
        ranks: rank, like (whose slices it has) and alike (whose leaves), by rank.
        leaves: alike, place (of a slice among those of its rank), leaf: where these are not those in `table`.
        turn: [teams + 1, ranks] what is added to the node of a rank's slice, by team; None: nothing.
    """

    table: pl.DataFrame
    tick_ns: int
    ranks: pl.DataFrame
    leaves: pl.DataFrame
    turn: NDArray[np.int32] | None

    @property
    def num_slices(self) -> int:
        """Of all ranks."""
        counts = self.table.group_by(like="rank").len()
        return int(self.ranks.join(counts, on="like")["len"].sum())

    def spread(self) -> pl.DataFrame:
        """Return the slices of every rank: `table` without team."""
        if self.turn is None:
            return self.table.drop("team")
        like, alike = (self.ranks[name].to_numpy() for name in ("like", "alike"))
        rank = self.table["rank"].to_numpy()
        begin, end = (np.searchsorted(rank, like, side) for side in ("left", "right"))
        count = end - begin
        whose = np.repeat(np.arange(len(like)), count)
        place = np.arange(len(whose)) - np.repeat(np.cumsum(count) - count, count)
        row = begin[whose] + place
        made = self.table[row.astype(np.uint32)]
        turn = self.turn[made["team"].to_numpy(), self.ranks["rank"].to_numpy()[whose]]
        keys = {"alike": pl.Series(alike[whose]), "place": pl.Series(place)}
        moved = pl.DataFrame(keys).join(self.leaves, on=["alike", "place"], how="left", maintain_order="left")["leaf"]
        spread: pl.DataFrame = made.with_columns(
            pl.Series("rank", self.ranks["rank"].to_numpy()[whose]).cast(made.schema["rank"]),
            pl.col("node") + pl.Series(turn).cast(pl.Int64),
            leaf=moved.fill_null(made["leaf"]),
        ).drop("team")
        return spread


def cut_slices(leaves: Leaves, tree: Tree, start_ns: int, end_ns: int) -> Slices:
    """List them; times are from `start_ns` to `end_ns`."""
    tick = max(1, -(-(end_ns - start_ns) // ((1 << 32) - 2)))
    begin = pl.coalesce("start_ns", "arrive_ns")
    team = pl.when(pl.col("kind") == "collective").then("group").otherwise(-1) if leaves.turn is not None else -1
    table = (
        leaves.parts.filter(pl.col("timing") != "none")
        .drop_nulls("end_ns")
        .filter(begin.is_not_null())
        .select(
            "rank", "lane", "node", "leaf", "microbatch",
            start=(begin - start_ns) // tick,
            span=pl.max_horizontal(pl.col("end_ns") - begin, 0) // tick,
            wait=pl.max_horizontal((begin - pl.col("arrive_ns")).fill_null(0), 0) // tick,
            is_estimated=(pl.col("timing") == "estimated").cast(pl.UInt8),
            team=team,
        )
        .sort("rank", "lane", "start", "node")
    )  # fmt: skip
    table = table.with_columns(leaf=pl.Series(tree.order[table["leaf"].to_numpy()]))
    ranks = leaves.ranks.sort("rank")
    of_class = table.filter(pl.col("rank").is_in(ranks["like"].unique().implode()))
    return Slices(
        table=of_class, tick_ns=tick, ranks=ranks, leaves=_find_moved(table, of_class, ranks), turn=leaves.turn
    )


def _find_moved(table: pl.DataFrame, of_class: pl.DataFrame, ranks: pl.DataFrame) -> pl.DataFrame:
    """Compare the leaves of ranks that hold other experts with those of the first of their class."""
    schema = {"alike": pl.Int64, "place": pl.Int64, "leaf": pl.Int64}
    others = ranks.filter(pl.col("alike") != pl.col("like")).select("alike", "like").unique().sort("alike")
    found = [pl.DataFrame(schema=schema)]
    if others.is_empty():
        return found[0]
    own = {rank: part["leaf"].to_numpy() for (rank,), part in table.partition_by("rank", as_dict=True).items()}
    first = {rank: part["leaf"].to_numpy() for (rank,), part in of_class.partition_by("rank", as_dict=True).items()}
    for alike, like in others.iter_rows():
        if like not in first:
            continue  # nothing of the class has a time
        place: Ints = np.flatnonzero(own[alike] != first[like])
        moved = {"alike": np.full(len(place), alike), "place": place, "leaf": own[alike][place]}
        found.append(pl.DataFrame(moved, schema=schema))
    return pl.concat(found)
