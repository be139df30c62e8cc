"""When a run goes wrong: one message, exit code 1, no process left, and what was recorded is kept."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from command_line import (
    is_running,
    start_truedag,
    truedag,
    wait_for_states,
    wait_until_gone,
    write_small_deployment,
)

from truedag.tracer.errors import TraceError
from truedag.tracer.record.trace import read_trace

# One step of so many microbatches that there is time to interfere with it.
LONG = ("workload.steps=1", "trace.step=0", "workload.global_batch_size=100000")


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    return write_small_deployment(tmp_path)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a run that must fail; return what it said on stderr."""
    try:
        stdout, stderr = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 1, stderr
    assert stdout == ""
    return stderr


@pytest.mark.parametrize("recorder", ["native", "python"])
def test_a_killed_rank_is_named_and_what_the_ranks_recorded_is_kept(deployment: Path, recorder: str) -> None:
    out = deployment.parent / "out"
    process = start_truedag("run", str(deployment), *LONG, "--out", "out", "--recorder", recorder, cwd=out.parent)
    states = wait_for_states(out, process, lambda state: state.phase == "recorded step")
    wait_for_traces(out, process)
    wait_for_work(state.pid for state in states)  # nobody sees from outside when the Python recorder has begun
    os.kill(states[1].pid, signal.SIGKILL)
    stderr = finish(process)
    assert "rank 1 (tp=0 dp=0 pp=1 etp=0 ep=0 edp=0) was killed by SIGKILL in phase 'recorded step'" in stderr
    assert "ChildFailedError" not in stderr
    assert stderr.rstrip().splitlines()[-1] == "next: truedag merge out/traces --out out/dag"
    # The native recorder's file is whole at any moment; the Python recorder's is written when the rank is told to end.
    kept = (0, 1) if recorder == "native" else (0,)
    assert all((out / "traces" / f"rank-{rank:05d}.trace").stat().st_size > 0 for rank in kept)
    assert f"What {len(kept)} of 2 ranks had recorded is kept in out/traces" in stderr
    assert wait_until_gone([state.pid for state in states], 10) == []


def wait_for_traces(out: Path, process: subprocess.Popen[str]) -> None:
    wait_for_states(out, process, lambda state: (out / "traces" / f"rank-{state.rank:05d}.trace").exists())


