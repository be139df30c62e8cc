"""The recorders that the benchmarks measure side by side: truedag's, its peers, and observers that do nothing.

Each is a function of a folder to write into and the model that runs, which returns a context manager: what runs inside
is recorded. What it leaves on disk is kept where the folder's name is "keep".
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ExecutionTraceObserver, ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from truedag.tracer.record import format as layout
from truedag.tracer.record.recording import RecorderName, record


@dataclass(slots=True)
class Kept:
    """What a recorder left on disk."""

    path: Path | None = None
    entries: int = 0
    """Operators recorded, as far as it says."""
    used_bytes: int = 0
    """Of the file, what is not room for more."""


def used_bytes(path: Path) -> int:
    """Return the bytes of a trace without the room that its chunks still have."""
    data = np.fromfile(path, np.uint8)
    position = used = layout.FILE_HEADER_BYTES
    while position + layout.CHUNK.itemsize <= len(data):
        chunk = data[position : position + layout.CHUNK.itemsize].view(layout.CHUNK)[0]
        if chunk["magic"] != layout.CHUNK_MAGIC:
            position = (position // layout.SEGMENT_BYTES + 1) * layout.SEGMENT_BYTES
            continue
        used += layout.CHUNK.itemsize + int(chunk["used"])
        position += int(chunk["bytes"])
    return used


Recorder = Callable[[Path, Sequence[torch.nn.Module]], AbstractContextManager[Kept]]


@contextmanager
def nothing(_folder: Path, _models: Sequence[torch.nn.Module]) -> Iterator[Kept]:
    """Record nothing: the bare step."""
    yield Kept()


def observer(*, inputs: bool = False, outputs: bool = False) -> Recorder:
    """Return an observer that does nothing with what it is given."""

    @contextmanager
    def observe(_folder: Path, _models: Sequence[torch.nn.Module]) -> Iterator[Kept]:
        floor = load_floor_observer()
        floor.start(inputs, outputs, False)
        try:
            yield Kept()
        finally:
            floor.stop()

    return observe


def truedag(recorder: RecorderName, *, modules: bool = False) -> Recorder:
    """Return truedag's recorder of this name; with `modules`, it watches the models' modules."""

    @contextmanager
    def observe(folder: Path, models: Sequence[torch.nn.Module]) -> Iterator[Kept]:
        path = folder / "truedag.trace"
        kept = Kept(path)
        watch = [(f"model{i}", model) for i, model in enumerate(models)] if modules else []
        with record(path, recorder=recorder, watch=watch, synchronize=False) as recording:
            yield kept
        if recording.switched_off:
            raise SystemExit(f"truedag switched itself off: {recording.switched_off}")
        kept.entries = recording.num_events
        if folder.name == "keep":
            kept.used_bytes = used_bytes(path)

    return observe


def kineto(*, shapes: bool) -> Recorder:
    """Return PyTorch's profiler, of the CPU alone."""

    @contextmanager
    def observe(folder: Path, _models: Sequence[torch.nn.Module]) -> Iterator[Kept]:
        kept = Kept()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=shapes) as profiler:
            yield kept
        if folder.name == "keep":
            kept.path = folder / "kineto.json"
            profiler.export_chrome_trace(str(kept.path))
            kept.entries = kept.path.read_bytes().count(b'"cat": "cpu_op"')
            kept.used_bytes = kept.path.stat().st_size

    return observe


@contextmanager
def execution_trace(folder: Path, _models: Sequence[torch.nn.Module]) -> Iterator[Kept]:
    """PyTorch's recorder of dataflow."""
    path = folder / "execution_trace.json"
    kept = Kept(path)
    peer = ExecutionTraceObserver()
    peer.register_callback(str(path))
    peer.start()
    try:
        yield kept
    finally:
        peer.stop()
        peer.unregister_callback()
    if folder.name == "keep":
        kept.entries = path.read_bytes().count(b'"ctrl_deps"')
        kept.used_bytes = path.stat().st_size


class _ListMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The least that a recorder of dataflow in Python does: which operator, what in, what out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: list[tuple[Any, list[int], list[int], int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.monotonic_ns()
        result = func(*args, **(kwargs or {}))
        end = time.monotonic_ns()
        leaves = torch.utils._pytree.tree_leaves
        inputs = [id(leaf) for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [id(leaf) for leaf in leaves(result) if isinstance(leaf, torch.Tensor)]
        self.rows.append((func, inputs, outputs, start, end))
        return result


@contextmanager
def dispatch_mode(_folder: Path, _models: Sequence[torch.nn.Module]) -> Iterator[Kept]:
    """The least that a recorder of dataflow in Python does, into a list."""
    kept = Kept()
    with _ListMode() as mode:
        yield kept
    kept.entries = len(mode.rows)


BARE = "nothing"
NATIVE, SCOPED, PYTHON = "truedag native", "truedag native, module scopes", "truedag python"
FLOOR, ETO, MODE = "observer, inputs and outputs", "ExecutionTraceObserver", "TorchDispatchMode, a list"
KINETO, KINETO_SHAPES = "Kineto", "Kineto, shapes"
RECORDERS: Mapping[str, Recorder] = {
    BARE: nothing,
    "observer, empty": observer(),
    "observer, inputs": observer(inputs=True),
    FLOOR: observer(inputs=True, outputs=True),
    NATIVE: truedag("native"),
    SCOPED: truedag("native", modules=True),
    KINETO: kineto(shapes=False),
    KINETO_SHAPES: kineto(shapes=True),
    ETO: execution_trace,
    MODE: dispatch_mode,
    PYTHON: truedag("python"),
}
SLOW = {ETO, MODE, PYTHON}


@cache
def load_floor_observer() -> Any:
    """Compile floor_observer.cpp into the cache of truedag's own recorder, the first time."""
    from torch.utils import cpp_extension

    from truedag.tracer.record.native.library import recorder_path

    folder = recorder_path().parent / f"floor_observer-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    source = str(Path(__file__).with_name("floor_observer.cpp"))
    with _ninja_on_path():
        return cpp_extension.load("floor_observer", [source], ["-O3", "-DNDEBUG"], build_directory=str(folder))


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    try:
        yield
    finally:
        os.environ["PATH"] = path
