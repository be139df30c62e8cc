"""Dataflow by memory, against a byte-by-byte oracle."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from truedag.tracer.dataflow import Dataflow, NamedRegion, trace_dataflow
from truedag.tracer.nodes import FRESH, HANDLE, READ, UPDATE, WRITE, Accesses
from truedag.tracer.regions import runs
from truedag.tracer.trace import Layout

SIZES = {1: (8,), 2: (4,), 3: (2,), 4: (2, 2), 5: (0,)}
STRIDES = {1: (1,), 2: (1,), 3: (3,), 4: (4, 1), 5: (1,)}
LAYOUTS = {i: Layout(dtype="uint8", device="cpu", itemsize=1, sizes=SIZES[i], strides=STRIDES[i]) for i in SIZES}
STORAGES = {1: (100, 1, 8), 2: (200, 2, 8), 3: (100, 3, 16)}  # 1 and 3 are one StorageImpl under two sizes

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
            kind = draw(st.sampled_from([READ, READ, UPDATE, HANDLE]))
            layout = draw(st.sampled_from(list(LAYOUTS)))
            offset = (
                draw(st.integers(0, 8 - (4 if layout in (2, 3) else 6 if layout == 4 else 0))) if layout != 1 else 0
            )
            rows.append((node, kind, draw(st.sampled_from([1, 2, 3])), layout, min(offset, 2)))
        for _ in range(draw(st.integers(0, 2))):
            kind = draw(st.sampled_from([WRITE, FRESH]))
            layout = 1 if kind == FRESH else draw(st.sampled_from([1, 2, 3, 4]))
            rows.append((node, kind, draw(st.sampled_from([1, 2, 3])), layout, 0 if layout == 1 else 2))
    return rows


def oracle(rows: list[Row]) -> tuple[dict[tuple[int, int], int], set[tuple[int, int]]]:
    """Bytes between nodes, and zero-byte dependencies, one byte at a time."""
    memory: dict[int, dict[int, int]] = {}
    maker: dict[int, int] = {}
    current: dict[int, int] = {}
    data: dict[tuple[int, int], int] = {}
    handles: set[tuple[int, int]] = set()
    for node, kind, storage, layout, offset in rows:
        impl = STORAGES[storage][0]
        if kind == FRESH or current.get(impl, storage) != storage:
            memory[impl] = {}
            maker.pop(impl, None)
        current[impl] = storage
        if kind == FRESH:
            maker[impl] = node
        cells = memory.setdefault(impl, {})
        touched = [byte for begin, end in runs(LAYOUTS[layout], offset) for byte in range(begin, end)]
        if kind in (WRITE, FRESH):
            cells.update(dict.fromkeys(touched, node))
        elif kind == HANDLE or not touched:
            if impl in maker and maker[impl] != node:
                handles.add((maker[impl], node))
        else:
            for byte in touched:
                writer = cells.get(byte, maker.get(impl, -1))
                if writer != node:
                    data[writer if writer >= 0 else -1, node] = data.get((writer if writer >= 0 else -1, node), 0) + 1
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
        flow = trace_dataflow(make(rows), layouts=LAYOUTS, storages=STORAGES, named=[], exact=exact)
        assert found(flow) == oracle(rows)


def test_a_write_to_one_half_makes_no_reader_of_the_other_depend_on_it() -> None:
    half = 2  # layout of 4 bytes
    rows = [
        (0, FRESH, 1, 1, 0),
        (1, WRITE, 1, half, 0),
        (2, WRITE, 1, half, 4),
        (3, READ, 1, half, 0),
        (4, READ, 1, 1, 0),
    ]
    flow = trace_dataflow(make(rows), layouts=LAYOUTS, storages=STORAGES, named=[])
    assert found(flow)[0] == {(1, 3): 4, (1, 4): 4, (2, 4): 4}


def test_interleaved_columns_do_not_depend_on_each_other() -> None:
    columns = {1: LAYOUTS[1], 9: Layout(dtype="uint8", device="cpu", itemsize=1, sizes=(4,), strides=(2,))}
    rows = [(0, FRESH, 1, 1, 0), (1, WRITE, 1, 9, 0), (2, WRITE, 1, 9, 1), (3, READ, 1, 9, 0), (4, READ, 1, 9, 1)]
    flow = trace_dataflow(make(rows), layouts=columns, storages=STORAGES, named=[])
    assert found(flow)[0] == {(1, 3): 4, (2, 4): 4}


def test_what_was_there_before_comes_from_named_sources() -> None:
    named = [
        NamedRegion(name="weight", role="parameter", storage=1, layout=2, offset=0),
        NamedRegion(name="idle", role="parameter", storage=2, layout=1, offset=0),
        NamedRegion(name="unread", role="gradient", storage=3, layout=1, offset=0),
    ]
    rows = [(0, READ, 1, 1, 0)]
    flow = trace_dataflow(make(rows), layouts=LAYOUTS, storages=STORAGES, named=named)
    by_source = {
        flow.sources[-1 - src].name: count
        for src, count in zip(flow.src.tolist(), flow.num_bytes.tolist(), strict=True)
    }
    assert by_source == {"weight": 4, None: 4}
    assert {source.name for source in flow.sources if source.role == "parameter"} == {"weight", "idle"}
    assert "unread" not in {source.name for source in flow.sources}
