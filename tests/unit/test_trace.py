"""Trace files: both sides of the format agree, a cut file is read as far as it goes, a broken one is refused."""

import multiprocessing
import os
import resource
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from truedag.tracer.errors import MergeError, RecordError, TraceError
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.record import format as layout
from truedag.tracer.record.native.build import load_recorder
from truedag.tracer.record.recording import record
from truedag.tracer.record.trace import read_trace


def record_something(path: Path) -> None:
    with record(path, synchronize=False):
        torch.ones(4).add_(1).sum()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("trace") / "rank-00000.trace"
    record_something(path)
    return path.read_bytes()


def test_native_and_python_layouts_are_the_same() -> None:
    assert load_recorder().sizes() == {
        "event": layout.EVENT.itemsize,
        "ref": layout.REF.itemsize,
        "comm": layout.COMM.itemsize,
        "work": layout.WORK.itemsize,
        "tensor": layout.TENSOR.itemsize,
        "storage": layout.STORAGE.itemsize,
        "free": layout.FREE.itemsize,
        "wait": layout.WAIT.itemsize,
        "place": layout.PLACE.itemsize,
        "chunk": layout.CHUNK.itemsize,
        "file": layout.FILE_HEADER_BYTES,
    }


def test_a_recording_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.trace"
    record_something(path)
    trace = read_trace(path)
    assert trace.closed
    (thread,) = [thread for thread in trace.threads if len(thread.events)]
    assert [trace.ops[int(op)]["name"] for op in thread.events["op"]] == ["aten::ones", "aten::add_", "aten::sum"]
    assert (thread.events["end_ns"] >= thread.events["start_ns"]).all()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.trace"
    record_something(path)
    before = path.read_bytes()
    for recorder in ("native", "python"):
        with pytest.raises(RecordError, match="exists"), record(path, recorder=recorder, synchronize=False):
            pass
    assert path.read_bytes() == before


def test_another_version_is_named(recorded: bytes, tmp_path: Path) -> None:
    path = tmp_path / "old.trace"
    path.write_bytes(recorded[:8] + np.array([99], "<u4").tobytes() + recorded[12:])
    with pytest.raises(TraceError, match="version 99"):
        read_trace(path)


@pytest.mark.parametrize("kept", [0, 100, layout.FILE_HEADER_BYTES])
def test_a_rank_that_ended_before_it_recorded_is_missing(recorded: bytes, tmp_path: Path, kept: int) -> None:
    (tmp_path / "rank-00000.trace").write_bytes(recorded[:kept] + bytes(layout.SEGMENT_BYTES - kept))
    with pytest.raises(MergeError, match=r"nothing to merge: .*rank-00000.trace holds nothing"):
        merge_traces(tmp_path, tmp_path / "dag")
    for rank in (1, 2):
        torch_step(tmp_path, rank)
    assert merge_traces(tmp_path, tmp_path / "dag").missing_ranks == (0,)


def torch_step(folder: Path, rank: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", "3")
        record_something(folder / f"rank-{rank:05d}.trace")


def test_something_else_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "notes.trace"
    path.write_text("hello")
    with pytest.raises(TraceError, match="no truedag trace"):
        read_trace(path)
    with pytest.raises(TraceError, match="cannot read"):
        read_trace(tmp_path / "absent.trace")


def _record_until_killed(path: Path, ready: Path) -> None:
    with record(path, synchronize=False):
        total = torch.zeros(4)
        for i in range(10**9):
            total.add_(1)
            if i == 20_000:
                ready.touch()


def test_a_killed_process_loses_no_completed_record(tmp_path: Path) -> None:
    path, ready = tmp_path / "rank-00000.trace", tmp_path / "ready"
    child = multiprocessing.get_context("spawn").Process(target=_record_until_killed, args=(path, ready))
    child.start()
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    trace = read_trace(path)
    assert not trace.closed
    events = trace.threads[0].events
    assert len(events) > 20_000
    names = [trace.ops[int(op)]["name"] for op in events["op"]]
    assert names[0] == "aten::zeros"
    assert set(names[1:]) == {"aten::add_"}


def _record_beyond_the_limit(path: Path, told: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, resource.RLIM_INFINITY))
    total = torch.zeros(4)
    with record(path, synchronize=False) as recording:
        for _ in range(250_000):
            total.add_(1)
    told.send((total.tolist(), recording.switched_off))


def test_a_full_disk_ends_the_recording_and_not_the_program(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rank-00000.trace"
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_record_beyond_the_limit, args=(path, theirs))
    child.start()
    assert mine.poll(100)
    total, why = mine.recv()
    child.join()
    assert child.exitcode == 0
    assert total == [250_000.0] * 4
    assert "no room for the trace" in why
    assert capfd.readouterr().err.count("recording stopped, the program runs on") == 1
    assert len(read_trace(path).threads[0].events) > 20_000
