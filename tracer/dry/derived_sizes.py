"""Sizes of ranks that were not executed, from the numbers that they were told and a few ranks of their program.

Theory of operation. Ranks of one program have the same nodes, edges and communications in the same places. So each size
is a row: what it is on each executed rank. `forms` says what a row is on a rank that was told other numbers: each
dimension of each tensor, FLOPs, bytes that flow along an edge or are sent, and those of each storage. What an operator
reads and writes follows from the dimensions of its tensors, and what a rank has in memory is summed up anew from its
storages, by what sums it up for an executed rank.

The programs are the same as long as nothing that flows becomes empty: a rank of which an edge would carry nothing is
not known, and has to be executed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.dry.fans import Side, Spread, find_fans
from truedag.tracer.dry.forms import Bools, Evaluated, evaluate_forms
from truedag.tracer.dry.programs import read_rank
from truedag.tracer.dry.sizes import Names, Sizes, column_of, moved_bytes
from truedag.tracer.dry.tensor_texts import TensorText
from truedag.tracer.dry.world import Ints
from truedag.tracer.merge.lifetimes import LifeName, Lives, find_lives, name_life, sum_up, weigh_named
from truedag.tracer.merge.nodes import RankNodes
from truedag.tracer.merge.part import Part

_SIDES = (("inputs", "bytes_read"), ("outputs", "bytes_written"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An executed rank, and what it was told."""

    part: Part
    nodes: RankNodes
    lives: Lives
    """In the order that all ranks of the program have."""
    numbers: Ints

    @classmethod
    def read(cls, trace: Path, numbers: NDArray[Any]) -> Sample:
        """Read a rank's trace.

        Raises:
            TraceError: it is broken.
        """
        part, nodes = read_rank(trace)
        return cls(part=part, nodes=nodes, lives=_in_order(find_lives(nodes.trace)), numbers=numbers.astype(np.int64))


def _in_order(lives: Lives) -> Lives:
    """Where memory lies is no part of the program; when it is made and given back is."""
    order = np.lexsort((lives.num_bytes, lives.end_ns, lives.role, lives.made_ns, lives.begin_ns))
    return Lives(**{name: getattr(lives, name)[order] for name in Lives.__slots__})


