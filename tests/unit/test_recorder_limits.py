"""Where there is no room any more the recorder ends, says so once, and the program runs on undisturbed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from truedag.tracer.errors import RecordError
from truedag.tracer.merge.rank_graph import build_rank_graph
from truedag.tracer.record.recording import record
from truedag.tracer.record.trace import Trace, read_trace

TOLD = "truedag: recording stopped, the program runs on: "
NAMESPACES = ("--user", "--map-root-user", "--mount")

# Several threads, each with operators of its own that need new names all the time; what comes out is printed.
PROGRAM = """
import resource, sys, threading, torch
from pathlib import Path
from truedag.tracer.record.recording import record
path, max_bytes, room = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
totals = [0.0] * 4
here, ready = threading.Barrier(5), threading.Barrier(5)
def work(thread):
    total = torch.zeros(5)  # takes the thread's arena of malloc, which maps 64 MiB more for a moment
    here.wait()
    ready.wait()
    for i in range(30_000):
        total += torch.full((i % 3_000 + 1, thread + 1), 0.5).view(-1)[:1]
    totals[thread] = total.tolist()
with record(path, max_bytes=max_bytes, synchronize=False, kernels=False) as recording:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads: thread.start()
    here.wait()
    if room:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    ready.wait()
    for thread in threads: thread.join()
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert totals == [[15000.0] * 5] * 4, totals
print(recording.switched_off)
folder = Path(sys.argv[4])
folder.joinpath("kept.trace").write_bytes(path.read_bytes())
with record(folder / "next.trace", max_bytes=max_bytes, synchronize=False, kernels=False):
    torch.ones(1)
"""


def run_program(folder: Path, *, max_bytes: int = 0, room: int = 0, mount: str = "") -> tuple[Trace, str]:
    """Run it; return its trace, and why the recorder ended, which it said once.

    Args:
        folder: it writes its trace into `disk` there, and a copy and one more trace beside that.
        max_bytes: the bound of its recordings.
        room: bytes of address space that it has left when its threads begin.
        mount: a command that makes `disk` a disk, which only this program sees.
    """
    path = folder / "disk" / "rank.trace"
    path.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-c", PROGRAM, str(path), str(max_bytes), str(room), str(folder)]
    if mount:
        command = ["unshare", *NAMESPACES, "sh", "-c", f'{mount} && exec "$@"', "sh", *command]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count(TOLD) == 1, ended.stderr
    assert ended.stderr.strip() == TOLD + ended.stdout.strip()
    assert build_rank_graph(read_trace(folder / "next.trace")).nodes.op == ["aten::ones"]
    return read_trace(folder / "kept.trace"), ended.stdout.strip()


def check_what_is_there(trace: Trace) -> None:
    """Check that it merges, and that each thread's operators are the first ones that it ran."""
    assert trace.closed
    graph = build_rank_graph(trace)
    assert len(graph.nodes.op) > 1000
    for thread in trace.threads:
        names = [trace.ops[op]["name"] for op in thread.events["op"].tolist()]
        made = thread.refs[thread.events["first_ref"][[name == "aten::full" for name in names]]]
        sizes = [trace.layouts[number].sizes[0] for number in made["layout"].tolist()]
        assert sizes == [i % 3_000 + 1 for i in range(len(sizes))]


@pytest.mark.parametrize("max_bytes", [400_000, 3 << 20])
def test_a_bounded_recording_ends_at_its_bound(max_bytes: int, tmp_path: Path) -> None:
    trace, why = run_program(tmp_path, max_bytes=max_bytes)
    assert "the size it is allowed" in why
    assert max_bytes / 2 < (tmp_path / "disk" / "rank.trace").stat().st_size <= max_bytes
    check_what_is_there(trace)


def test_a_bound_below_the_smallest_trace_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    def begin(max_bytes: int) -> None:
        with record(tmp_path / "rank.trace", max_bytes=max_bytes, synchronize=False):
            pass

    for max_bytes in (1, 4096):
        with pytest.raises(RecordError, match="the size it is allowed"):
            begin(max_bytes)
    assert list(tmp_path.iterdir()) == []
    with record(tmp_path / "rank.trace", synchronize=False):
        torch.ones(1)
    assert build_rank_graph(read_trace(tmp_path / "rank.trace")).nodes.op == ["aten::ones"]


def test_a_full_address_space_ends_the_recording_and_not_the_program(tmp_path: Path) -> None:
    trace, why = run_program(tmp_path, room=12 << 20)
    assert "cannot map the trace" in why
    check_what_is_there(trace)


def test_a_disk_that_fills_ends_the_recording_and_not_the_program(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=12m none '{disk}'"
    unshare = shutil.which("unshare")
    if (
        unshare is None
        or subprocess.run([unshare, *NAMESPACES, "sh", "-c", mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("no disk can be mounted here")
    trace, why = run_program(tmp_path, mount=mount)
    assert "No space left on device" in why
    check_what_is_there(trace)


def test_a_signal_that_comes_all_the_time_does_not_end_the_recording(tmp_path: Path) -> None:
    path = tmp_path / "rank.trace"
    text = """
import signal, sys, torch
from pathlib import Path
from truedag.tracer.record.recording import record
beats = 0
def beat(*_):
    global beats
    beats += 1
signal.signal(signal.SIGALRM, beat)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
with record(Path(sys.argv[1]), synchronize=False, kernels=False) as recording:
    total = torch.zeros(1)
    for i in range(400_000): total.add_(1)
assert total.item() == 400_000
print(beats > 50, recording.num_events, recording.switched_off)
"""
    ended = subprocess.run(
        [sys.executable, "-c", text, str(path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.stdout.split() == ["True", "400001"], ended.stderr
    assert len(read_trace(path).threads[0].events) == 400_001
