"""Communications that hang end in time, with what hangs and who is missing, while nothing is recorded."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from command_line import is_running, start_truedag, wait_for_states, write_small_deployment

from truedag.launch.rank_state import read_states

FAULTS = Path(__file__).parent / "faults"
OPTIONS = ("--out", "out", "--recorder", "off", "backend.collective_timeout_s=3")


def run_with_fault(folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> str:
    """Run the small deployment with a fault; return what was said on stderr."""
    monkeypatch.setenv("PYTHONPATH", str(FAULTS), prepend=os.pathsep)
    monkeypatch.setenv("FAULT", fault)
    process = start_truedag("run", str(write_small_deployment(folder)), *OPTIONS, cwd=folder)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 1, stderr
    assert stdout == ""
    states = read_states(folder / "out" / "ranks")
    assert not any(is_running(state.pid) for state in states.values())
    assert stderr.rstrip().splitlines()[-1].startswith("next: ")
    return stderr


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("sleep", ["the message from rank 0 to rank 1 on group pp is not taken", "rank 1: warm-up step, at", "_sleep"]),
        (
            "mismatch",
            ["of group world (ranks 0-1) is not the same one on its ranks: all_reduce on rank 0, barrier on rank 1"],
        ),
        (
            "other groups",
            [
                "Ranks wait for each other",
                "of group world (ranks 0-1) hangs: rank 0 is in it, rank 1 is missing",
                "of group pp (ranks 0-1) hangs: rank 1 is in it, rank 0 is missing",
            ],
        ),
        (
            "begun earlier",
            [
                "all_reduce number",
                "of group world (ranks 0-1) hangs: rank 0 is in it, rank 1 is missing",
                "_begun_earlier",
            ],
        ),
        ("receive", ["the message from rank 0 to rank 1 on group world has not come", "rank 0: warm-up step, at"]),
    ],
)
def test_what_hangs_and_who_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, expected: list[str]
) -> None:
    said = run_with_fault(tmp_path, monkeypatch, fault)
    assert "Timed out waiting 3000ms" in said
    for words in expected:
        assert words in said


def test_an_error_of_one_rank_ends_the_others_that_would_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run_with_fault(tmp_path, monkeypatch, "raise")
    assert "rank 1 (tp=0 dp=0 pp=1 etp=0 ep=0 edp=0) failed in phase 'warm-up step': ArithmeticError: one and" in said
    assert "hangs" not in said


def test_a_stopped_rank_is_missed_by_the_one_that_waits_for_it(tmp_path: Path) -> None:
    deployment = write_small_deployment(tmp_path)
    long = ("workload.steps=1", "trace.step=0", "workload.global_batch_size=100000")
    process = start_truedag("run", str(deployment), *OPTIONS, *long, cwd=tmp_path)
    states = wait_for_states(tmp_path / "out", process, lambda state: state.phase == "warm-up step")
    os.kill(states[1].pid, signal.SIGSTOP)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "rank 0 (tp=0 dp=0 pp=0 etp=0 ep=0 edp=0) failed in phase 'warm-up step'" in stderr
    assert "rank 1: does not answer" in stderr
    assert not any(is_running(state.pid) for state in states)
