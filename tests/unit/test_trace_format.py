"""What a trace's bytes mean: records by hand, ends that are missing, and what is broken."""

import gzip
import multiprocessing
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade_trace import call, chunk, entry, event, header, memory, records, tables

import truedag.tracer.record.trace as trace_module
from truedag.tracer.errors import EmptyTraceError, TraceError
from truedag.tracer.record import format as layout
from truedag.tracer.record.format import ChunkKind, EventFlags, TableKind
from truedag.tracer.record.recording import record
from truedag.tracer.record.trace import Trace, read_trace

RELU, REDUCE, UNKNOWN = 1, 2, 9
REFS = records(ChunkKind.REFS, (1,), (2,), (2,), (1,))


def read(path: Path, *pieces: bytes) -> Trace:
    path.write_bytes(b"".join(pieces))
    return read_trace(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rank-00000.trace"


def test_the_example_of_the_page_is_what_the_page_says(path: Path) -> None:
    page = Path(trace_module.__file__).with_name("FORMAT.md").read_text(encoding="utf-8")
    lines = re.findall(r"^([0-9a-f]{6})(?:  ([0-9a-f]{2}(?: +[0-9a-f]{2}){15})  \|.*)?$", page, re.MULTILINE)
    data = bytearray(int(lines[-1][0], 16))
    for offset, words in lines[:-1]:
        data[int(offset, 16) : int(offset, 16) + 16] = bytes.fromhex(words)
    trace = read(path, bytes(data))
    (thread,) = trace.threads
    assert (trace.closed, trace.truncated, trace.rank) == (True, "", 0)
    assert trace.ops[int(thread.events["op"][0])]["name"] == "aten::relu"
    assert thread.events[["start_ns", "end_ns", "sequence", "num_inputs", "num_outputs"]].tolist() == [
        (1_000_000_000, 1_000_002_500, -1, 1, 1)
    ]
    assert thread.refs.tolist() == [(0, 1, 1, 0, 0), (0, 2, 1, 0, 0)]
    assert trace.layouts[1].sizes == (2, 3)
    assert trace.storages == {1: (0x51, 0xA0, 24), 2: (0x52, 0xB0, 24)}


def test_refs_and_comms_are_counted_by_thread(path: Path) -> None:
    comms = [(7, order, 1, -1, -1, 0, 0, number) for order, number in ((0, 1), (1, 3))]
    trace = read(
        path,
        header(),
        tables(call(3, 1, [], [])),
        memory(),
        memory(thread=4),
        records(ChunkKind.REFS, (1,), (2,), (2,), (0,)),
        records(ChunkKind.REFS, (2,), thread=4),
        records(ChunkKind.COMMS, *comms),
        records(ChunkKind.EVENTS, event(RELU), event(3)),
        records(ChunkKind.COMMS, (7, 0, 1, -1, -1, 0, 0, 2), thread=4),
        records(ChunkKind.EVENTS, event(REDUCE, flags=EventFlags.COMM), event(REDUCE, flags=EventFlags.COMM)),
        records(ChunkKind.EVENTS, event(REDUCE, flags=EventFlags.COMM), thread=4),
        records(ChunkKind.WORKS, (1, 2, 3, 2), (1, 2, 77, 2), (5, 6, 2, 99), thread=5),
        records(ChunkKind.WAITS, (3, 4, 1, 0), (3, 4, 0, 0), (3, 4, 77, 0)),
    )
    first, second, third = trace.threads
    assert first.events["first_ref"].tolist() == [0, 2, 2, 3]
    assert first.events["comm"].tolist() == [0, 0, 1, 2]
    assert first.refs["storage"].tolist() == [1, 2, 2, 0]
    assert first.refs["layout"].tolist() == [1, 1, 1, 0]
    assert second.refs["storage"].tolist() == [2]
    assert second.comms["id"].tolist() == [2]
    assert third.works[["comm_id", "op"]].tolist() == [(3, 2), (2, 0)]
    assert first.waits["comm_id"].tolist() == [1, 0]


def test_durations_and_sequences_have_their_units(path: Path) -> None:
    long = (1000, 5, RELU, 3, 0xFFFFFFFE, 6, 1, 2, EventFlags.LONG | EventFlags.IN_BACKWARD)
    trace = read(path, header(), tables(), memory(), REFS, records(ChunkKind.EVENTS, event(RELU), long))
    events = trace.threads[0].events
    assert events["end_ns"].tolist() == [1010, 1000 + 5 * 1024]
    assert events["sequence"].tolist() == [-1, 3]
    assert events["backward_sequence"].tolist() == [-1, 0xFFFFFFFE]
    assert events[["fwd_thread", "label", "context"]].tolist() == [(0, 0, 0), (6, 1, 2)]


@pytest.mark.parametrize(
    ("pieces", "missing"),
    [
        ([memory(), REFS, records(ChunkKind.EVENTS, *[event(RELU)] * 2, event(UNKNOWN), event(RELU))], "call"),
        ([memory(), REFS, records(ChunkKind.EVENTS, *[event(RELU)] * 4)], "tensors"),
        (
            [memory(), REFS, records(ChunkKind.REFS, (3,), *[(1,)] * 3), records(ChunkKind.EVENTS, *[event(RELU)] * 4)],
            "tensor",
        ),
        (
            [
                records(ChunkKind.TENSORS, (0, 1, 1), (0, 1, 1), (0, 3, 1)),
                records(ChunkKind.STORAGES, (1, 1, 1)),
                REFS,
                records(ChunkKind.REFS, (1,), (3,), (0,), (0,)),
                records(ChunkKind.EVENTS, *[event(RELU)] * 4),
            ],
            "tensor",
        ),
        (
            [
                memory(),
                REFS,
                records(ChunkKind.REFS, *[(1,)] * 4),
                records(ChunkKind.EVENTS, *[event(RELU)] * 2, *[event(REDUCE, flags=EventFlags.COMM)] * 2),
            ],
            "communication",
        ),
        (
            [
                memory(),
                REFS,
                records(ChunkKind.REFS, *[(1,)] * 4),
                records(ChunkKind.COMMS, (0, 0, 5, -1, -1, 0, 0, 1), (0, 0, 1, -1, -1, 0, 0, 2)),
                records(ChunkKind.EVENTS, *[event(RELU)] * 2, *[event(REDUCE, flags=EventFlags.COMM)] * 2),
            ],
            "group",
        ),
    ],
)
def test_a_thread_ends_before_what_is_not_there_and_a_whole_file_has_no_such_thing(
    path: Path, pieces: list[bytes], missing: str
) -> None:
    trace = read(path, header(closed=0), tables(), *pieces)
    assert trace.truncated == f"event 2 of 4 of thread 0 names a {missing} that is not in the file"
    assert not trace.closed
    (thread,) = trace.threads
    assert (len(thread.events), len(thread.refs), len(thread.comms)) == (2, 4, 0)
    with pytest.raises(TraceError, match=rf"broken at byte \d+: event 2 of 4 of thread 0 names a {missing}"):
        read(path, header(), tables(), *pieces)


def test_the_byte_that_is_named_is_the_events(path: Path) -> None:
    pieces = [header(), tables(), memory(), REFS, records(ChunkKind.EVENTS, event(RELU))]
    where = sum(map(len, pieces)) + layout.CHUNK.itemsize
    with pytest.raises(TraceError, match=f"at byte {where}: event 1 of 3"):
        read(path, *pieces, records(ChunkKind.EVENTS, event(UNKNOWN), event(RELU)))


def test_the_last_event_of_a_recorder_that_ran_out_of_room_may_lack_its_names(path: Path) -> None:
    last = records(ChunkKind.EVENTS, event(RELU), event(UNKNOWN))
    trace = read(path, header(), tables(), memory(), REFS, last)
    assert (len(trace.threads[0].events), trace.closed) == (1, False)
    assert "event 1 of 2 of thread 0 names a call" in trace.truncated


def test_what_an_unfinished_event_left_is_left_out(path: Path) -> None:
    comm = records(ChunkKind.COMMS, (0, 0, 1, -1, -1, 0, 0, 1))
    for closed in (0, 1):
        trace = read(
            path, header(closed=closed), tables(), memory(), REFS, comm, records(ChunkKind.EVENTS, event(RELU))
        )
        (thread,) = trace.threads
        assert (len(thread.refs), len(thread.comms), trace.truncated) == (2, 0, "")
        assert trace.closed == bool(closed)


def test_an_end_that_is_missing_is_told_from_a_file_that_is_broken(path: Path) -> None:
    events = records(ChunkKind.EVENTS, *[event(RELU)] * 2)
    whole = [header(), tables(), memory(), REFS, events]
    cut = b"".join(whole)[: -len(events) + layout.CHUNK.itemsize + 60]
    trace = read(path, cut)
    assert (len(trace.threads[0].events), trace.closed) == (1, False)
    assert trace.truncated == f"the file ends at byte {len(cut)}, inside a chunk of events"

    begin = sum(map(len, whole[:2]))
    data = bytearray(b"".join(whole))
    data[begin + 16 : begin + 24] = struct.pack("<Q", 1 << 30)
    with pytest.raises(TraceError, match=f"broken at byte {begin}: a chunk of {1 << 30} bytes .* over other chunks"):
        read(path, bytes(data))
    data[begin : begin + layout.CHUNK.itemsize] = bytes(layout.CHUNK.itemsize)
    with pytest.raises(TraceError, match=f"broken at byte {begin}: nothing, and yet a chunk"):
        read(path, bytes(data))


def test_every_cut_of_a_trace_is_read_as_far_as_it_goes(path: Path) -> None:
    events = records(ChunkKind.EVENTS, *[event(RELU)] * 2)
    whole = b"".join([header(), tables(), memory(), REFS, events])
    inside = len(whole) - len(events) + layout.CHUNK.itemsize + layout.EVENT.itemsize
    num_events = []
    for length in sorted([*range(0, len(whole), 190), inside]):
        for closed in (0, 1):
            try:
                trace = read(path, header(closed=closed)[:length], whole[len(header()) : length])
                num_events.append(sum(len(thread.events) for thread in trace.threads))
                assert trace.truncated
                assert not trace.closed
            except EmptyTraceError:
                num_events.append(0)
    assert num_events == sorted(num_events)
    assert {0, 1, 2} == set(num_events)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (entry(TableKind.LABEL, 1, b'{"a":' * 90_000), "no JSON"),
        (entry(TableKind.LABEL, 1, b"[1]"), "no JSON object"),
        (entry(TableKind.OP, 3, b'{"name":"x"}'), "op without overload"),
        (entry(TableKind.OP, 0xFFFFFFF0, b'{"name":"x","overload":"","schema":""}'), "operator number 4294967280"),
        (entry(TableKind.GROUP, 2, b'{"name":"x","rank":0,"size":1,"ranks":["a"]}'), "ranks are no ranks"),
        (entry(TableKind.META, 1, b'{"rank":3,"world_size":2}'), "rank 3 of 2"),
        (entry(TableKind.LAYOUT, 2, struct.pack("<4i", 6, 0, 4, 1 << 30)), "a layout of 16 bytes with 1073741824"),
        (entry(TableKind.CALL, 3, struct.pack("<3I", 1, 1 << 31, 0)), "a call of 12 bytes with 2147483648"),
        (struct.pack("<4I", TableKind.LABEL, 1, 1 << 31, 0), "half a table entry"),
        (entry(99, 1, b""), "no table entry begins there"),
    ],
)
def test_a_table_that_is_broken_is_refused_with_its_place(path: Path, bad: bytes, said: str) -> None:
    where = layout.FILE_HEADER_BYTES + len(tables()) + layout.CHUNK.itemsize
    with pytest.raises(TraceError, match=rf"is broken at byte {where}: .*{said}"):
        read(path, header(), tables(), chunk(ChunkKind.TABLES, bad))