def wait_for_work(pids: Iterable[int]) -> None:
    """Wait until each of these processes has had another half second of a processor."""
    ticks = os.sysconf("SC_CLK_TCK") // 2

    def used(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    wanted = {pid: used(pid) + ticks for pid in pids}
    while any(used(pid) < least for pid, least in wanted.items()):
        time.sleep(0.05)


def holds_records(path: Path) -> bool:
    try:
        return any(len(thread.events) for thread in read_trace(path).threads)
    except TraceError:
        return False


def test_what_the_ranks_of_a_failed_run_recorded_can_be_merged(deployment: Path) -> None:
    out = deployment.parent / "out"
    process = start_truedag("run", str(deployment), *LONG, "--out", "out", cwd=out.parent)
    states = wait_for_states(out, process, lambda state: state.phase == "recorded step")
    wait_for_states(out, process, lambda state: holds_records(out / "traces" / f"rank-{state.rank:05d}.trace"))
    os.kill(states[0].pid, signal.SIGKILL)
    finish(process)
    merged = truedag("merge", "out/traces", "--out", "out/dag", "--json", cwd=out.parent)
    assert merged.returncode == 0, merged.stderr
    meta = json.loads((out / "dag" / "meta.json").read_text())
    assert meta["deployment"] == "small"
    assert json.loads(merged.stdout)["missing_ranks"] == []
    again = truedag("merge", "out/traces", "--out", "out/dag", cwd=out.parent)
    assert again.returncode == 1
    assert "out/dag is there already" in again.stderr


def test_an_error_of_a_rank_is_shown_with_its_traceback_and_place(deployment: Path) -> None:
    out = deployment.parent / "out"
    process = start_truedag("run", str(deployment), *LONG, "--out", "out", "--recorder", "python", cwd=out.parent)
    while not (out / "run.json").exists():
        assert process.poll() is None
    # The launcher has read the text and found it long enough; the ranks take seconds to get there.
    (out.parent / "text.txt").write_text("short")
    stderr = finish(process)
    assert "in phase 'building': DataError: " in stderr
    assert "Traceback (most recent call last):" in stderr
    assert "has 5 bytes" in stderr
    assert " pp=" in stderr
    assert "Nothing had been recorded." in stderr


def test_a_run_that_hangs_is_stopped_in_time(deployment: Path) -> None:
    out = deployment.parent / "out"
    limit = "backend.run_timeout_s=20"
    process = start_truedag("run", str(deployment), *LONG, limit, "--out", "out", "--recorder", "off", cwd=out.parent)
    states = wait_for_states(out, process, lambda state: state.pid > 0)
    os.kill(states[0].pid, signal.SIGSTOP)
    stderr = finish(process)
    assert "the ranks had not ended after 20 s and have been stopped" in stderr
    assert "backend.run_timeout_s" in stderr
    assert wait_until_gone([state.pid for state in states], 10) == []


def test_ranks_end_when_their_launcher_is_killed(deployment: Path) -> None:
    out = deployment.parent / "out"
    process = start_truedag("run", str(deployment), *LONG, "--out", "out", "--recorder", "off", cwd=out.parent)
    states = wait_for_states(out, process, lambda state: state.phase not in ("starting", "building"))
    process.kill()
    process.communicate(timeout=30)
    assert wait_until_gone([state.pid for state in states], 15) == []


def test_a_run_that_is_going_on_is_not_replaced_and_ends_with_its_launcher(deployment: Path) -> None:
    out = deployment.parent / "out"
    process = start_truedag("run", str(deployment), *LONG, "--out", "out", "--recorder", "off", cwd=out.parent)
    states = wait_for_states(out, process, lambda state: state.phase not in ("starting", "building"))
    refused = truedag("run", str(deployment), "--out", "out", "--force", cwd=out.parent)
    assert refused.returncode == 1
    assert f"a run is going on in out, started by pid {process.pid} on " in refused.stderr
    assert process.poll() is None
    assert all(is_running(state.pid) for state in states)
    process.terminate()
    stderr = finish(process)
    assert "interrupted; the ranks have been stopped" in stderr
    assert not any(is_running(state.pid) for state in states)


def test_a_taken_port_is_said_in_a_line(deployment: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        endpoint = f"localhost:{taken.getsockname()[1]}"
        place = ("--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", endpoint)
        result = truedag("run", str(deployment), *place, "--recorder", "off", cwd=deployment.parent)
    assert result.returncode == 1
    assert f"the port of --rdzv-endpoint {endpoint} is taken on this node" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("option", [[], ["--force"]])
def test_a_folder_that_is_no_run_is_never_touched(deployment: Path, option: list[str]) -> None:
    precious = deployment.parent / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("three years of work")
    result = truedag("run", str(deployment), "--out", "precious", *option, cwd=deployment.parent)
    assert result.returncode == 1
    assert result.stderr.startswith("truedag: precious is ")
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]
    assert (precious / "thesis.txt").read_text() == "three years of work"


def test_an_earlier_run_stays_unless_force_says_otherwise(deployment: Path) -> None:
    out = deployment.parent / "out"
    out.mkdir()
    (out / "run.json").write_text('{"truedag_run": 1}')
    (out / "old.txt").write_text("from the run before")
    refused = truedag("run", str(deployment), "--out", "out", cwd=out.parent)
    assert refused.returncode == 1
    assert "--force" in refused.stderr
    assert (out / "old.txt").exists()
    invalid = truedag("run", str(deployment), "model.num_layers=x", "--out", "out", "--force", cwd=out.parent)
    assert invalid.returncode == 1
    assert (out / "old.txt").exists()
    replaced = truedag("run", str(deployment), "--out", "out", "--force", "--recorder", "off", cwd=out.parent)
    assert replaced.returncode == 0, replaced.stderr
    assert not (out / "old.txt").exists()
