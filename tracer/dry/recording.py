"""Record a program on tensors of device meta, which have no memory: its operators are those of a real run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from truedag.tracer.record.format import TableKind
from truedag.tracer.record.recording import Recording, load_engine, record


@contextmanager
def record_dry(path: Path, *, watch: Sequence[tuple[str, torch.nn.Module]] = ()) -> Iterator[Recording]:
    """Record all operators and communications of this process inside the block, as `recording.record` does.

    The trace says that the program ran on device meta, so operators there are the program's and not questions about
    shapes; the times in it are the recorder's, and none of the program that the run stands for.

    Args:
        path: the trace file; its folder exists, it does not.
        watch: models by name; their modules' forward passes label the operators.

    Raises:
        RecordError: the file cannot be made, or a recording is running already.
        BuildError: the native recorder cannot be compiled.
    """
    with record(path, watch=watch, kernels=False) as recording:
        load_engine("native").write(TableKind.META, 0, json.dumps({"device": "meta"}).encode())
        yield recording
