"""`truedag` as a child process, and a deployment of two ranks small enough for tests."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from truedag.launch.rank_state import RankState, read_states

TRUEDAG = (sys.executable, "-m", "truedag.launch.cli")
TIMEOUT_S = 150.0


def truedag(*arguments: str, cwd: Path, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end."""
    return subprocess.run(
        [*TRUEDAG, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def start_truedag(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start a command line."""
    return subprocess.Popen(
        [*TRUEDAG, *arguments], cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def write_small_deployment(folder: Path) -> Path:
    """Two pipeline stages of a tiny mixture of experts; runs in seconds."""
    (folder / "text.txt").write_text("A small text for small tests. " * 20)
    path = folder / "small.yaml"
    values = {
        "name": "small",
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_experts": 4,
            "expert_hidden_size": 32,
        },
        "strategy": "TP1-PP2-DP1",
        "workload": {"text": "text.txt", "global_batch_size": 4, "sequence_length": 16},
        "backend": {"collective_timeout_s": 30, "run_timeout_s": 120},
    }
    path.write_text(yaml.safe_dump(values))
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a run left, and what it said on stdout."""

    out: Path
    said: str


def run_small(folder: Path, *options: str) -> Ran:
    """Run the small deployment to its good end."""
    done = truedag("run", str(write_small_deployment(folder)), "--out", "out", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return Ran(out=folder / "out", said=done.stdout)


def free_port() -> int:
    """A port that nobody listens at, in the range that the Slurm script takes its ports from."""
    while True:
        port = random.randrange(20000, 40000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def wait_for_states(out: Path, process: subprocess.Popen[str], wanted: Callable[[RankState], bool]) -> list[RankState]:
    """Wait until both ranks of the small deployment are as wanted; return their states."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        states = read_states(out / "ranks")
        if len(states) == 2 and all(wanted(state) for state in states.values()):
            return [states[0], states[1]]
        assert process.poll() is None, f"ended early: {process.communicate()}"
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"not reached in time: {read_states(out / 'ranks')}")


def is_running(pid: int) -> bool:
    """Whether a process exists and is more than a zombie that nobody has waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    if Path("/proc/self/stat").exists():
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].strip()
        except OSError:
            return False
    else:
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout
    return bool(state.strip()) and not state.startswith("Z")


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    """Wait for processes to end; return those that have not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(is_running, pids)):
        time.sleep(0.1)
    return [pid for pid in pids if is_running(pid)]
