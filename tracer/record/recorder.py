"""What a recorder is to the rest of `record`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Recorder(Protocol):
    """What writes the records: the functions of the native recorder (`native/recorder.cpp`), or a `PythonRecorder`."""

    def start(self, path: str, max_bytes: int = 0, /) -> None:
        """Record this process into a new file of at most so many bytes (0: no limit)."""

    def stop(self) -> tuple[int, str]:
        """Stop; return the number of events and why the recorder switched itself off, or ''."""

    def write(self, kind: int, id: int, payload: bytes, /) -> None:  # noqa: A002
        """Add an entry to the tables."""

    def label_forward(self, forward: Callable[..., Any], label: int, /) -> Callable[..., Any]:
        """Return what calls `forward` with this thread's label set to `label`."""

    def set_context(self, context: int, /) -> None:
        """Set this thread's context."""

    def watch_waits(self, work: type, /) -> None:
        """Record when the program waits for communications: `torch.distributed.Work` is given."""

    def unwatch_waits(self) -> None:
        """Leave `Work` as it was."""

    def where(self, tensor: torch.Tensor, /) -> tuple[int, int, int]:
        """Return the tensor's storage, layout and offset in bytes."""
