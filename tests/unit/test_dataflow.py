"""Dataflow by memory, against a byte-by-byte oracle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truedag.tracer.merge import dataflow, last_writers
from truedag.tracer.merge.accesses import CUT, EMPTY, FRESH, HANDLE, NAMED, READ, TOUCH, UPDATE, WRITE, Accesses
from truedag.tracer.merge.dataflow import Dataflow, NamedRegion, trace_dataflow
from truedag.tracer.merge.regions import runs
from truedag.tracer.record.trace import Layout

SIZES = {1: (8,), 2: (4,), 3: (2,), 4: (2, 2), 5: (0,)}
STRIDES = {1: (1,), 2: (1,), 3: (3,), 4: (4, 1), 5: (1,)}
LAYOUTS = {i: Layout(dtype="uint8", device="cpu", itemsize=1, sizes=SIZES[i], strides=STRIDES[i]) for i in SIZES}
# The StorageImpl of each storage: 1 and 3 are one that moves and grows.

IMPLS = np.array([0, 100, 200, 100, 400])

Row = tuple[int, int, int, int, int]


def make(rows: list[Row]) -> Accesses:
    columns = np.array(rows, np.int64).reshape(-1, 5)
    node, kind, storage, layout, offset = columns.T
    return Accesses(node=node, kind=kind, storage=storage, layout=layout, offset=offset)


@st.composite
def programs(draw: st.DrawFn) -> list[Row]:
    """Nodes with reads, then updates, then writes, as the recorder gives them."""
    rows: list[Row] = []
    for node in range(draw(st.integers(1, 12))):
        for _ in range(draw(st.integers(0, 3))):
            kind = draw(st.sampled_from([READ, READ, UPDATE, TOUCH, HANDLE, CUT]))
            layout = draw(st.sampled_from(list(LAYOUTS)))
            offset = (
                draw(st.integers(0, 8 - (4 if layout in (2, 3) else 6 if layout == 4 else 0))) if layout != 1 else 0
            )
            rows.append((node, kind, draw(st.sampled_from([1, 2, 3])), layout, min(offset, 2)))
        for _ in range(draw(st.integers(0, 2))):
            kind = draw(st.sampled_from([WRITE, WRITE, FRESH, EMPTY]))
            layout = 1 if kind in (FRESH, EMPTY) else draw(st.sampled_from([1, 2, 3, 4]))
            rows.append((node, kind, draw(st.sampled_from([1, 2, 3])), layout, 0 if layout == 1 else 2))
    return rows


def oracle(rows: list[Row]) -> tuple[dict[tuple[int, int], int], set[tuple[int, int]]]:
    """Bytes between nodes, and zero-byte dependencies, one byte at a time."""
    memory: dict[int, dict[int, int]] = {}
    maker: dict[int, int] = {}
    filled: set[int] = set()  # memory whose maker gave it content
    data: dict[tuple[int, int], int] = {}
    handles: set[tuple[int, int]] = set()
    for node, kind, storage, layout, offset in rows:
        impl = int(IMPLS[storage])
        if kind in (FRESH, EMPTY, CUT):
            memory[impl] = {}
            maker.pop(impl, None)
            filled.discard(impl)
        if kind in (FRESH, EMPTY):
            maker[impl] = node
        if kind == FRESH:
            filled.add(impl)
        cells = memory.setdefault(impl, {})
        touched = [byte for begin, end in runs(LAYOUTS[layout], offset).tolist() for byte in range(begin, end)]
        if kind in (WRITE, FRESH):
            cells.update(dict.fromkeys(touched, node))
        elif kind in (EMPTY, CUT):
            continue
        elif kind == HANDLE or not touched:
            handles |= {(maker[impl], node)} if impl in maker else set()
        else:
            unwritten = any(byte not in cells for byte in touched)
            if unwritten and impl in maker and (kind == TOUCH or impl not in filled):
                handles |= {(maker[impl], node)} - {(cells.get(byte), node) for byte in touched}
            for byte in touched:
                if byte in cells:
                    writer = cells[byte]
                elif impl in maker and (kind == TOUCH or impl not in filled):
                    writer = node if kind == TOUCH else -1
                else:
                    writer = maker.get(impl, -1)
                if writer != node:
                    data[writer, node] = data.get((writer, node), 0) + 1
    handles = {(src, dst) for src, dst in handles if src != dst}
    return data, handles


def found(flow: Dataflow) -> tuple[dict[tuple[int, int], int], set[tuple[int, int]]]:
    data: dict[tuple[int, int], int] = {}
    handles = set()
    for src, dst, count in zip(flow.src.tolist(), flow.dst.tolist(), flow.num_bytes.tolist(), strict=True):
        if count:
            data[max(src, -1), dst] = data.get((max(src, -1), dst), 0) + count
        else:
            handles.add((src, dst))
    return data, handles


@settings(max_examples=200, deadline=None)
@given(programs())
def test_edges_are_what_each_byte_says(rows: list[Row]) -> None:
    for exact in (False, True):
        flow = trace_dataflow(make(rows), layouts=LAYOUTS, impls=IMPLS, named=[], exact=exact)
        assert found(flow) == oracle(rows)


WHOLE, ITEM, COLUMN = 1, 2, 3
CACHES = {
    WHOLE: Layout(dtype="uint8", device="cpu", itemsize=1, sizes=(64,), strides=(1,)),
    ITEM: Layout(dtype="uint8", device="cpu", itemsize=1, sizes=(8,), strides=(1,)),
    COLUMN: Layout(dtype="uint8", device="cpu", itemsize=1, sizes=(4, 2), strides=(8, 1)),
    4: Layout(dtype="uint8", device="cpu", itemsize=1, sizes=(24,), strides=(1,)),
    5: Layout(dtype="uint8", device="cpu", itemsize=1, sizes=(0,), strides=(1,)),
}


@st.composite
def caches(draw: st.DrawFn) -> tuple[list[Row], list[NamedRegion], list[NamedRegion]]:
    """Buckets and caches: slices that are written and read in any order, and what was named before and on the way."""
    rows: list[Row] = []
    late: list[NamedRegion] = []
    columns = draw(st.sampled_from([0, 0, 0, 1]))  # most programs have no strided writes
    place = st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([WHOLE, ITEM, ITEM, 4, 5, COLUMN]), st.integers(0, 5))
    for node in range(draw(st.integers(1, 16))):
        kinds = draw(st.lists(st.sampled_from([READ, READ, UPDATE, TOUCH, HANDLE]), max_size=3))
        kinds += draw(st.lists(st.sampled_from([WRITE, WRITE, WRITE, NAMED, CUT]), max_size=2))
        if draw(st.integers(0, 7)) == 0:
            kinds.append(draw(st.sampled_from([FRESH, EMPTY])))
        for kind in kinds:
            storage, layout, slot = draw(place)
            if kind == WRITE and layout == COLUMN and not columns:
                layout = ITEM
            offset = 0 if layout == WHOLE else 8 * slot
            if kind in (FRESH, EMPTY):
                layout, offset = draw(st.sampled_from([WHOLE, ITEM])), 0
            if kind == NAMED:
                late.append(
                    NamedRegion(name=f"late{node}", role="input", storage=storage, layout=layout, offset=offset)
                )
            rows.append((-len(late) if kind == NAMED else node, kind, storage, layout, offset))
    roles = st.sampled_from(["parameter", "gradient", "state"])
    named = [
        NamedRegion(
            name=f"before{i}", role=draw(roles), storage=draw(st.sampled_from([1, 2, 3])), layout=ITEM, offset=16 * i
        )
        for i in range(draw(st.integers(0, 3)))
    ]
    return rows, named, late


@settings(max_examples=300, deadline=None)
@given(caches())
def test_following_pieces_is_following_bytes(program: tuple[list[Row], list[NamedRegion], list[NamedRegion]]) -> None:
    rows, named, late = program
    ways = [
        trace_dataflow(make(rows), layouts=CACHES, impls=IMPLS, named=named, late=late, exact=exact)
        for exact in (False, True)
    ]
    assert ways[0].sources == ways[1].sources
    for name in ("src", "dst", "num_bytes", "layout", "is_update"):
        assert getattr(ways[0], name).tolist() == getattr(ways[1], name).tolist(), name


def test_slices_are_not_followed_one_generation_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataflow, "LastWriters", None)
    rows = [(0, FRESH, 1, WHOLE, 0), *((i, WRITE, 1, ITEM, 8 * (i % 8)) for i in range(1, 20)), (20, READ, 1, WHOLE, 0)]
    flow = trace_dataflow(make(rows), layouts=CACHES, impls=IMPLS, named=[])
    assert found(flow)[0] == {(writer, 20): 8 for writer in range(12, 20)}


def test_a_write_to_one_half_makes_no_reader_of_the_other_depend_on_it() -> None:
    half = 2  # layout of 4 bytes
    rows = [
        (0, FRESH, 1, 1, 0),
        (1, WRITE, 1, half, 0),
        (2, WRITE, 1, half, 4),
        (3, READ, 1, half, 0),
        (4, READ, 1, 1, 0),
    ]
    flow = trace_dataflow(make(rows), layouts=LAYOUTS, impls=IMPLS, named=[])
    assert found(flow)[0] == {(1, 3): 4, (1, 4): 4, (2, 4): 4}


def test_interleaved_columns_do_not_depend_on_each_other() -> None:
    columns = {1: LAYOUTS[1], 9: Layout(dtype="uint8", device="cpu", itemsize=1, sizes=(4,), strides=(2,))}
    rows = [(0, FRESH, 1, 1, 0), (1, WRITE, 1, 9, 0), (2, WRITE, 1, 9, 1), (3, READ, 1, 9, 0), (4, READ, 1, 9, 1)]
    flow = trace_dataflow(make(rows), layouts=columns, impls=IMPLS, named=[])
    assert found(flow)[0] == {(1, 3): 4, (2, 4): 4}


def test_what_was_there_before_comes_from_named_sources() -> None:
    named = [
        NamedRegion(name="weight", role="parameter", storage=1, layout=2, offset=0),
        NamedRegion(name="idle", role="parameter", storage=2, layout=1, offset=0),
        NamedRegion(name="unread", role="gradient", storage=4, layout=1, offset=0),
    ]
    rows = [(0, READ, 1, 1, 0)]
    flow = trace_dataflow(make(rows), layouts=LAYOUTS, impls=IMPLS, named=named)
    by_source = {
        flow.sources[-1 - src].name: count
        for src, count in zip(flow.src.tolist(), flow.num_bytes.tolist(), strict=True)
    }
    assert by_source == {"weight": 4, None: 4}
    assert {source.name for source in flow.sources if source.role == "parameter"} == {"weight", "idle"}
    assert "unread" not in {source.name for source in flow.sources}


def test_what_was_named_on_the_way_is_a_source_if_no_node_had_written_it() -> None:
    late = [
        NamedRegion(name="tokens", role="input", storage=1, layout=1, offset=0),
        NamedRegion(name="computed", role="input", storage=2, layout=1, offset=0),
        NamedRegion(name="written", role="state", storage=4, layout=1, offset=0),
    ]
    rows = [
        (0, CUT, 1, 1, 0), (0, FRESH, 2, 1, 0), (0, WRITE, 4, 1, 0), (-1, NAMED, 1, 1, 0), (-2, NAMED, 2, 1, 0),
        (-3, NAMED, 4, 1, 0), (1, READ, 1, 2, 0), (1, READ, 2, 1, 0), (1, READ, 4, 1, 0), (2, CUT, 1, 1, 0),
        (2, READ, 1, 1, 0),
    ]  # fmt: skip
    flow = trace_dataflow(make(rows), layouts=LAYOUTS, impls=IMPLS, named=[], late=late)
    assert [source.name for source in flow.sources] == ["tokens", None]
    assert found(flow)[0] == {(-1, 1): 4, (0, 1): 16, (-1, 2): 8}


def test_a_storage_that_moved_keeps_its_writers_and_its_name() -> None:
    named = [NamedRegion(name="weight", role="parameter", storage=1, layout=1, offset=0)]
    rows = [(0, READ, 3, 1, 0), (1, WRITE, 1, 1, 0), (2, READ, 3, 1, 0), (3, FRESH, 1, 1, 0), (4, READ, 3, 1, 0)]
    flow = trace_dataflow(make(rows), layouts=LAYOUTS, impls=IMPLS, named=named)
    assert found(flow)[0] == {(-1, 0): 8, (1, 2): 8, (3, 4): 8}
    assert [source.name for source in flow.sources] == ["weight"]


def test_what_was_made_empty_was_filled_from_outside() -> None:
    rows = [(0, EMPTY, 1, 1, 0), (1, UPDATE, 1, 1, 0), (1, WRITE, 1, 1, 0), (2, READ, 1, 1, 0)]
    flow = trace_dataflow(make(rows), layouts=LAYOUTS, impls=IMPLS, named=[])
    assert found(flow) == ({(-1, 1): 8, (1, 2): 8}, {(0, 1)})
    assert [source.role for source in flow.sources] == ["input"]


def test_columns_of_a_large_matrix_are_followed_without_listing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_writers, "runs", None)
    sizes = (1 << 20, 1 << 10)
    matrix = Layout(dtype="x", device="cpu", itemsize=4, sizes=sizes, strides=(1 << 11, 2))
    whole = Layout(dtype="x", device="cpu", itemsize=4, sizes=(1 << 31,), strides=(1,))
    rows = [(0, FRESH, 1, 2, 0), (1, UPDATE, 1, 1, 0), (1, WRITE, 1, 1, 0), (2, READ, 1, 1, 0), (3, WRITE, 1, 2, 0)]
    flow = trace_dataflow(make([*rows, (4, READ, 1, 2, 0)]), layouts={1: matrix, 2: whole}, impls=IMPLS, named=[])
    assert found(flow)[0] == {(0, 1): 4 << 30, (1, 2): 4 << 30, (3, 4): 8 << 30}
