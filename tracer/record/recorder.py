"""What a recorder is to the rest of `record`."""

from __future__ import annotations

from collections.abc import Sequence
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

    def set_label(self, label: int, /) -> int:
        """Set this thread's label and return the one before."""

    def set_context(self, context: int, /) -> None:
        """Set this thread's context."""

    def watch_waits(self, work: type, /) -> None:
        """Record when the program waits for communications: `torch.distributed.Work` is given."""

    def unwatch_waits(self) -> None:
        """Leave `Work` as it was."""

    def open_region(
        self, name: str, overload: str, schema: str, inputs: Sequence[Any], written: tuple[int, ...], may_reuse: bool, /
    ) -> bool:
        """Begin what runs outside of the dispatcher on this thread; return whether `close_region` is to follow.

        Args:
            name: what is recorded as the operator.
            overload: which of several of that name.
            schema: of two lists, the tensors that are read and those that are written, to one list.
            inputs: what it is given; what is no tensor is left out.
            written: places of the inputs that it writes.
            may_reuse: whether it may make a result in the memory of an input that it only reads.
        """

    def close_region(self, results: Sequence[Any] | None, /) -> None:
        """End it; None: it has failed. Inputs, and views of them, are no results."""

    def where(self, tensor: torch.Tensor, /) -> tuple[int, int, int]:
        """Return the tensor's storage, layout and offset in bytes."""
