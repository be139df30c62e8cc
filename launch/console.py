"""Where words go: progress to stderr, results to stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.status import Status


class Progress:
    """Tells on stderr what goes on: a spinner on a terminal, a line for every change elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._started = time.monotonic()
        self._state: str | None = None
        self._status: Status | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(f"[{time.monotonic() - self._started:6.1f} s] {text}")

    def show(self, state: str) -> None:
        """What is going on from now on; the same state shown twice is shown once."""
        if state == self._state:
            return
        self._state = state
        if not self._console.is_terminal:
            self.say(state)
        elif self._status is None:
            self._status = self._console.status(state)
            self._status.start()
        else:
            self._status.update(state)

    def close(self) -> None:
        """Take the spinner away."""
        if self._status is not None:
            self._status.stop()
            self._status = None
        self._state = None


def shorten(path: Path) -> Path:
    """A path as a person would type it here: relative where it lies inside the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def print_result(text: str) -> None:
    """A result for a person, on stdout."""
    sys.stdout.write(f"{text}\n")


def print_report(dag: Path) -> None:
    """The report of a dataset for a person, on stdout."""
    from truedag.tracer.analysis.report import make_report

    Console(highlight=False, width=None if sys.stdout.isatty() else 100).print(make_report(dag).render())


def print_audited(audit: Mapping[str, Any]) -> None:
    """What `truedag.launch.run_audit.audit_run` found, in a line."""
    print_result(f"Audit: {audit['verdict']} {shorten(Path(audit['file']))} has it all.")


def print_json(result: Mapping[str, object]) -> None:
    """A result for a program, on stdout; what JSON does not know is written as its text."""
    sys.stdout.write(json.dumps(result, indent=2, default=str) + "\n")


def print_error(message: str) -> None:
    """What went wrong, on stderr."""
    sys.stderr.write(f"truedag: {message}\n")