def test_compressed_traces_are_read_as_they_are(path: Path) -> None:
    whole = b"".join([header(), tables(), memory(), REFS, records(ChunkKind.EVENTS, *[event(RELU)] * 2)])
    packed = gzip.compress(whole)
    trace = read(path, packed)
    assert (len(trace.threads[0].events), trace.closed, trace.truncated) == (2, True, "")
    trace = read(path, packed[:-12])
    assert not trace.closed
    assert "the compressed file is cut off" in trace.truncated
    with pytest.raises(TraceError, match="gzip cannot read on"):
        read(path, packed[:-8] + bytes(8))
    with pytest.raises(TraceError, match="expands to more than 300 times its size"):
        read(path, gzip.compress(bytes(200 << 20)))


def _record_for_long(path: Path, ready: Path, stop: Path) -> None:
    total = torch.zeros(4)
    with record(path, synchronize=False):
        ready.touch()
        while not stop.exists():
            for size in range(1, 400):
                total.add_(torch.ones(size)[:1])


def test_a_trace_is_read_while_it_is_written(path: Path, tmp_path: Path) -> None:
    ready, stop = tmp_path / "ready", tmp_path / "stop"
    child = multiprocessing.get_context("spawn").Process(target=_record_for_long, args=(path, ready, stop))
    child.start()
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    num_events = [0]
    while len(num_events) < 12 or (num_events[-1] < 20_000 and time.monotonic() < deadline):
        trace = read_trace(path)
        assert (trace.closed, trace.truncated) == (False, "")
        events = max((thread.events for thread in trace.threads), key=len, default=np.zeros(0, trace_module.EVENTS))
        num_events.append(len(events))
    stop.touch()
    child.join()
    assert num_events == sorted(num_events)
    assert num_events[-1] >= 20_000
    trace = read_trace(path)
    assert (trace.closed, trace.truncated) == (True, "")
