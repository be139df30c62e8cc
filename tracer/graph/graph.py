"""A graph, or a part of one: its tables, its parts, its paths, its folds, and its way to other libraries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from truedag.tracer.errors import GraphError
from truedag.tracer.graph.adjacency import Adjacency
from truedag.tracer.graph.card import write_card
from truedag.tracer.graph.class_dataset import FORM, ClassDataset
from truedag.tracer.graph.cut import Cut, make_cut
from truedag.tracer.graph.dataset import Dataset
from truedag.tracer.graph.fold import Fold
from truedag.tracer.graph.levels import Level, fold_to_level
from truedag.tracer.graph.networks import to_networkx, to_rustworkx
from truedag.tracer.graph.one_of_each import OneOfEach
from truedag.tracer.graph.rank_classes import find_rank_classes
from truedag.tracer.graph.source import TableSource

if TYPE_CHECKING:
    import networkx as nx


class Graph:
    """A ground-truth DAG; the tables are lazy Polars frames with the columns of docs/DESIGN.md.

    ``Graph.open("OUT/dag").subgraph(ranks=0, layers=[3]).nodes.collect()``

    Nothing is read before it is asked for. A subgraph is a Graph as well and lies nowhere: its frames are those of the
    whole with a condition more. Node numbers stay those of the whole.
    """

    def __init__(self, source: TableSource, *, cuts: Sequence[Cut] = ()) -> None:
        """Take what to read from; `cuts` are what makes it a part, the widest first."""
        self._source = source
        self._cuts = tuple(cuts)
        told = [cut.ranks for cut in self._cuts if cut.ranks is not None]
        self._ranks = reduce(lambda one, other: one & other, told) if told else None
        self._adjacency: dict[bool, Adjacency] = {}

    @classmethod
    def open(cls, path: str | Path) -> Graph:
        """Open a dataset, or a run's folder that holds one in `dag/`.

        Raises:
            GraphError: there is none, a table is missing, or it is of another format version.
        """
        dataset = Dataset.open(path)
        if dataset.meta.get("form") == FORM:
            return cls(ClassDataset.open(dataset.path, dataset.meta))
        return cls(dataset)

    @property
    def path(self) -> Path:
        """The dataset's folder."""
        return self._source.path

    @property
    def meta(self) -> Mapping[str, Any]:
        """What `meta.json` says of the whole graph."""
        return self._source.meta

    @property
    def classes(self) -> ClassDataset | None:
        """The class graph that this whole graph is made of, each row for all that it stands for.

        None: it has rows of its own, is a part, or ranks of a class have sizes of their own.
        """
        source = self._source
        return source if isinstance(source, ClassDataset) and not self._cuts and source.is_even else None

    @property
    def one_of_each(self) -> OneOfEach | None:
        """One rank of each class, of a whole graph that is made of a class graph, for `Graph`; None: of any other."""
        source = self._source
        return OneOfEach(source) if isinstance(source, ClassDataset) and not self._cuts else None

    @property
    def nodes(self) -> pl.LazyFrame:
        """Operators, communications, and what goes in and out, in topological order."""
        participants = self._source.scan("participants", self._ranks)
        nodes = self._source.scan("nodes", self._ranks)
        return reduce(lambda frame, cut: cut.select(frame, participants), self._cuts, nodes)

    @property
    def edges(self) -> pl.LazyFrame:
        """Data, messages and program order; of a part, those between two of its nodes."""
        edges = self._source.scan("edges", self._ranks)
        for end in ("src", "dst") if self._cuts else ():
            edges = edges.join(self.nodes.select(pl.col("node").alias(end)), on=end, how="semi", maintain_order="left")
        return edges

    @property
    def participants(self) -> pl.LazyFrame:
        """Each rank's part in each communication; of a part cut by ranks, theirs alone."""
        participants = self._source.scan("participants", self._ranks)
        if self._cuts:
            participants = participants.join(self.nodes.select("node"), on="node", how="semi", maintain_order="left")
        return participants if self._ranks is None else participants.filter(pl.col("rank").is_in(sorted(self._ranks)))

    @property
    def groups(self) -> pl.LazyFrame:
        """Process groups; of a part cut by ranks, whole groups that one of them is in."""
        groups = self._source.scan("groups", self._ranks)
        if self._ranks is None:
            return groups
        return groups.filter(pl.col("ranks").list.set_intersection(sorted(self._ranks)).list.len() > 0)

    @property
    def ranks(self) -> pl.LazyFrame:
        """Ranks, where they stand on each axis, their clocks."""
        ranks = self._source.scan("ranks", self._ranks)
        return ranks if self._ranks is None else ranks.filter(pl.col("rank").is_in(sorted(self._ranks)))

    @property
    def kernels(self) -> pl.LazyFrame:
        """Kernels and copies on GPUs, and the node that each belongs to; no rows where none was recorded."""
        kernels = self._source.scan("kernels", self._ranks)
        if self._cuts:
            kernels = kernels.join(self.nodes.select("node"), on="node", how="semi", maintain_order="left")
        return kernels

    @property
    def whole(self) -> Graph:
        """The graph that this one is a part of; itself if it is none."""
        return Graph(self._source) if self._cuts else self

    @property
    def border(self) -> pl.LazyFrame:
        """The edges that were cut through: one end is a node of this part, the other is not.

        Columns of `edges`, and `direction`: in, if the edge leads into the part, or out. The node at its other end is
        in `whole`.
        """
        inside = self.nodes.select("node", is_inside=True)
        edges = self._source.scan("edges", self._ranks)
        for end in ("src", "dst"):
            edges = edges.join(
                inside.rename({"node": end, "is_inside": f"{end}_inside"}), on=end, how="left", maintain_order="left"
            )
        leads_in = pl.col("dst_inside").is_not_null()
        crossing = edges.filter(leads_in != pl.col("src_inside").is_not_null())
        direction = pl.when(leads_in).then(pl.lit("in")).otherwise(pl.lit("out"))
        return crossing.with_columns(direction=direction).drop("src_inside", "dst_inside")

    def subgraph(
        self,
        *,
        ranks: int | Iterable[int] | None = None,
        layers: int | Iterable[int] | None = None,
        phases: str | Iterable[str] | None = None,
        steps: int | Iterable[int] | None = None,
        time_ns: tuple[int, int] | None = None,
        where: pl.Expr | None = None,
        nodes: Iterable[int] | None = None,
    ) -> Graph:
        """Return the part in which all that is asked for holds; `border` has the edges that lead out of it and into it.

        Args:
            ranks: on these ranks; collectives that one of them takes part in are in it.
            layers: in these layers (-1: in none).
            phases: in these phases.
            steps: in these steps.
            time_ns: running at some moment from the first of these to before the second; what has no time is not in it.
            where: any condition on the columns of `nodes`.
            nodes: these nodes, as `ancestors` returns them, say.

        Raises:
            GraphError: a rank is not in this graph, or the time ends before it begins.
        """
        cut = make_cut(
            ranks=ranks, layers=layers, phases=phases, steps=steps, time_ns=time_ns, where=where, nodes=nodes
        )
        if cut.ranks is not None:
            known = set(self.ranks.select("rank").collect()["rank"].to_list())
            if unknown := sorted(cut.ranks - known):
                there = f"{len(known):,} ranks, from {min(known)} to {max(known)}" if known else "no ranks"
                raise GraphError(f"rank {unknown[0]} is not in this graph of {self.path}: it has {there}")
        return Graph(self._source, cuts=(*self._cuts, cut))

    def adjacency(self, *, order: bool = False) -> Adjacency:
        """Return who leads to whom as arrays, read once and kept; `order` counts program order's edges too."""
        if order not in self._adjacency:
            edges = self.edges if order else self.edges.filter(pl.col("kind") != "order")
            ends = edges.select("src", "dst").collect()
            ids = self.nodes.select("node").collect()["node"].to_numpy()
            self._adjacency[order] = Adjacency.build(ids, ends["src"].to_numpy(), ends["dst"].to_numpy())
        return self._adjacency[order]

    def ancestors(self, node: int, *, order: bool = False) -> list[int]:
        """Return what a node follows from, in topological order; by data and messages, or by program order too.

        Raises:
            GraphError: there is no such node.
        """
        return self.adjacency(order=order).ancestors(node)

    def descendants(self, node: int, *, order: bool = False) -> list[int]:
        """Return what follows from a node, in topological order; by data and messages, or by program order too.

        Raises:
            GraphError: there is no such node.
        """
        return self.adjacency(order=order).descendants(node)

    def between(self, first: int, last: int, *, order: bool = False) -> list[int]:
        """Return the nodes on all paths from one to another, both in it; none where there is no path.

        `adjacency()` counts the paths, walks them one by one, and finds a shortest.

        Raises:
            GraphError: one of them is no node.
        """
        return self.adjacency(order=order).between(first, last)

    def fold(self, level: Level | Sequence[str], *, by_class: bool = False, order: bool = False) -> Fold:
        """Return a coarser graph that is still a DAG and says what it stands for (DESIGN rule 8).

        Args:
            level: module, layer or stage: one node for each stretch of a rank's operators in one call of it without a
                communication inside. rank_class: one node for what the ranks of a class do in the same place. Or
                columns of `nodes`, for stretches that are equal in them.
            by_class: fold what the ranks of a class do in the same place together first.
            order: keep program order's edges.

        Raises:
            GraphError: the graph is broken; or ranks of one class wait for each other in turn, so that their fold
                is no DAG.
        """
        return fold_to_level(
            self.nodes, self.edges, self.participants, self.groups, level, by_class=by_class, order=order
        )

    def rank_classes(self) -> pl.DataFrame:
        """Return rank, rank_class and structure: ranks of equal structure ran the same program (`rank_classes.py`)."""
        return find_rank_classes(self.nodes, self.edges, self.participants, self.groups)

    def to_networkx(self, *, order: bool = True) -> nx.MultiDiGraph[int]:
        """Return the graph with all columns as attributes; without `order`, only data and messages are edges."""
        return to_networkx(self.nodes, self._some_edges(order=order))

    def to_rustworkx(self, *, order: bool = True) -> Any:
        """Return a `rustworkx.PyDiGraph`: node and edge payloads are the rows, as dictionaries.

        Its indices count the nodes from 0 in topological order; the payload's `node` is the graph's number.

        Raises:
            GraphError: rustworkx is not installed.
        """
        return to_rustworkx(self.nodes, self._some_edges(order=order))

    def _some_edges(self, *, order: bool) -> pl.LazyFrame:
        return self.edges if order else self.edges.filter(pl.col("kind") != "order")

    def __repr__(self) -> str:
        return f"<Graph {self.path}{' (a part)' if self._cuts else ''}>"

    def _repr_html_(self) -> str:
        return write_card(self, is_part=bool(self._cuts))
