"""What the ranks of a class have of their own: the sizes that the routing decides, where all else is the same.

Theory of operation. Of the ranks of a class that have equal sizes one is executed, or its sizes are derived from those
that executed ones have (`derived_sizes`). What it makes and moves is held against the class's lowest rank, node by
node, edge by edge, communication by communication, and only what differs is kept; every rank that has these sizes too
gets its rows of it. A row of the class graph says what the lowest rank has, and a table beside it what is otherwise for
which turn of it (`graph/class_sizes.py` reads them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.tracer.dry.programs import read_part
from truedag.tracer.dry.world import Ints, World
from truedag.tracer.errors import MergeError
from truedag.tracer.merge.part import Part

_NUMBERS = ("flops", "bytes_read", "bytes_written")
_TEXTS = ("inputs", "outputs")
_UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Names:
    """Texts and layouts of all ranks by number; text 0 is the empty one."""

    texts: dict[str, int] = field(default_factory=lambda: {"": 0})
    layouts: dict[tuple[str, tuple[int, ...]], int] = field(default_factory=dict)

    def text(self, said: str) -> int:
        """Return a text's number."""
        return self.texts.setdefault(said, len(self.texts))

    def layout(self, dtype: str, sizes: Sequence[int]) -> int:
        """Return a layout's number."""
        return self.layouts.setdefault((dtype, tuple(sizes)), len(self.layouts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Differing:
    """What of a table differs from the class's lowest rank."""

    places: Ints  # local
    values: Ints  # [columns, places]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSizes:
    """A rank's sizes."""

    nodes: Differing  # flops, bytes read and written, numbers of the texts of inputs and outputs
    edges: Differing  # bytes, layout
    comms: Ints  # [4, communications] sent, received, and the numbers of the texts
    memory: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSizes:
    """The sizes of a class's ranks."""

    sized: Ints  # executed, or derived; ascending, the first is the class's lowest
    ranks: list[RankSizes]  # of each of them
    comms: Ints  # [4, ranks, communications] as theirs
    place: Mapping[int, int]  # of a communication, by its node

    def comms_of(self, sized_as: Ints, node: int) -> Ints:
        """Return [4, ranks] what some ranks give and get in a communication, and how their texts are numbered."""
        found: Ints = self.comms[:, np.searchsorted(self.sized, sized_as), self.place[node]]
        return found

    def varies(self, node: int) -> bool:
        """Whether ranks of the class give or get different amounts in a communication."""
        own = self.comms[:, :, self.place[node]]
        return bool((own != own[:, :1]).any())


class Derived(Protocol):
    """Says the sizes of ranks that were not executed."""

    def __call__(self, rank: int, base: Sizes, names: Names) -> Sizes | None:
        """Return those of a rank, of which another's of its program are known; None: it was executed."""


def executed_only(rank: int, base: Sizes, names: Names) -> None:
    """Derive nothing: all ranks were executed."""
    del rank, base, names


def measure_sizes(
    world: World, parts: Mapping[int, Part], traces: Mapping[int, Path], names: Names, derived: Derived
) -> list[ClassSizes]:
    """Return each class's sizes.

    Args:
        world: the classes.
        parts: of their lowest ranks.
        traces: of all executed ranks.
        names: hears of the texts and layouts.
        derived: says those of the others.

    Raises:
        TraceError: a trace is broken.
        MergeError: a rank has not the program of its class.
    """
    found = []
    for sized in world.sized:
        first = parts[int(sized[0])]
        base = Sizes.of(first, names)
        ranks = [base.compared(base)]
        for rank in sized[1:].tolist():
            own = derived(rank, base, names) or Sizes.of(read_part(traces[rank]), names)
            if own.shape != base.shape:
                raise MergeError(
                    f"rank {rank} is said to run as rank {first.rank} does, and makes more or fewer nodes: a bug in "
                    "truedag, report it; --all-ranks trusts no class"
                )
            ranks.append(own.compared(base))
        place = {record.node: at for at, record in enumerate(first.comms)}
        comms = np.stack([one.comms for one in ranks], axis=1)
        found.append(ClassSizes(sized=sized, ranks=ranks, comms=comms, place=place))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """All sizes of one rank."""

    nodes: Ints  # [5, nodes] flops, bytes read and written, numbers of the texts of inputs and outputs
    edges: Ints  # [2, edges] bytes, layout
    comms: Ints  # [4, communications] sent, received, and the numbers of the texts
    comm_nodes: Ints
    memory: Mapping[str, Any] | None

    @classmethod
    def of(cls, part: Part, names: Names) -> Sizes:
        """Return those of an executed rank."""
        shapes, shape = part.told["shapes"], part.nodes["shape"]
        texts = [[*(names.text(said) for said in shapes[name]), 0] for name in _TEXTS]
        nodes: Ints = np.array([*(column_of(shapes, name) for name in _NUMBERS), *texts], np.int64)[:, shape]
        layouts = np.full(max((number for number, _, _ in part.told["layouts"]), default=0) + 2, _UNKNOWN)
        for number, dtype, sizes in part.told["layouts"]:
            layouts[number] = names.layout(dtype, sizes)
        comm_nodes = np.array([one.node for one in part.comms], np.int64)
        return cls(
            nodes=nodes,
            edges=np.stack([part.edges["bytes"], layouts[part.edges["layout"]]]),
            comms=np.concatenate([moved_bytes(part).T, nodes[3:, comm_nodes]]),
            comm_nodes=comm_nodes,
            memory=part.told["memory"],
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """How many nodes, edges and communications there are."""
        return tuple(table.shape[1] for table in (self.nodes, self.edges, self.comms))

    def same_as(self, other: Sizes) -> bool:
        """Whether they are those of another rank, whose texts are numbered as its own."""
        tables = ((self.nodes, other.nodes), (self.edges, other.edges), (self.comms, other.comms))
        is_same = self.shape == other.shape and all((ours == theirs).all() for ours, theirs in tables)
        return is_same and self.memory == other.memory

    def compared(self, base: Sizes) -> RankSizes:
        """Return what differs from another rank's."""
        tables = []
        for own, other in ((self.nodes, base.nodes), (self.edges, base.edges)):
            places = np.flatnonzero((own != other).any(axis=0))
            tables.append(Differing(places=places, values=own[:, places]))
        return RankSizes(nodes=tables[0], edges=tables[1], comms=self.comms, memory=self.memory)


def column_of(shapes: Mapping[str, Any], name: str) -> Ints:
    """Return a number of each shape of a part; the last is of none."""
    return np.array([*(_UNKNOWN if one is None else one for one in shapes[name]), _UNKNOWN], np.int64)


def moved_bytes(part: Part) -> Ints:
    """Return [communications, 2] what a rank gives and gets."""
    return np.array([(one.sent_bytes, one.received_bytes) for one in part.comms], np.int64).reshape(-1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedRows:
    """Rows of the class graph that are otherwise at some turns."""

    row: Ints
    turn: Ints
    values: Ints  # [columns, rows]

    @classmethod
    def joined(cls, parts: Sequence[SizedRows], num_columns: int) -> SizedRows:
        """Put some together, by row and turn."""
        row = np.concatenate([np.zeros(0, np.int64), *(one.row for one in parts)])
        turn = np.concatenate([np.zeros(0, np.int64), *(one.turn for one in parts)])
        values = np.concatenate([np.zeros((num_columns, 0), np.int64), *(one.values for one in parts)], axis=1)
        order = np.lexsort((turn, row))
        return cls(row=row[order], turn=turn[order], values=values[:, order])


def spread_rows(world: World, number: int, sizes: ClassSizes, table: str, rows: Ints) -> list[SizedRows]:
    """Give the rows of a class's own table to every rank whose sizes they are.

    Args:
        world: the classes.
        number: of the class.
        sizes: of its ranks.
        table: nodes, edges or comms.
        rows: of each local place the row of the class graph, -1: none.
    """
    found = []
    sized_as = world.sized_as[world.members[number]]
    for rank, one in zip(sizes.sized[1:].tolist(), sizes.ranks[1:], strict=True):
        if table == "comms":
            places = np.flatnonzero((one.comms[:2] != sizes.ranks[0].comms[:2]).any(axis=0))
            values = one.comms[:2, places]
        else:
            differing: Differing = getattr(one, table)
            places, values = differing.places, differing.values
        kept = rows[places] >= 0
        row, values = rows[places[kept]], values[:, kept]
        turns = np.flatnonzero(sized_as == rank)
        found.append(
            SizedRows(
                row=np.tile(row, len(turns)), turn=np.repeat(turns, len(row)), values=np.tile(values, (1, len(turns)))
            )
        )
    return found


def size_tables(
    nodes: Sequence[SizedRows], edges: Sequence[SizedRows], parts: Sequence[SizedRows], names: Names
) -> dict[str, pl.DataFrame]:
    """Return the tables beside the class graph's; none where all ranks of each class have equal sizes."""
    texts = pl.Series(list(names.texts), dtype=pl.String)
    dtypes = pl.Series([dtype for dtype, _ in names.layouts] + [None], dtype=pl.String)
    shapes = pl.Series([list(sizes) for _, sizes in names.layouts] + [None], dtype=pl.List(pl.Int64))
    node, edge, part = SizedRows.joined(nodes, 5), SizedRows.joined(edges, 2), SizedRows.joined(parts, 2)
    flops = pl.Series(node.values[0])
    tables = {
        "node_sizes": _table(
            node,
            flops=flops.set(flops == _UNKNOWN, None),
            bytes_read=pl.Series(node.values[1]),
            bytes_written=pl.Series(node.values[2]),
            inputs=_gather(texts, node.values[3]),
            outputs=_gather(texts, node.values[4]),
        ),
        "edge_sizes": _table(
            edge,
            bytes=pl.Series(edge.values[0]),
            dtype=_gather(dtypes, edge.values[1]),
            shape=_gather(shapes, edge.values[1]),
        ),
        "participant_sizes": _table(part, send_bytes=pl.Series(part.values[0]), recv_bytes=pl.Series(part.values[1])),
    }
    return {name: table for name, table in tables.items() if len(table)}


def _gather(few: pl.Series, places: NDArray[np.int64]) -> pl.Series:
    return few.gather(pl.Series(np.where(places < 0, places + len(few), places).astype(np.uint32)))


def _table(rows: SizedRows, **columns: pl.Series) -> pl.DataFrame:
    return pl.DataFrame({"row": pl.Series(rows.row), "turn": pl.Series(rows.turn), **columns})
