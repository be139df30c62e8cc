"""Ends a rank that is told to stop, or whose launcher or torchrun has gone: no process stays behind.

Theory of operation: SIGTERM raises in the main thread, so that a recording is closed in good order. A main thread that
is deep inside a collective never gets to see it; so a thread of our own hears of the signal too, and ends the process a
little later. The same thread looks after the parent, which may have been killed without a word, and hears whether a
rank elsewhere has failed. Where a backend aborts the process after a time-out instead of raising, it looks for that as
well.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from types import FrameType
from typing import NoReturn

from truedag.launch.board import BoardLostError
from truedag.launch.progress import OverdueError, find_overdue
from truedag.launch.reporter import Reporter

_INTERVAL_S = 0.5
_LOOKS_PER_S = 500
_HANDLER_S = 0.3
_GRACE_S = 3.0
_EXIT_CODE = 128 + signal.SIGTERM


class StoppedError(SystemExit):
    """This process was told to end; not an error of its own."""


class Watchdog:
    """Watches for SIGTERM, the parent process, the launcher and the other ranks. Make it once, in the main thread."""

    def __init__(self, launcher: int, reporter: Reporter, world_size: int) -> None:
        self._launcher = launcher
        self._parent = os.getppid()
        self._reporter = reporter
        self._interval_s = max(_INTERVAL_S, world_size / _LOOKS_PER_S)  # all ranks look at one store
        self._overdue_s: float | None = None
        self._off = threading.Event()
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGTERM, self._stop)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def watch_communications(self, timeout_s: float) -> None:
        """End this rank when a communication takes longer: NCCL would abort without saying who is missing."""
        self._overdue_s = timeout_s

    def ignore_others(self) -> None:
        """The run is over: what becomes of the other ranks is no matter any more."""
        self._off.set()

    def _stop(self, _number: int, frame: FrameType | None) -> NoReturn:
        self._reporter.stop(frame)
        raise StoppedError(_EXIT_CODE)

    def _watch(self) -> None:
        while os.getppid() == self._parent and _is_alive(self._launcher):
            told, _, _ = select.select([self._reader], [], [], self._interval_s)
            if told:
                time.sleep(_HANDLER_S)  # the main thread knows best where it is
                self._reporter.stop(None)
                self._reporter.tell_stopped()
                time.sleep(_GRACE_S)
                break
            self._reporter.live()
            if not self._off.is_set():
                self._look_around()
        else:
            self._reporter.stop(None)
            self._reporter.tell_stopped()
        os._exit(_EXIT_CODE)

    def _look_around(self) -> None:
        board = self._reporter.board
        if board is None:
            return
        try:
            if board.is_alarmed():
                self._off.set()
                self._reporter.answer()
                return
        except BoardLostError:
            self._off.set()
            self._reporter.lose_board()
            return
        if self._overdue_s is not None and (overdue := find_overdue(self._overdue_s)):
            self._reporter.fail(OverdueError(f"{overdue} timed out: it had not ended after {self._overdue_s:g} s"))
            os._exit(1)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
