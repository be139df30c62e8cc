"""The rows of a class graph for the page: what many ranks and groups have alike is one row that stands for all of it.

Theory of operation. A class graph's row stands for one node on each rank of a class, or for one collective in each
group of a team (`graph/class_dataset.py`). All of these are alike but for the experts, whose numbers differ by rank,
and for the stage that a group is in. So a row becomes a few: one for each different number and stage. Which of them a
rank has, is looked up for its class and for each team that it is in; ranks that agree in all of that are alike, and
stand for each other. An edge leads, for each rank of its class, from one of its source's rows to one of its
destination's; edges that agree in class and teams do so in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from truedag.tracer.graph.class_dataset import ClassDataset
from truedag.tracer.graph.class_experts import move_experts, names_experts
from truedag.tracer.graph.class_world import Bools, ClassWorld
from truedag.tracer.views.page.rows import COMMUNICATIONS, READ, Rows, lay_parts
from truedag.tracer.views.page.segments import Ints

_TIMES = ("arrive_ns", "start_ns", "end_ns")


@dataclass(frozen=True, kw_only=True)
class Holders:
    """Classes, then teams: which kind of its holder's rows each rank, or each group, has.

    A holder's members are its ranks, or its groups by turn. Rows that name no expert differ by stage alone.
    """

    world: ClassWorld
    stage_of: Ints  # [world], -1: none

    @cached_property
    def places(self) -> list[list[tuple[Ints, Ints]]]:
        """For rows that name no expert and for those that do, by holder: [members] kind; [kinds, (moved, stage)]."""
        found: list[list[tuple[Ints, Ints]]] = [[], []]
        for ranks in self.world.members:
            nothing = np.full(len(ranks), -1)
            moved = self.world.experts_moved(ranks, nothing, nothing)
            for kinds, differ in zip(found, (np.zeros_like(moved), moved), strict=True):
                kinds.append(_unique(np.stack([differ, nothing], axis=1)))
        for team, members in enumerate(self.world.ranks):
            turn = np.arange(len(members))
            moved = self.world.experts_moved(np.full(len(turn), -1), np.full(len(turn), team), turn)
            stages = self.stage_of[members]
            within = np.where(stages.min(axis=1) == stages.max(axis=1), stages[:, 0], -1)
            for kinds, differ in zip(found, (np.zeros_like(moved), moved), strict=True):
                kinds.append(_unique(np.stack([differ, within], axis=1)))
        return found

    def kind_on(self, ranks: Ints, holder: int, *, is_expert: bool) -> Ints:
        """Return which kind of a holder's rows some ranks have; each is of that class, or in a group of that team."""
        num_classes = len(self.world.members)
        turn = self.world.place[ranks] if holder < num_classes else self.world.turn[holder - num_classes, ranks]
        return self.places[int(is_expert)][holder][0][turn]

    def find_alike(self) -> Ints:
        """[world] The lowest rank that has the same kinds of rows of the same holders."""
        size = len(self.world.rank_class)
        told = [self.world.rank_class]
        for ranks, (kind, _) in zip(self.world.members, self.places[1], strict=False):
            told.append(np.full(size, -1))
            told[-1][ranks] = kind
        for team, (kind, _) in enumerate(self.places[1][len(self.world.members) :]):
            turn = self.world.turn[team]
            told.append(np.where(turn >= 0, kind[turn], -1))
        _, first, which = np.unique(np.stack(told, axis=1), axis=0, return_index=True, return_inverse=True)
        return np.asarray(first[which.ravel()], np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassNodes:
    """The class graph's rows of nodes, and the rows that they become.

    Attributes:
        first: the number of the first node that a row stands for, rising.
        holder: the row's class, or the number of classes and its team.
        is_expert: whether it names an expert.
        begin: the place of the first of the rows that it becomes.
        count: how many these are.
    """

    first: Ints
    holder: Ints
    is_expert: Bools
    begin: Ints
    count: Ints

    @property
    def key(self) -> Ints:
        """Rows of one key become rows of the same kinds: twice the holder, and one more if an expert is named."""
        return 2 * self.holder + self.is_expert


def read_class_rows(classes: ClassDataset) -> Rows:
    """Read a class graph; where times were estimated, ranks of a class have the same."""
    world = classes.world
    ranks = classes.scan("ranks").select("rank", "pp").sort("rank").collect()
    holders = Holders(world=world, stage_of=ranks["pp"].fill_null(-1).to_numpy().astype(np.int64))
    nodes = (
        classes.scan_classes("nodes").select(*READ, "rank_class", "team", gradient=pl.lit(None, pl.String)).collect()
    )
    team = nodes["team"].to_numpy().astype(np.int64)
    holder = np.where(team >= 0, len(world.members) + team, nodes["rank_class"].to_numpy().astype(np.int64))
    is_expert = names_experts(nodes)
    kinds = np.array([[len(told) for _, told in places] for places in holders.places], np.int64).reshape(2, -1)
    count = kinds[is_expert.astype(np.int64), holder]
    known = ClassNodes(
        first=nodes["node"].to_numpy(), holder=holder, is_expert=is_expert, begin=np.cumsum(count) - count, count=count
    )
    alike = holders.find_alike()

    def find(wanted: Ints) -> Ints:
        row = np.clip(np.searchsorted(known.first, wanted, "right") - 1, 0, len(count) - 1)
        found = np.full(len(wanted), -1, np.int64)
        for place, (at, number) in enumerate(zip(row.tolist(), wanted.tolist(), strict=True)):
            kind, _ = holders.places[int(is_expert[at])][int(holder[at])]
            if 0 <= number - int(known.first[at]) < len(kind):
                found[place] = known.begin[at] + kind[number - int(known.first[at])]
        return found

    told = classes.scan("ranks").select(pl.col("rank").cast(pl.Int64)).collect().sort("rank")
    groups = [(rank, team, group) for team in range(len(world.ranks))
              for group, members in zip(world.groups[team].tolist(), world.ranks[team].tolist(), strict=True)
              for rank in members]  # fmt: skip
    repeated = _repeat(nodes, holders, known)
    return Rows(
        nodes=repeated.drop("rank_class", "team", "gradient"),
        edges=_read_edges(classes, holders, known),
        num_edges=classes.count_edges(),
        parts=_spread(classes, repeated, holders, known, np.unique(alike)),
        ranks=told.with_columns(alike=pl.Series(alike), like=pl.Series(np.array(world.lowest)[world.rank_class])),
        groups=pl.DataFrame(groups, schema={"rank": pl.Int64, "told": pl.Int32, "group": pl.Int32}, orient="row"),
        find=find,
        turn=world.turn,
    )


def _unique(told: Ints) -> tuple[Ints, Ints]:
    values, which = np.unique(told, axis=0, return_inverse=True)
    return which.ravel().astype(np.int64), values


def _repeat(nodes: pl.DataFrame, holders: Holders, known: ClassNodes) -> pl.DataFrame:
    """Give each row once for each kind that its holder's members have, with its experts, stage, lane and num."""
    row = np.repeat(np.arange(len(nodes)), known.count)
    kind = np.arange(len(row)) - known.begin[row]
    moved, stage, num = (np.zeros(len(row), np.int64) for _ in range(3))
    key = known.key[row]
    for one in np.unique(key).tolist():
        here = np.flatnonzero(key == one)
        kinds, values = holders.places[one % 2][one // 2]
        moved[here], stage[here] = values[kind[here]].T
        num[here] = np.bincount(kinds, minlength=len(values))[kind[here]]
    made = nodes[row.astype(np.uint32)]
    some = np.flatnonzero(moved)
    made = move_experts(made, some, moved[some])
    lanes = np.unique(np.stack([known.holder[row], moved, stage], axis=1), axis=0, return_inverse=True)[1].ravel()
    # As in a graph's own rows: a stage that the program told of is kept.
    told = pl.Series(stage, dtype=nodes.schema["stage"])
    return made.with_columns(
        stage=pl.when((pl.col("stage") < 0) & (told >= 0)).then(told).otherwise("stage"),
        lane=pl.Series(lanes),
        num=pl.Series(num),
    )


def _read_edges(classes: ClassDataset, holders: Holders, known: ClassNodes) -> pl.DataFrame:
    rows = classes.scan_classes("edges").filter(pl.col("kind") != "order").collect()
    src, dst = (np.searchsorted(known.first, rows[name].to_numpy()) for name in ("src", "dst"))
    ways = rows.select("rank_class", "team", "place").with_columns(
        from_holder=pl.Series(known.holder[src]), from_expert=pl.Series(known.is_expert[src]),
        to_holder=pl.Series(known.holder[dst]), to_expert=pl.Series(known.is_expert[dst]),
    )  # fmt: skip
    way = ways.select(pl.struct(ways.columns).rank("dense")).to_series().to_numpy().astype(np.int64) - 1
    different = ways.with_columns(way=pl.Series(way)).unique("way")
    pairs = pl.DataFrame(
        [row for one in different.iter_rows(named=True) for row in _follow(holders, one)],
        schema={"way": pl.Int64, "from_kind": pl.Int64, "to_kind": pl.Int64, "num": pl.Int64},
        orient="row",
    )
    return (
        rows.select("kind", "bytes")
        .with_columns(way=pl.Series(way), src=pl.Series(known.begin[src]), dst=pl.Series(known.begin[dst]))
        .join(pairs, on="way")
        .select(
            "kind", "num", src=pl.col("src") + pl.col("from_kind"), dst=pl.col("dst") + pl.col("to_kind"),
            bytes=pl.col("bytes") * pl.col("num"),
        )
    )  # fmt: skip


def _follow(holders: Holders, way: dict[str, int]) -> Iterator[tuple[int, int, int, int]]:
    """Give way, kind of source, kind of destination, and on how many of the class's ranks an edge leads so."""
    ranks = holders.world.members[way["rank_class"]]
    receivers = receivers_of(holders.world, ranks, way["team"], way["place"])
    src = holders.kind_on(ranks, way["from_holder"], is_expert=bool(way["from_expert"]))
    dst = holders.kind_on(receivers, way["to_holder"], is_expert=bool(way["to_expert"]))
    pairs, counts = np.unique(np.stack([src, dst], axis=1), axis=0, return_counts=True)
    for (one, other), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        yield way["way"], one, other, count


def receivers_of(world: ClassWorld, ranks: Ints, team: int, place: int) -> Ints:
    """Return the ranks that messages of some ranks go to, or themselves where it is no message (team < 0)."""
    return ranks if team < 0 else world.ranks[team][world.turn[team, ranks], place]


def _spread(
    classes: ClassDataset, nodes: pl.DataFrame, holders: Holders, known: ClassNodes, ranks: Ints
) -> pl.DataFrame:
    """Give the parts of `ranks`, which stand for all others."""
    world = holders.world
    rank_class = world.rank_class[ranks]
    told = nodes.select("node", "kind", "thread", "stream", "microbatch", "timing", *_TIMES[1:]).with_columns(
        row=pl.int_range(pl.len(), dtype=pl.Int64)
    )
    kinds = classes.scan_classes("nodes").select("kind", "rank_class").collect()
    own = np.flatnonzero(~kinds["kind"].is_in(COMMUNICATIONS).to_numpy() & (known.holder < len(world.members)))
    met = (
        classes.scan_classes("participants").select("node", "rank_class", "team", *_TIMES, bytes="send_bytes").collect()
    )
    met_row = np.searchsorted(known.first, met["node"].to_numpy())
    met_class = met["rank_class"].to_numpy()
    found_own: list[pl.DataFrame] = []
    found_met: list[pl.DataFrame] = []
    for rank, of in zip(ranks.tolist(), rank_class.tolist(), strict=True):
        mine = own[known.holder[own] == of]
        found_own.append(_take(holders, mine, rank, known))
        some = np.flatnonzero(met_class == of)
        parts = _take(holders, met_row[some], rank, known)
        said = met.select("bytes", *_TIMES, group="team")[some.astype(np.uint32)]
        found_met.append(pl.concat([parts, said], how="horizontal"))
    return lay_parts(
        pl.concat(found_own).join(told, on="row"), pl.concat(found_met).join(told.drop(_TIMES[1:]), on="row")
    )


def _take(holders: Holders, rows: Ints, rank: int, known: ClassNodes) -> pl.DataFrame:
    """Return row and rank: which of the rows that some of the class graph's became, a rank has."""
    key = known.key[rows]
    place = np.zeros(len(rows), np.int64)
    for one in np.unique(key).tolist():
        (kind,) = holders.kind_on(np.array([rank]), one // 2, is_expert=bool(one % 2)).tolist()
        place[key == one] = kind
    return pl.DataFrame({"row": known.begin[rows] + place}).with_columns(rank=pl.lit(rank, pl.Int64))
