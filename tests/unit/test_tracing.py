"""Recording a program step by step in one process: windows, what is there already, what fails, what is left over."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import _global_forward_hooks as global_hooks
from torch.nn.modules.module import _global_forward_pre_hooks as global_pre_hooks

from truedag.tracer import annotate, step, trace
from truedag.tracer.annotate import REGISTRY
from truedag.tracer.errors import MergeError, RecordError
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.merge.rank_graph import build_rank_graph
from truedag.tracer.record.recording import RecorderName, record
from truedag.tracer.record.schedule import Cycle
from truedag.tracer.record.trace import read_trace
from truedag.tracer.record.trace_folder import find_trace_folders, find_traces, process_file
from truedag.tracer.record.tracer import Tracer


def operators(path: Path) -> list[str]:
    return build_rank_graph(read_trace(path)).nodes.op


def steps_of(path: Path) -> list[int | None]:
    nodes = build_rank_graph(read_trace(path)).nodes
    return [label.step for label in nodes.labels]


@pytest.mark.parametrize("recorder", ["native", "python"])
def test_each_window_is_a_folder_with_the_steps_marked(tmp_path: Path, recorder: RecorderName) -> None:
    with trace(tmp_path, schedule=Cycle(skip_first=1, wait=1, active=2, repeat=2), recorder=recorder) as tracer:
        for number in range(9):
            torch.full((1,), float(number))
            tracer.step()
    found = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*.trace")}
    assert set(found) == {f"windows/step-{first:05d}/traces/rank-00000.trace" for first in (2, 5)}
    for first in (2, 5):
        path = found[f"windows/step-{first:05d}/traces/rank-00000.trace"]
        assert operators(path) == ["aten::full"] * 2
        assert steps_of(path) == [first, first + 1]
    assert [window.first_step for window in tracer.windows] == [2, 5]
    assert find_trace_folders(tmp_path) == [path.parent for _, path in sorted(found.items())]


def test_the_first_step_that_a_program_says_was_counted_from_outside(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, is_attached=True)
    tracer.begin()
    numbers = []
    for number in range(3):
        torch.full((1,), float(number))
        tracer.count_step()  # the optimizer's
        tracer.step()
        numbers.append(tracer.num_steps)
    tracer.end()
    assert numbers == [1, 2, 3]
    assert steps_of(tmp_path / "traces" / "rank-00000.trace") == [0, 1, 2]


def test_without_a_schedule_everything_is_one_recording(tmp_path: Path) -> None:
    with trace(tmp_path / "out"):
        torch.ones(1)
        step()
        torch.zeros(1)
    torch.ones(2)
    path = tmp_path / "out" / "traces" / "rank-00000.trace"
    assert operators(path) == ["aten::ones", "aten::zeros"]
    assert steps_of(path) == [0, 1]
    assert REGISTRY.context.step is None
    step()  # without a tracer nothing happens


def test_a_single_window_lies_where_a_whole_recording_would(tmp_path: Path) -> None:
    with trace(tmp_path, schedule="1-2") as tracer:
        for _ in range(4):
            torch.ones(1)
            tracer.step()
    assert steps_of(tmp_path / "traces" / "rank-00000.trace") == [1, 2]


def test_ranks_that_are_not_wanted_record_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with trace(tmp_path, ranks=[0, 2]) as tracer:
        assert not tracer.is_recording
        torch.ones(1)
        assert REGISTRY.listener is None
    assert list(tmp_path.iterdir()) == []
    with trace(tmp_path, ranks=[1]):
        torch.ones(1)
    assert read_trace(tmp_path / "traces" / "rank-00001.trace").meta["world_size"] == 4


def test_what_cannot_be_written_is_one_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with trace(tmp_path / "file" / "out", schedule=[0, 2]) as tracer:
        for _ in range(4):
            torch.ones(1)
            tracer.step()
    assert tracer.windows == []
    written = capfd.readouterr()
    assert written.out == ""
    assert len(written.err.splitlines()) == 1
    assert "not recorded, the program runs on" in written.err


def test_an_earlier_trace_is_not_overwritten(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for operator in (torch.ones, torch.zeros):
        with trace(tmp_path):
            operator(1)
    assert operators(tmp_path / "traces" / "rank-00000.trace") == ["aten::ones"]
    assert "of an earlier run" in capfd.readouterr().err


def test_a_second_trace_and_a_wrong_schedule_are_refused(tmp_path: Path) -> None:
    with trace(tmp_path), pytest.raises(RecordError, match="runs in this process already"), trace(tmp_path / "other"):
        pass
    with pytest.raises(RecordError, match="no step"), trace(tmp_path, schedule="soon"):
        pass


def test_an_exception_ends_the_trace_and_reaches_the_program(tmp_path: Path) -> None:
    def fail() -> None:
        with trace(tmp_path):
            torch.ones(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert read_trace(tmp_path / "traces" / "rank-00000.trace").closed
    with trace(tmp_path / "again"):
        torch.ones(1)


def test_a_forked_child_leaves_the_trace_to_its_parent(tmp_path: Path) -> None:
    text = """
