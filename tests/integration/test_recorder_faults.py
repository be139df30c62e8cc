"""Whatever kills a rank, and whenever: what it had recorded by then is there, whole, and nothing else is."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.integration.faults.killed_threads import COUNTS, NUM_THREADS

from truedag.tracer.errors import EmptyTraceError
from truedag.tracer.merge.rank_graph import build_rank_graph
from truedag.tracer.record.trace import ThreadTrace, Trace, read_trace

PROGRAM = Path(__file__).parent / "faults" / "killed_threads.py"


@contextmanager
def forks() -> Iterator[subprocess.Popen[str]]:
    """The program, loaded once; each folder that it is told of makes it fork."""
    with subprocess.Popen(
        [sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        yield program
        assert program.stdin is not None
        program.stdin.close()


def run_and_kill(program: subprocess.Popen[str], folders: list[Path], num_ops: int, seconds: list[float]) -> None:
    """Let one process run in each folder, and kill each after its time from when it began to record.

    Args:
        program: what forks them.
        folders: where they leave their traces.
        num_ops: how many operators each thread runs in each recording.
        seconds: when to kill each.
    """
    assert program.stdin is not None
    assert program.stdout is not None
    children = []
    for folder in folders:
        folder.mkdir()
        program.stdin.write(f"{num_ops} {folder}\n")
        program.stdin.flush()
        children.append(int(program.stdout.readline()))
    waiting = dict(zip(children, zip(folders, seconds, strict=True), strict=True))
    kill_at: dict[int, float] = {}
    while waiting:
        for child, (folder, delay) in list(waiting.items()):
            if child not in kill_at and (folder / "counts").exists():
                kill_at[child] = time.monotonic() + delay
            if time.monotonic() >= kill_at.get(child, float("inf")):
                os.kill(child, signal.SIGKILL)
                del waiting[child]
    for child in children:
        while is_alive(child):
            time.sleep(0.001)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def check_thread(trace: Trace, thread: ThreadTrace) -> tuple[int, int]:
    """Check that a thread's records are what it did, in order and whole; return which thread, and how many."""
    events = thread.events
    count = len(events)
    assert {trace.ops[op]["name"] for op in set(events["op"].tolist())} == {"aten::full"}
    assert not events["num_inputs"].any()
    assert (events["num_outputs"] == 1).all()
    assert (events["start_ns"] <= events["end_ns"]).all()
    assert (events["start_ns"][1:] >= events["end_ns"][:-1]).all()
    refs = thread.refs[events["first_ref"]]
    sizes = [trace.layouts[number].sizes for number in refs["layout"].tolist()]
    which = sizes[0][1] - 1
    assert sizes == [(i + 1, which + 1) for i in range(count)]
    assert trace.storage_records["impl"][refs["storage"] - 1].all()
    return which, count


def check_folder(folder: Path, num_ops: int) -> tuple[int, int]:
    """Check all traces of a killed process; return how many events they hold, and how many files are not closed."""
    *counts, num_recordings = COUNTS.unpack((folder / "counts").read_bytes())
    num_events = num_open = 0
    for number in range(num_recordings):
        path = folder / f"{number}.trace"
        is_last = number == num_recordings - 1
        if is_last and not path.exists():
            assert counts == [0] * NUM_THREADS
            continue
        try:
            trace = read_trace(path)
        except EmptyTraceError:
            assert is_last
            assert counts == [0] * NUM_THREADS
            continue
        found = dict(check_thread(trace, thread) for thread in trace.threads if len(thread.events))
        num_events += sum(found.values())
        num_open += not trace.closed
        if not is_last:
            assert trace.closed
        if trace.closed:
            assert trace.truncated == ""
            assert found == dict.fromkeys(range(NUM_THREADS), num_ops)
        for thread in range(NUM_THREADS):
            done = counts[thread] if is_last else num_ops
            assert done <= found.get(thread, 0) <= done + 1
        graph = build_rank_graph(trace)
        assert len(graph.nodes.op) == sum(found.values())
    return num_events, num_open


def kill_many(tmp_path: Path, *, rounds: int, processes: int, seed: int) -> None:
    chance = random.Random(seed)
    num_events = num_open = 0
    with forks() as program:
        for round_ in range(rounds):
            folders = [tmp_path / f"{round_}-{i}" for i in range(processes)]
            # Some as the first recording begins, others anywhere in it or in a later one; where those are short, mostly
            # as one begins or ends.
            seconds = [chance.choice((0.01, 0.1, 0.4)) * chance.random() for _ in folders]
            num_ops = chance.choice((20, 500, 4000))
            run_and_kill(program, folders, num_ops, seconds)
            for folder in folders:
                events, is_open = check_folder(folder, num_ops)
                num_events += events
                num_open += is_open
    print(f"{num_events} events, {num_open} files not closed, {rounds * processes} kills")
    assert num_events > 1000
    assert num_open > 0


def test_a_killed_process_loses_no_operator_and_tells_of_none_that_it_did_not_run(tmp_path: Path) -> None:
    kill_many(tmp_path, rounds=5, processes=2, seed=1)


@pytest.mark.slow
def test_fifty_killed_processes_lose_nothing(tmp_path: Path) -> None:
    kill_many(tmp_path, rounds=25, processes=2, seed=2)
