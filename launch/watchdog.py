"""Ends a rank that is told to stop, or whose launcher or torchrun has gone: no process stays behind.

Theory of operation: SIGTERM raises in the main thread, so that a recording is closed in good order. A main thread that
is deep inside a collective never gets to see it; so a thread of our own hears of the signal too, and ends the process a
little later. The same thread looks after the parent, which may have been killed without a word.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from types import FrameType
from typing import NoReturn

_INTERVAL_S = 0.5
_GRACE_S = 3.0
_EXIT_CODE = 128 + signal.SIGTERM


class StoppedError(SystemExit):
    """This process was told to end; not an error of its own."""


def start_watchdog(launcher: int) -> None:
    """Watch for SIGTERM, the parent process and the process `launcher`. Call it once, from the main thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, _stop)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, os.getppid(), launcher), name="watchdog", daemon=True).start()


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    raise StoppedError(_EXIT_CODE)


def _watch(reader: int, parent: int, launcher: int) -> None:
    while os.getppid() == parent and _is_alive(launcher):
        told, _, _ = select.select([reader], [], [], _INTERVAL_S)
        if told:
            time.sleep(_GRACE_S)
            break
    os._exit(_EXIT_CODE)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
