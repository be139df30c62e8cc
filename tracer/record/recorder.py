"""What a recorder is to the rest of `record`."""

from __future__ import annotations

from typing import Protocol

import torch


class Recorder(Protocol):
    """What writes the records: the functions of the native recorder (`native/recorder.cpp`), or a `PythonRecorder`."""

    def start(self, path: str, max_bytes: int = 0, /) -> None:
        """Record this process into a new file, until that has `max_bytes`; 0: no bound."""

    def stop(self) -> tuple[int, str]:
        """Stop; return the number of events and why the recorder switched itself off, or ''."""

    def write(self, kind: int, id: int, payload: bytes, /) -> None:  # noqa: A002
        """Add an entry to the tables."""

    def set_label(self, label: int, /) -> int:
        """Set this thread's label and return the one before."""

    def set_context(self, context: int, /) -> None:
        """Set this thread's context."""

    def where(self, tensor: torch.Tensor, /) -> tuple[int, int, int]:
        """Return the tensor's storage, layout and offset in bytes."""
