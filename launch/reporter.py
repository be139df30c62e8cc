"""Keeps a rank's state file, and tells the other ranks when this one fails or is told to end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from truedag.launch.board import Board
from truedag.launch.progress import is_communication_error, take_progress
from truedag.launch.rank_state import Phase, RankState
from truedag.launch.stall import RankReport, describe_stalls, list_ranks

_ANSWERS_S = 3.0
_CAUSE_S = 6.0
_PARTING_S = 0.5


class Reporter:
    """One rank's state and what becomes of it; any thread may use it."""

    def __init__(self, state: RankState, *, path: Path, cause: Path, lost: Path, world_size: int) -> None:
        self.state = state
        self.board: Board | None = None
        self._path = path
        self._cause = cause
        self._lost = lost
        self._world_size = world_size
        # Re-entrant: a signal handler may write while its own thread does.
        self._lock = threading.RLock()
        self._told = False

    def write(self) -> None:
        """Write the state file."""
        with self._lock:
            self.state.write(self._path)

    def enter(self, phase: Phase) -> None:
        """Say what the rank does from now on."""
        self._change(lambda: setattr(self.state, "phase", phase))

    def live(self) -> None:
        """Show that this process runs, as the time of the state file."""
        now = time.time()  # not the file server's clock: the launcher compares it with its own
        with suppress(OSError):
            os.utime(self._path, (now, now))

    def fail(self, error: BaseException) -> None:
        """Say what ended this rank, find out with the others what hung, and write it all down. Takes some seconds."""
        self._change(lambda: self.state.fail(error))
        if self.board is None:
            return
        first = self.board.raise_alarm()
        self.board.answer(self.state)
        if not first:
            self._keep_cause(self.board)
            return
        assert self.state.error is not None
        answers = self.board.gather(_ANSWERS_S + self._world_size / 500)
        if is_communication_error(error):
            reports = {
                rank: RankReport(phase=answer.phase, progress=answer.progress)
                for rank, answer in (answers | {self.state.rank: self.state}).items()
                if answer.progress is not None
            }
            stalls = describe_stalls(reports, self._world_size)
            stopped = [rank for rank, answer in sorted(answers.items()) if answer.stopped]
            if stopped:
                nodes = " and ".join(sorted({f"node {answers[rank].node}" for rank in stopped}))
                told = f"{list_ranks(stopped)} had been told to end; what was said on {nodes} says why."
                stalls = "\n".join(filter(None, [told, stalls]))
            said = self.state.error.model_copy(update={"stalls": stalls})
            self._change(lambda: setattr(self.state, "error", said))
        self.board.put_cause(self.state)
        self.state.write(self._cause)
        time.sleep(_PARTING_S)  # the store may end with this process; the other nodes shall read it before

    def stop(self, frame: FrameType | None) -> None:
        """Say that this rank was told to end, and where it was; what was said before stays.

        Args:
            frame: where the main thread is; None: look.
        """
        with self._lock:
            self.state.stopped = self.state.error is None
            if self.state.progress is None:
                self.state.progress = take_progress(frame)
            self.write()

    def tell_stopped(self) -> None:
        """Tell the others that this rank was told to end."""
        with self._lock:
            if self.board is None or self._told or self.state.error is not None:
                return
            self._told = True
        first = self.board.raise_alarm()
        self.board.answer(self.state)
        if first:
            self.board.put_cause(self.state)

    def answer(self) -> None:
        """Another rank has failed: tell it how far this one has come, and keep what it says."""
        assert self.board is not None
        with self._lock:
            if self.state.progress is None:
                self.state.progress = take_progress()
            self.write()
        self.board.answer(self.state)
        self._keep_cause(self.board)

    def lose_board(self) -> None:
        """The other ranks cannot be heard any more: keep that."""
        self._lost.touch()

    def _keep_cause(self, board: Board) -> None:
        cause = board.wait_for_cause(_CAUSE_S)
        if cause is not None:
            cause.write(self._cause)

    def _change(self, change: Callable[[], None]) -> None:
        with self._lock:
            change()
            self.write()
