"""Starts this node's ranks under torchrun, watches them, and leaves no process behind."""

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

from truedag.launch.nodes import Nodes
from truedag.launch.rank_state import RankState, find_silent, read_states
from truedag.launch.run_folder import RunFolder

_POLL_S = 0.2
_LOOKS_PER_S = 500
_GRACE_S = 5.0
_PARTING_S = 9.0
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_FAILURE = re.compile(r"^\s*rank\s*:\s*(\d+) .*\n\s*exitcode\s*:\s*(-?\d+)", re.MULTILINE)


class TimeUpError(Exception):
    """The ranks had not ended in time; they have been stopped."""


class SilentError(Exception):
    """Ranks of this node do not run any more, though their processes are there; all have been stopped."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(ranks)
        self.ranks = ranks


class Torchrun:
    """A torchrun with one rank per process; leaving the block ends whatever still runs on this node."""

    def __init__(self, folder: RunFolder, nodes: Nodes, *, threads: int) -> None:
        self._folder = folder
        self._node = nodes.node
        self._poll_s = max(_POLL_S, nodes.num_nodes * nodes.ranks_per_node / _LOOKS_PER_S)
        command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=0", *nodes.torchrun_arguments()]
        command += ["-m", "truedag.launch.worker", str(folder.root), str(nodes.node), str(os.getpid())]
        with folder.torchrun_log(nodes.node).open("wb") as log:
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

    def wait(self, timeout_s: float, silence_s: float, on_change: Callable[[Mapping[int, RankState]], None]) -> int:
        """Wait for this node's ranks, telling `on_change` their states again and again; return torchrun's exit code.

        A negative one is the signal that killed torchrun, which was not ours.

        Once a rank has failed, here or on another node, the others have some seconds to say how far they have come and
        to end, before they are stopped.

        Raises:
            TimeUpError: they had not ended after `timeout_s`.
            SilentError: some had not shown for `silence_s` that they run, and no rank had said why.
        """
        deadline = time.monotonic() + timeout_s
        failed = False
        while self._process.poll() is None:
            states = self._states()
            on_change(states)
            if not failed and (self._is_told_of_failure() or any(state.error is not None for state in states.values())):
                failed = True
                deadline = min(deadline, time.monotonic() + _PARTING_S)
            silent = [] if failed else find_silent(self._folder.ranks, states, silence_s)
            if silent:
                self._stop()
                raise SilentError(silent)
            if time.monotonic() > deadline:
                self._stop()
                if not failed:
                    raise TimeUpError
                return 1
            time.sleep(self._poll_s)
        on_change(self._states())
        return self._process.wait()

    def _states(self) -> dict[int, RankState]:
        """Those of this node's ranks; in a folder that the nodes share there are others."""
        return {rank: state for rank, state in read_states(self._folder.ranks).items() if state.node == self._node}

    def _is_told_of_failure(self) -> bool:
        return self._folder.cause.exists() or self._folder.lost(self._node).exists()

    def _stop(self) -> None:
        """End torchrun and every rank: kindly, and after a few seconds with SIGKILL."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S)
        if self._process.poll() is None:
            # torchrun gives every rank a session of its own, so killing its group does not reach them.
            for state in self._states().values():
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


def is_port_taken(log: Path) -> bool:
    """Whether torchrun's log says that another process listens at the port where the nodes were to meet."""
    return _PORT_TAKEN.search(log.read_text(errors="replace")) is not None
