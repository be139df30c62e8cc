"""Starts the ranks under torchrun, watches them, and leaves no process behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from truedag.launch.rank_state import RankState, read_states
from truedag.launch.run_folder import RunFolder

_POLL_S = 0.2
_GRACE_S = 5.0
_FAILURE = re.compile(r"^\s*rank\s*:\s*(\d+) .*\n\s*exitcode\s*:\s*(-?\d+)", re.MULTILINE)


class TimeUpError(Exception):
    """The ranks had not ended in time; they have been stopped."""


class Torchrun:
    """A torchrun with one rank per process; leaving the block ends whatever still runs."""

    def __init__(self, folder: RunFolder, *, world_size: int, threads: int) -> None:
        self._folder = folder
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
        command += [f"--nproc-per-node={world_size}", "-m", "truedag.launch.worker", str(folder.root)]
        with folder.torchrun_log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def wait(self, timeout_s: float, on_change: Callable[[Mapping[int, RankState]], None]) -> int:
        """Wait for the ranks, telling `on_change` their states again and again; return torchrun's exit code.

        Once a rank has failed the others have a few seconds to end before they are stopped.

        Raises:
            TimeUpError: they had not ended after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        failed = False
        while self._process.poll() is None:
            states = read_states(self._folder.ranks)
            on_change(states)
            if not failed and any(state.error is not None for state in states.values()):
                failed = True
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            if time.monotonic() > deadline:
                self._stop()
                if not failed:
                    raise TimeUpError
                break
            time.sleep(_POLL_S)
        on_change(read_states(self._folder.ranks))
        return self._process.wait()

    def _stop(self) -> None:
        """End torchrun and every rank: kindly, and after a few seconds with SIGKILL."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S)
        if self._process.poll() is None:
            # torchrun gives every rank a session of its own, so killing its group does not reach them.
            for state in read_states(self._folder.ranks).values():
                if state.phase == "finished" or state.error is not None:
                    continue
                with suppress(ProcessLookupError):
                    os.kill(state.pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def read_exit_codes(log: Path) -> dict[int, int]:
    """What torchrun's log says of the ranks that failed, the first to fail first; -9 is a rank killed by signal 9."""
    failures = _FAILURE.findall(log.read_text(errors="replace"))
    return {int(rank): int(code) for rank, code in reversed(failures)}  # torchrun names the root cause last