class _Book:
    """Sizes as rows, a value from each sample; rows that are the same are kept once."""

    def __init__(self) -> None:
        self._tables: list[Ints] = []
        self._count = 0

    def add(self, columns: Sequence[Any]) -> Ints:
        """Take sizes, a column from each sample; return their numbers."""
        table = np.stack([np.asarray(one, np.int64) for one in columns], axis=1)
        self._tables.append(table)
        self._count += len(table)
        return np.arange(self._count - len(table), self._count)

    def evaluate(self, numbers: Ints, asked: Ints) -> None:
        """Find out what they are on ranks that were told other numbers; nothing is added after it."""
        rows, place = np.unique(np.concatenate(self._tables), axis=0, return_inverse=True)
        self.rows: Ints = rows
        self._place: Ints = place.ravel()
        self.found: Evaluated = evaluate_forms(rows, numbers, asked)

    def seen(self, numbers: Ints) -> Ints:
        """Return what sizes are on the samples, [sizes, samples]."""
        seen: Ints = self.rows[self._place[numbers]]
        return seen

    def of(self, numbers: Ints) -> Ints:
        """Return what sizes are on the asked ranks, [sizes, asked]."""
        values: Ints = self.found.values[self._place[numbers]]
        return values

    def varying(self, numbers: Ints) -> NDArray[np.intp]:
        """Return which of some sizes are not the same on all samples."""
        seen = self.seen(numbers)
        return np.flatnonzero((seen != seen[:, :1]).any(axis=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Nodes that have the same tensors, on each sample."""

    flops: int  # number of the book
    sides: list[Side]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """The tensor of edges; of dtype None, none."""

    dtype: str | None
    sizes: Ints  # numbers of the book


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sized:
    """Nodes of a shape that differs from rank to rank."""

    nodes: Ints
    counts: Ints  # [3, asked] FLOPs, bytes read and written
    texts: list[TensorText]
    dimensions: list[Ints]  # of each text, [slots, asked]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Carried:
    """Edges of a tensor that differs from rank to rank."""

    edges: Ints
    dtype: str
    sizes: Ints  # [dimensions, asked]


class Derivation:
    """What ranks of a program have that were told other numbers."""

    def __init__(self, samples: Sequence[Sample], asked: NDArray[Any]) -> None:
        """Find it out.

        Args:
            samples: executed ranks of one program, at least one.
            asked: [ranks, numbers] what the others were told.
        """
        self.is_known: Bools = np.zeros(len(asked), bool)
        """[ranks] Of which it is certain."""
        self.problem = _compare(samples)
        """Why it is of none; '': it may be of some."""
        if self.problem:
            return
        self._base = samples[0]
        self._names: dict[int, LifeName] = {}
        parts = [one.part for one in samples]
        book = _Book()
        shape, shapes = self._find_shapes(parts, book)
        try:
            fans, alone = find_fans(parts, lambda node: shapes[int(shape[node])].sides)
        except ValueError as error:
            self.problem = str(error)
            return
        layout, layouts = self._find_layouts(parts, alone, book)
        edge_bytes = book.add([one.edges["bytes"][alone] for one in parts])
        moved = book.add([moved_bytes(one).ravel() for one in parts])
        storages = book.add([one.lives.num_bytes for one in samples])
        book.evaluate(np.stack([one.numbers for one in samples]), np.asarray(asked, np.int64))
        if not self.problem and not book.found.has_form.all():
            row = book.rows[np.flatnonzero(~book.found.has_form)[0]].tolist()
            self.problem = f"sizes of {row} on ranks that were executed are no form of what these were told"
        if self.problem:
            return
        self._sized = [one for number, row in enumerate(shapes) if (one := self._size(book, shape, number, row))]
        owners = [np.full(len(one.nodes), place) for place, one in enumerate(self._sized)]
        every = [
            np.zeros((2, 0), np.int64),
            *(np.stack([one.nodes, own]) for one, own in zip(self._sized, owners, strict=True)),
        ]
        self._sized_nodes = np.concatenate(every, axis=1)
        self._kept = weigh_named(self._base.nodes.trace)
        self._carried = [
            _Carried(edges=alone[layout == number], dtype=row.dtype or "", sizes=book.of(row.sizes))
            for number, row in enumerate(layouts)
            if len(book.varying(row.sizes))
        ]
        varying = book.varying(edge_bytes)
        self._flowing = alone[varying]
        self._flow, self._moved, self._storages = book.of(edge_bytes[varying]), book.of(moved), book.of(storages)
        self._spreads = [
            Spread(
                edges=fan.edges,
                carries=fan.carries,
                dtypes=[dtype for dtype, _ in fan.tensors],
                sizes=[book.of(dimensions) for _, dimensions in fan.tensors],
            )
            for fan in fans
        ]
        if not self.problem:
            self.is_known = book.found.is_known & (self._flow > 0).all(axis=0)
            for spread in self._spreads:
                self.is_known &= spread.is_full()

    @property
    def rank(self) -> int:
        """One of the ranks that it is made of."""
        return self._base.part.rank

    def _find_shapes(self, parts: Sequence[Part], book: _Book) -> tuple[Ints, list[_Shape]]:
        """Return each node's shape, and what goes in and out of each."""
        rows, place = np.unique(np.stack([one.nodes["shape"] for one in parts], axis=1), axis=0, return_inverse=True)
        told = [one.told["shapes"] for one in parts]
        flops = book.add([column_of(one, "flops")[rows[:, at]] for at, one in enumerate(told)])
        weights = [
            np.stack([column_of(one, name)[rows[:, at]] for at, one in enumerate(told)], axis=1) for _, name in _SIDES
        ]
        texts = [[[*one[name], ""] for one in told] for name, _ in _SIDES]
        shapes = []
        for number, row in enumerate(rows.tolist()):
            sides = []
            for said, weight in zip(texts, weights, strict=True):
                own = [texts_of_one[at] for texts_of_one, at in zip(said, row, strict=True)]
                read = [TensorText.read(text) for text in own]
                if len({text for text, _ in read}) > 1:
                    self.problem = f"ranks have other kinds of tensors: {own}"
                    read = read[:1] * len(read)
                seen = np.array([sizes for _, sizes in read], np.int64).T
                sides.append(Side(text=read[0][0], seen=seen, dimensions=book.add([*seen.T]), num_bytes=weight[number]))
            shapes.append(_Shape(flops=int(flops[number]), sides=sides))
        return place.ravel(), shapes

    def _find_layouts(self, parts: Sequence[Part], edges: Ints, book: _Book) -> tuple[Ints, list[_Layout]]:
        """Return the layout on each of some edges, and what each is."""
        columns = [one.edges["layout"][edges] for one in parts]
        rows, place = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
        known = [{number: (dtype, sizes) for number, dtype, sizes in one.told["layouts"]} for one in parts]
        layouts = []
        for row in rows.tolist():
            read = [own.get(at, (None, [])) for own, at in zip(known, row, strict=True)]
            if len({(dtype, len(sizes)) for dtype, sizes in read}) > 1:
                self.problem = f"ranks have other kinds of tensors on an edge: {read}"
                read = read[:1] * len(read)
            layouts.append(_Layout(dtype=read[0][0], sizes=book.add([sizes for _, sizes in read])))
        return place.ravel(), layouts

    def _size(self, book: _Book, shape: Ints, number: int, row: _Shape) -> _Sized | None:
        """Return what nodes of a shape have; None where it is the same on all ranks."""
        if not any((side.seen != side.seen[:, :1]).any() for side in row.sides):
            seen = np.stack([book.seen(np.array([row.flops]))[0], *(side.num_bytes for side in row.sides)])
            if (seen != seen[:, :1]).any():
                self.problem = f"nodes of {[str(side.text) for side in row.sides]} compute and weigh {seen.tolist()}"
            return None
        counts = [book.of(np.array([row.flops]))[0]]
        for side in row.sides:
            # Of several tensors it may be a sum of several forms: their dimensions say it.
            if (side.text.weigh(side.seen) == side.num_bytes).all():
                counts.append(side.text.weigh(book.of(side.dimensions)))
            elif (side.num_bytes == side.num_bytes[0]).all():
                counts.append(np.repeat(side.num_bytes[:1], len(counts[0])))
            else:
                self.problem = f"tensors {side.text} weigh {side.num_bytes.tolist()}"
        return _Sized(
            nodes=np.flatnonzero(shape == number),
            counts=np.stack(counts) if not self.problem else np.zeros((3, 0), np.int64),
            texts=[side.text for side in row.sides],
            dimensions=[book.of(side.dimensions) for side in row.sides],
        )

    def sizes(self, asked: int, base: Sizes, names: Names) -> Sizes:
        """Return the sizes of one of the asked ranks, of which it is certain.

        Args:
            asked: which.
            base: those of a rank of the program.
            names: hears of its texts and layouts.
        """
        nodes, edges = base.nodes.copy(), base.edges.copy()
        table = np.zeros((5, len(self._sized)), np.int64)
        for place, sized in enumerate(self._sized):
            said = zip(sized.texts, sized.dimensions, strict=True)
            table[:3, place] = sized.counts[:, asked]
            table[3:, place] = [names.text(text.write(dimensions[:, asked].tolist())) for text, dimensions in said]
        nodes[:, self._sized_nodes[0]] = table[:, self._sized_nodes[1]]
        edges[0, self._flowing] = self._flow[:, asked]
        for carried in self._carried:
            edges[1, carried.edges] = names.layout(carried.dtype, carried.sizes[:, asked].tolist())
        for spread in self._spreads:
            told = spread.tell(asked)
            edges[0, spread.edges] = [num_bytes for num_bytes, _, _ in told]
            edges[1, spread.edges] = [names.layout(dtype, sizes) for _, dtype, sizes in told]
        comms = np.concatenate([self._moved[:, asked].reshape(-1, 2).T, nodes[3:, base.comm_nodes]])
        return Sizes(
            nodes=nodes, edges=edges, comms=comms, comm_nodes=base.comm_nodes, memory=self._sum_up(asked, base)
        )

    def _sum_up(self, asked: int, base: Sizes) -> Mapping[str, Any] | None:
        if base.memory is None:
            return None
        lives = replace(self._base.lives, num_bytes=self._storages[:, asked])
        return sum_up(self._base.nodes, lives, self._kept, self._name)

    def _name(self, lives: Lives, one: int) -> LifeName:
        if one not in self._names:
            self._names[one] = name_life(self._base.nodes, lives, one)
        return self._names[one]


def _compare(samples: Sequence[Sample]) -> str:
    """Return in what samples are not of one program, '' if they are."""
    first = samples[0]
    for other in samples[1:]:
        for table, names in (("nodes", ("kind",)), ("edges", ("src", "dst", "kind"))):
            for name in names:
                if not np.array_equal(getattr(first.part, table)[name], getattr(other.part, table)[name]):
                    return f"ranks {first.part.rank} and {other.part.rank} have other {table}"
        if [one.node for one in first.part.comms] != [one.node for one in other.part.comms]:
            return f"ranks {first.part.rank} and {other.part.rank} have other communications"
        told = [(one.lives.role, _makers(one)) for one in (first, other)]
        if not all(np.array_equal(ours, theirs) for ours, theirs in zip(*told, strict=True)):
            return f"ranks {first.part.rank} and {other.part.rank} take memory elsewhere"
    return ""


def _makers(sample: Sample) -> Ints:
    """Return which operator made each storage; those that were there before have none."""
    makers = np.searchsorted(sample.nodes.start_ns, sample.lives.made_ns, side="right") - 1
    found: Ints = np.where(sample.lives.begin_ns < 0, -1, makers)
    return found