import os, sys, torch
from truedag.tracer import annotate, step, trace
with trace("out", schedule="0,2-") as tracer:
    torch.ones(1)
    child = os.fork()
    if child == 0:
        tracer.step(); step(); torch.zeros(1); tracer.step()
        with trace("childs") as own:
            torch.zeros(2)
        tracer.end()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for _ in range(2):
        tracer.step()
    torch.ones(1)
"""
    ended = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert operators(tmp_path / "childs" / "traces" / "rank-00000.trace") == ["aten::zeros"]
    folders = find_trace_folders(tmp_path / "out")
    assert [operators(folder / "rank-00000.trace") for folder in folders] == [["aten::ones"]] * 2


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).tanh() * 2.0  # type: ignore[no-any-return]


class Wrapper(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x.abs())  # type: ignore[no-any-return]


def test_modules_and_parameters_have_the_names_that_the_model_gives_them(tmp_path: Path) -> None:
    model, loss = Wrapper(torch.nn.Sequential(Block(), Block())), torch.nn.MSELoss()
    annotate.module(model.module[1], layer=7)  # type: ignore[index]
    data = torch.ones(1, 2)
    with trace(tmp_path, schedule="0,2") as tracer:
        for _ in range(3):
            loss(model(data), data).backward()
            tracer.step()
    assert not any((global_pre_hooks, global_hooks))
    for folder in find_trace_folders(tmp_path):
        trace_read = read_trace(folder / "rank-00000.trace")
        nodes = build_rank_graph(trace_read).nodes
        found = {(op, label.module, label.layer) for op, label in zip(nodes.op, nodes.labels, strict=True)}
        assert {
            ("aten::abs", "Sequential", None),
            ("aten::addmm", "Sequential.0.inner", None),
            ("aten::tanh", "Sequential.0", None),
            ("aten::tanh_backward", "Sequential.0", None),
            ("aten::tanh", "Sequential.1", 7),
            ("aten::mse_loss", "MSELoss", None),
        } <= found
        names = {told["name"] for told in trace_read.named_tensors if told["role"] == "parameter"}
        assert names == {f"Sequential.{number}.inner.{kind}" for number in (0, 1) for kind in ("weight", "bias")}


def test_a_module_that_raises_does_not_keep_its_label(tmp_path: Path) -> None:
    block = Block()
    with trace(tmp_path):
        with pytest.raises(RuntimeError):
            block(torch.ones(1, 3))
        torch.zeros(1)
    nodes = build_rank_graph(read_trace(tmp_path / "traces" / "rank-00000.trace")).nodes
    assert nodes.labels[nodes.op.index("aten::zeros")].module is None


def test_many_recordings_leave_nothing_behind(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())
    data = torch.ones(1, 2)

    def cycle() -> None:
        path = tmp_path / "one.trace"
        with record(path, watch=[("model", model)], synchronize=False):
            model(data).sum().backward()
        path.unlink()

    def measure() -> tuple[int, int, int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), len(gc.get_objects()), pages

    for _ in range(30):
        cycle()
    fds, threads, objects, pages = measure()
    send = torch.distributed.ProcessGroup.send
    for _ in range(200):  # a thousand, and their memory, are in test_recorder_footprint.py
        cycle()
    after = measure()
    assert after[:2] == (fds, threads)
    assert after[2] - objects < 100
    assert (after[3] - pages) * os.sysconf("SC_PAGE_SIZE") < 8 << 20
    assert REGISTRY.listener is None
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert torch.distributed.ProcessGroup.send is send


def write(folder: Path, name: str, **said: str) -> None:
    """Record as the rank that the environment names; as none without one."""
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        for key in ("RANK", "WORLD_SIZE"):
            patch.delenv(key, raising=False)
        for key, value in said.items():
            patch.setenv(key, value)
        with record(folder / name, synchronize=False):
            torch.ones(1)


def test_traces_under_a_processes_name_are_taken_for_ranks_that_left_nothing_else(tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    write(traces, "pid-here-1.trace")  # what started the ranks
    assert merge_traces(traces, tmp_path / "alone").num_ranks == 1
    write(traces, "rank-00001.trace", RANK="1", WORLD_SIZE="2")
    assert merge_traces(traces, tmp_path / "one").missing_ranks == (0,)
    write(traces, "pid-here-2.trace", RANK="0", WORLD_SIZE="2")
    write(traces, "pid-here-3.trace", RANK="1", WORLD_SIZE="2")
    said: list[str] = []
    assert merge_traces(traces, tmp_path / "both", progress=said.append).num_ranks == 2
    assert [line.split(" is left out")[0][-16:] for line in said if "left out" in line] == [
        "pid-here-1.trace",
        "pid-here-3.trace",
    ]
    write(traces, "rank-00007.trace", RANK="1", WORLD_SIZE="2")
    with pytest.raises(MergeError, match=r"both say they are rank 1: keep one"):
        merge_traces(traces, tmp_path / "wrong")


def test_a_trace_is_preferred_to_its_compressed_form(tmp_path: Path) -> None:
    for name in ("rank-00001.trace", "rank-00001.trace.gz", "rank-00000.trace.gz", process_file(), "other.trace"):
        (tmp_path / name).touch()
    assert [path.name for path in find_traces(tmp_path)] == ["rank-00000.trace.gz", "rank-00001.trace", process_file()]
