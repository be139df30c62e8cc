"""The Kineto session beside a recording: it begins, ends and makes way, and the program hears nothing of it.

CUDA activities need a GPU. The session is the same with CPU activities, which are recorded here: its thread calls no
operator, so the file has none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._C._profiler import ProfilerActivity
from torch.autograd import profiler

from truedag.tracer.merge.kernels import read_kernels
from truedag.tracer.record.kineto import KernelTrace
from truedag.tracer.record.recording import record
from truedag.tracer.record.trace import read_trace

CPU = frozenset({ProfilerActivity.CPU})
PREPARE = profiler.profile._prepare_trace


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert profiler.profile._prepare_trace is PREPARE
    assert not torch._C._autograd._profiler_enabled()
    assert [thread.name for thread in threading.enumerate() if thread.name == "truedag-kineto"] == []


def test_without_cuda_nothing_happens(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.kernels.json.gz"
    path.write_bytes(b"of an earlier recording")
    kernels = KernelTrace()
    kernels.start(path)
    assert profiler.profile._prepare_trace is PREPARE
    kernels.stop()
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_what_the_merge_reads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rank-00000.kernels.json.gz"
    kernels = KernelTrace(CPU)
    with record(tmp_path / "rank-00000.trace", synchronize=False):
        kernels.start(path)
        torch.ones(3) + 1
        assert not profiler._is_profiler_enabled  # or the program would run other operators
        kernels.stop()
    trace = read_trace(tmp_path / "rank-00000.trace")
    assert [trace.ops[event["op"]]["name"] for event in trace.threads[0].events] == ["aten::ones", "aten::add"]
    found = read_kernels(path, trace.meta)
    assert found is not None
    assert (len(found.kernels), len(found.calls)) == (0, 0)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["rank-00000.kernels.json.gz", "rank-00000.trace"]
    assert "truedag" not in capfd.readouterr().err


def test_it_ends_when_the_program_begins_a_profiler(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.kernels.json.gz"
    kernels = KernelTrace(CPU)
    kernels.start(path)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True) as own:
        assert path.exists()
        torch.ones(3) + 1
    kernels.stop()
    assert {"aten::ones", "aten::add"} <= {event.name for event in own.events()}
    assert capfd.readouterr().err.count("the program begins a profiler of its own") == 1


def test_it_does_not_begin_beside_a_profiler(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.kernels.json.gz"
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True) as own:
        kernels = KernelTrace(CPU)
        kernels.start(path)
        torch.ones(3) + 1
        kernels.stop()
    assert not path.exists()
    assert {"aten::ones", "aten::add"} <= {event.name for event in own.events()}
    assert capfd.readouterr().err.count("the program runs a profiler of its own") == 1


def test_a_folder_that_is_gone_is_told_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    kernels = KernelTrace(CPU)
    kernels.start(folder / "x.kernels.json.gz")
    folder.rmdir()
    kernels.stop()
    assert capfd.readouterr().err.count("kernels are not recorded, the program runs on") == 1


def test_it_begins_and_ends_many_times_and_on_different_threads(tmp_path: Path) -> None:
    for i in range(20):
        kernels = KernelTrace(CPU)
        kernels.start(tmp_path / f"{i}.kernels.json.gz")
        stopper = threading.Thread(target=kernels.stop)
        stopper.start()
        stopper.join()
    assert len(list(tmp_path.iterdir())) == 20
