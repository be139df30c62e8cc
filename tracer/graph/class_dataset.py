"""A class graph on disk as the source of the whole graph, which is made of it where it is asked for.

Theory of operation (`dry/class_graph.py` writes it). A row of the class graph stands for one node of each rank of its
class, or for one collective in each group of its team. The nodes that it stands for are numbered in a row, by turn,
from the row's own number on. So what is wanted is made by repeating rows and adding turns: batch by batch in the order
of the rows, which is the graph's. A rank's experts are numbered from its first on. Where the routing gives ranks of a
class sizes of their own, these lie beside, by row and turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.io.plugins import register_io_source

from truedag.tracer.errors import GraphError
from truedag.tracer.graph.class_experts import move_experts, names_experts
from truedag.tracer.graph.class_sizes import Sizes
from truedag.tracer.graph.class_world import Bools, ClassWorld, Ints, Wanted
from truedag.tracer.graph.source import TABLES

FORM, FORM_VERSION = "classes", 2  # of `meta.json`

_ROWS_AT_ONCE = 1 << 18
_OWN = {"nodes": ("rank_class", "team", "num"), "edges": ("rank_class", "team", "place")}
_SAID = ("seq", "arrive_ns", "start_ns", "end_ns", "send_bytes", "recv_bytes")  # of participants, by each class
_PARTICIPANTS: dict[str, Any] = {
    "node": pl.Int64, "rank": pl.Int32, "group": pl.Int32, "seq": pl.Int64, "arrive_ns": pl.Int64,
    "start_ns": pl.Int64, "end_ns": pl.Int64, "send_bytes": pl.Int64, "recv_bytes": pl.Int64, "waited_ns": pl.Int64,
}  # fmt: skip
Maker = Callable[[list[str]], Iterator[pl.DataFrame]]


@dataclass(frozen=True)
class ClassDataset:
    """A class graph's folder: `nodes.parquet`, `edges.parquet` and `participants.parquet` have rows of classes."""

    path: Path
    meta: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path, meta: Mapping[str, Any]) -> ClassDataset:
        """Open a class graph whose `meta.json` was read.

        Raises:
            GraphError: it is of another version.
        """
        found = meta.get("form_version")
        if found != FORM_VERSION:
            raise GraphError(
                f"{path} is a class graph of version {found}, this truedag reads version {FORM_VERSION}: make it again "
                "with truedag dry"
            )
        return cls(path, meta)

    def scan(self, table: str, ranks: AbstractSet[int] | None = None) -> pl.LazyFrame:
        """Return a table of the whole graph, or of what concerns some ranks; it is made when it is collected.

        Raises:
            GraphError: there is no such table.
        """
        if table not in (*TABLES, "kernels"):
            raise GraphError(f"{self.path} has no table {table}")
        if table in ("groups", "ranks", "kernels"):
            return pl.scan_parquet(self.path / f"{table}.parquet")
        make: Maker = {
            "nodes": lambda columns: self._nodes(self._want(ranks), columns, None),
            "edges": lambda columns: self._edges(self._want(ranks), columns, owned=False),
            "participants": lambda columns: self._participants(self._want(ranks), columns),
        }[table]
        return _lazily(make, self._schema(table))

    def scan_classes(self, table: str) -> pl.LazyFrame:
        """Return the class graph's own rows; of nodes, `num` says how many each stands for.

        Args:
            table: nodes, edges or participants.
        """
        return pl.scan_parquet(self.path / f"{table}.parquet")

    def scan_where(self, condition: pl.Expr) -> pl.LazyFrame:
        """Return the nodes of the rows for which a condition holds; only they are made, so that it costs little.

        Args:
            condition: on columns of the class graph's rows, in which what differs between ranks is the lowest rank's.
        """
        rows = self._rows["nodes"].select(condition).to_series()
        some = np.flatnonzero(rows.fill_null(value=False).to_numpy())
        return _lazily(lambda columns: self._nodes(self._want(None), columns, some), self._schema("nodes"))

    def count_edges(self) -> dict[str, int]:
        """Return how many edges of each kind the whole graph has."""
        sizes = {number: len(ranks) for number, ranks in enumerate(self.world.members)}
        told = self.scan_classes("edges").filter(pl.col("kind") != "order").select("kind", "rank_class").collect()
        num = pl.col("rank_class").replace_strict(sizes, return_dtype=pl.Int64)
        counts = dict(told.group_by("kind").agg(num.sum()).iter_rows())
        counts["order"] = int(self.meta["num_edges"]) - sum(counts.values())
        return {kind: count for kind, count in sorted(counts.items(), key=lambda item: -item[1]) if count}

    def edges_of(self, ranks: AbstractSet[int]) -> Iterator[pl.DataFrame]:
        """Give the edges that belong to some ranks, each to one: a message's to its receiver, of several the lowest."""
        return self._edges(self._want(ranks), list(self._schema("edges")), owned=True)

    def messages(self) -> pl.DataFrame:
        """Return src, dst of every message of the whole graph."""
        edges = self._rows["edges"].filter(pl.col("team") >= 0)
        src, dst = ClassEdges.of(self._rows["nodes"], edges).in_whole(self.world)
        return pl.DataFrame({"src": src, "dst": dst})

    def _schema(self, table: str) -> dict[str, Any]:
        if table == "participants":
            return dict(_PARTICIPANTS)
        schema = self._rows[table].schema
        return {name: dtype for name, dtype in schema.items() if name not in _OWN[table]}

    @cached_property
    def world(self) -> ClassWorld:
        """Where every rank stands in classes and teams."""
        return ClassWorld.of(*(pl.read_parquet(self.path / f"{name}.parquet") for name in ("ranks", "groups")))

    @cached_property
    def _rows(self) -> dict[str, pl.DataFrame]:
        return {table: pl.read_parquet(self.path / f"{table}.parquet") for table in ("nodes", "edges", "participants")}

    @cached_property
    def _sizes(self) -> dict[str, Sizes | None]:
        return {table: Sizes.read(self.path, table) for table in ("nodes", "edges", "participants")}

    @property
    def is_even(self) -> bool:
        """Whether all ranks of each class have equal sizes."""
        return all(sizes is None for sizes in self._sizes.values())

    def _sized(self, table: str, frame: pl.DataFrame, row: Ints, turn: Ints) -> pl.DataFrame:
        sizes = self._sizes[table]
        return frame if sizes is None else sizes.lay_over(frame, row, turn)

    @cached_property
    def _of_experts(self) -> Bools:
        return names_experts(self._rows["nodes"])

    @cached_property
    def _ends(self) -> ClassEdges:
        return ClassEdges.of(self._rows["nodes"], self._rows["edges"])

    def _want(self, ranks: AbstractSet[int] | None) -> Wanted:
        size = len(self.world.rank_class)
        has = np.full(size, ranks is None)
        has[[rank for rank in ranks or () if 0 <= rank < size]] = True
        return Wanted(world=self.world, has=has)

    def _nodes(self, wanted: Wanted, columns: list[str], some: Ints | None) -> Iterator[pl.DataFrame]:
        """Make the nodes of wanted ranks; of some rows, or of all."""
        world, rows = self.world, self._rows["nodes"]
        team, rank_class, first = (rows[name].to_numpy().astype(np.int64) for name in ("team", "rank_class", "node"))
        pools = [*(world.place[ranks] for ranks in wanted.members), *wanted.turns]
        keys = np.where(team >= 0, len(world.members) + team, rank_class)
        chosen = np.arange(len(rows)) if some is None else some
        for place, turn in _repeat(keys[chosen], pools, chosen):
            row = chosen[place]
            frame = rows.select(columns)[row.astype(np.uint32)]
            rank = _ranks_of(world, rank_class[row], turn)
            made = {"node": pl.Series(first[row] + turn), "rank": pl.Series(rank, dtype=pl.Int32)}
            frame = frame.with_columns(made[name].alias(name) for name in ("node", "rank") if name in columns)
            frame = self._sized("nodes", frame, row, turn)
            named = np.flatnonzero(self._of_experts[row])
            moved = world.experts_moved(rank[named], team[row[named]], turn[named])
            yield move_experts(frame, named[moved != 0], moved[moved != 0])

    def _participants(self, wanted: Wanted, columns: list[str]) -> Iterator[pl.DataFrame]:
        world, rows = self.world, self._rows["participants"]
        node, rank_class, team = (rows[name].to_numpy().astype(np.int64) for name in ("node", "rank_class", "team"))
        node_team = _teams_of(self._rows["nodes"], node)
        pairs, keys = np.unique(np.stack([rank_class, node_team], axis=1), axis=0, return_inverse=True)
        pools = [wanted.members[one] if of < 0 else wanted.partners(one, of) for one, of in pairs.tolist()]
        group = np.concatenate([np.zeros(0, np.int64), *world.groups])
        begins = np.cumsum([0, *(len(one) for one in world.groups)])
        for row, rank in _repeat(keys.ravel(), pools, node):
            values = {
                "node": node[row] + world.turn[node_team[row], rank],
                "rank": rank,
                "group": group[begins[team[row]] + world.turn[team[row], rank]],
            }
            frame = self._sized("participants", rows.select(_SAID)[row.astype(np.uint32)], row, world.place[rank])
            frame = frame.with_columns(
                *(pl.Series(name, column) for name, column in values.items()), waited_ns=pl.lit(None, pl.Int64)
            )
            frame = frame.select(pl.col(name).cast(dtype) for name, dtype in _PARTICIPANTS.items())
            yield frame.sort("node", "rank").select(columns)

    def _edges(self, wanted: Wanted, columns: list[str], *, owned: bool) -> Iterator[pl.DataFrame]:
        """Make the edges that belong to wanted ranks and, unless `owned`, those of others with an end among theirs."""
        world, ends, rows = self.world, self._ends, self._rows["edges"]
        # Whether an edge that touches a collective or another rank is wanted, the other ranks have a say in.
        is_wide = (ends.src_team >= 0) | (ends.dst_team >= 0) | (ends.team >= 0)
        pools = [*wanted.members, *world.members]
        keys = ends.rank_class + len(world.members) * is_wide
        for row, rank in _repeat(keys, pools, ends.src):
            receiver = _receivers(world, ends, row, rank)
            src_turn = world.turn[ends.src_team[row], rank]
            dst_turn = world.turn[ends.dst_team[row], receiver]
            src, dst = ends.src[row] + src_turn, ends.dst[row] + dst_turn
            if owned:
                kept = wanted.has[receiver]
            else:
                kept = _has(wanted, ends.src_team[row], src_turn, rank)
                kept |= _has(wanted, ends.dst_team[row], dst_turn, receiver)
            kept &= ~_is_repeated(ends.is_shared[row], src, dst, rank)
            chosen = np.flatnonzero(kept)
            chosen = chosen[np.lexsort((row[chosen], dst[chosen], src[chosen]))]
            made = {"src": src[chosen], "dst": dst[chosen]}
            frame = rows.select(columns)[row[chosen].astype(np.uint32)]
            frame = self._sized("edges", frame, row[chosen], world.place[rank[chosen]])
            yield frame.with_columns(pl.Series(name, made[name]) for name in made if name in columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassEdges:
    """The class graph's edges: a class's rank has an edge from its node, or its group's collective, to another."""

    src: Ints
    dst: Ints
    rank_class: Ints
    src_team: Ints  # -1: the rank's own node
    dst_team: Ints
    team: Ints  # of a message: to the rank at `place` in the group of this team; -1: none
    place: Ints
    is_shared: Bools  # order between two collectives, of which each rank in both tells

    @classmethod
    def of(cls, nodes: pl.DataFrame, edges: pl.DataFrame) -> ClassEdges:
        """Take them from the class graph's tables."""
        src, dst, rank_class, team, place = (
            edges[name].to_numpy().astype(np.int64) for name in ("src", "dst", "rank_class", "team", "place")
        )
        src_team, dst_team = _teams_of(nodes, src), _teams_of(nodes, dst)
        return cls(
            src=src, dst=dst, rank_class=rank_class, src_team=src_team, dst_team=dst_team, team=team, place=place,
            is_shared=(edges["kind"] == "order").to_numpy() & (src_team >= 0) & (dst_team >= 0),
        )  # fmt: skip

    def in_whole(self, world: ClassWorld) -> tuple[Ints, Ints]:
        """Return the ends of the edges of the whole graph that they stand for; what ranks share is there for each."""
        none = np.zeros(0, np.int64)
        pairs = [(none, none), *_repeat(self.rank_class, world.members, np.arange(len(self.src)))]
        row, rank = (np.concatenate([pair[end] for pair in pairs]) for end in (0, 1))
        src = self.src[row] + world.turn[self.src_team[row], rank]
        return src, self.dst[row] + world.turn[self.dst_team[row], _receivers(world, self, row, rank)]

    def count(self, world: ClassWorld) -> int:
        """Return how many edges of the whole graph they stand for."""
        sizes = np.array([len(ranks) for ranks in world.members], np.int64)
        shared = np.flatnonzero(self.is_shared)
        num_shared = 0
        for row, rank in _repeat(self.rank_class[shared], world.members, self.src[shared]):
            edge = shared[row]
            src = self.src[edge] + world.turn[self.src_team[edge], rank]
            dst = self.dst[edge] + world.turn[self.dst_team[edge], rank]
            num_shared += int((~_is_repeated(np.ones(len(edge), bool), src, dst, rank)).sum())
        return int(sizes[self.rank_class[~self.is_shared]].sum()) + num_shared


def _teams_of(nodes: pl.DataFrame, numbers: Ints) -> Ints:
    """Return the team of class nodes, -1: a class's own."""
    places = np.searchsorted(nodes["node"].to_numpy(), numbers)
    return nodes["team"].to_numpy().astype(np.int64)[places]


def _repeat(keys: Ints, pools: list[Ints], together: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Pair each row with each value of the pool that its key names, in order; give some rows at once.

    Args:
        keys: [rows]
        pools: by key.
        together: [rows] ascending: rows that are equal in it are given at once.
    """
    sizes = np.array([len(pool) for pool in pools], np.int64)
    begins = np.cumsum(sizes) - sizes
    values = np.concatenate([np.zeros(0, np.int64), *pools])
    counts = sizes[keys]
    ends = np.cumsum(counts)
    begin = 0
    while begin < len(keys):
        before = ends[begin] - counts[begin]
        end = max(begin + 1, int(np.searchsorted(ends, before + _ROWS_AT_ONCE, "right")))
        end = max(end, int(np.searchsorted(together, together[end - 1], "right")))
        count = counts[begin:end]
        row = np.repeat(np.arange(begin, end), count)
        number = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        yield row, values[begins[keys[row]] + number]
        begin = end


def _ranks_of(world: ClassWorld, rank_class: Ints, turn: Ints) -> Ints:
    """Return the ranks of nodes, -1: collectives."""
    sizes = np.array([len(ranks) for ranks in world.members], np.int64)
    begins = np.cumsum(sizes) - sizes
    ranks = np.concatenate(world.members)
    return np.where(rank_class < 0, -1, ranks[np.where(rank_class < 0, 0, begins[rank_class] + turn)])


def _receivers(world: ClassWorld, ends: ClassEdges, row: Ints, rank: Ints) -> Ints:
    """Return the ranks that edges lead to: their own, or a message's receiver."""
    receiver = rank.copy()
    messages = np.flatnonzero(ends.team[row] >= 0)
    for team in np.unique(ends.team[row[messages]]).tolist():
        here = messages[ends.team[row[messages]] == team]
        receiver[here] = world.ranks[team][world.turn[team, rank[here]], ends.place[row[here]]]
    return receiver


def _has(wanted: Wanted, team: Ints, turn: NDArray[np.int32], rank: Ints) -> Bools:
    """Which ends are wanted: nodes of wanted ranks, and collectives that these take part in."""
    if not len(wanted.has_turn):
        return wanted.has[rank]
    found: Bools = np.where(team < 0, wanted.has[rank], wanted.has_turn[team, np.where(team < 0, 0, turn)])
    return found


def _is_repeated(is_shared: Bools, src: Ints, dst: Ints, rank: Ints) -> Bools:
    """Which edges between two collectives a lower rank tells as well, or lead from one to itself."""
    found = np.zeros(len(src), bool)
    shared = np.flatnonzero(is_shared)
    order = shared[np.lexsort((rank[shared], dst[shared], src[shared]))]
    found[order[1:]] = (src[order[1:]] == src[order[:-1]]) & (dst[order[1:]] == dst[order[:-1]])
    found[order] |= src[order] == dst[order]
    return found


def _lazily(make: Maker, schema: dict[str, Any]) -> pl.LazyFrame:
    """Return a frame that is made when it is collected: only the columns that are used, batch by batch."""

    def read(
        columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        del batch_size
        rows_left = n_rows
        for frame in make(list(schema) if columns is None else columns):
            some = frame if predicate is None else frame.filter(predicate)
            if rows_left is not None:
                some = some.head(rows_left)
                rows_left -= len(some)
            yield some
            if rows_left == 0:
                return

    return register_io_source(read, schema=schema)
