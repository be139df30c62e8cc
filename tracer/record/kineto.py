"""Record what runs on this process's GPUs, by a Kineto session of CUDA activities beside the recorder's own file.

Theory of operation: Kineto's session belongs to the thread that begins it, and the activities that CUPTI reports to the
process; with CUDA activities alone PyTorch adds no callback to the dispatcher. So a thread that does nothing else
begins and ends it, wherever in the program recording starts and stops. It begins when CUDA does: before that, a process
may still fork children that use CUDA, which CUPTI in the parent would forbid. There is one session in a process. The
program's own profiler comes first: ours is not begun beside it, and ends with what it has when the program begins one.
The functions below the `profile` class are called, since the class would tell the program's `record_function` and
optimizers that a profiler runs, and they would run other operators then. Sources: torch/csrc/autograd/
profiler_kineto.cpp (enableProfiler), torch/autograd/profiler.py; pytorch/kineto, libkineto/src/
SyncActivityProfilerHandler.cpp.
"""

from __future__ import annotations

import gzip
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import ProfilerActivity, ProfilerConfig, ProfilerState, _ExperimentalConfig
from torch.autograd import profiler

_PATIENCE_S = 60.0  # how long the program waits for Kineto to begin or end

_running: KernelTrace | None = None
_is_queued = False  # whether CUDA's initialisation will call `_begin_with_cuda`


class KernelTrace:
    """One recording's kernels. Nothing happens without CUDA, and nothing that fails here reaches the program."""

    def __init__(self, activities: frozenset[ProfilerActivity] = frozenset({ProfilerActivity.CUDA})) -> None:
        """Prepare.

        Args:
            activities: what Kineto is to record.
        """
        self._activities = activities
        self._path = Path()
        self._pid = -1
        self._thread: threading.Thread | None = None
        self._begun = threading.Event()
        self._ending = threading.Event()
        self._device: int | None = None
        self._restore: Callable[[], None] | None = None

    def start(self, path: Path) -> None:
        """Record into a new file at the end of it, from now on or from when the program begins to use CUDA.

        Args:
            path: the file, gzipped JSON; an older one is removed.
        """
        global _running, _is_queued
        with _telling():
            path.unlink(missing_ok=True)
            self._path, self._pid = path, os.getpid()
            if ProfilerActivity.CUDA not in self._activities or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                _running = self
                self._begin()
            elif torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
                _running = self
                if not _is_queued:
                    _is_queued = True
                    torch.cuda._lazy_call(_begin_with_cuda)  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """End, and write the file; the GPU's work is waited for. Nothing happens if it never began."""
        global _running
        if _running is self:
            _running = None
        with _telling():
            if self._restore is not None:
                self._restore()
                self._restore = None
            thread, self._thread = self._thread, None
            if thread is None or self._pid != os.getpid():
                return
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                self._device = torch.cuda.current_device()
            self._ending.set()
            thread.join(_PATIENCE_S)
            if thread.is_alive():
                raise TimeoutError(f"Kineto has not ended after {_PATIENCE_S:.0f} s")

    def _begin(self) -> None:
        if profiler._is_profiler_enabled or torch._C._autograd._profiler_enabled():
            raise RuntimeError("the program runs a profiler of its own")
        # Kineto's first initialisation wants the thread that loaded PyTorch, which is this one as a rule.
        torch._C._autograd._prepare_profiler(_config(), set(self._activities))
        self._restore = _hear_of_profilers(self._make_way)
        self._thread = threading.Thread(target=self._run, name="truedag-kineto", daemon=True)
        self._thread.start()
        if not self._begun.wait(_PATIENCE_S):
            raise TimeoutError(f"Kineto has not begun after {_PATIENCE_S:.0f} s")

    def _make_way(self) -> None:
        _tell("kernels are recorded up to here: the program begins a profiler of its own")
        self.stop()

    def _run(self) -> None:
        with _telling():
            try:
                torch._C._autograd._enable_profiler(_config(), set(self._activities))
            finally:
                self._begun.set()
            self._ending.wait()
            if self._device is not None:
                torch.cuda.set_device(self._device)  # or Kineto would wait for, and so occupy, the first one
                torch.cuda.synchronize()
            _save(torch._C._autograd._disable_profiler(), self._path)


def _config() -> ProfilerConfig:
    """No shapes, memory, stacks, flops or modules: they are the dispatcher's; but what waits for what."""
    waits = _ExperimentalConfig(enable_cuda_sync_events=True)
    return ProfilerConfig(ProfilerState.KINETO, False, False, False, False, False, waits)


def _save(result: Any, path: Path) -> None:
    """Write what Kineto has, whole or not at all."""
    plain, packed = path.with_name(f".{path.name}.json"), path.with_name(f".{path.name}.part")
    try:
        result.save(str(plain))
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=3) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        packed.rename(path)
    finally:
        plain.unlink(missing_ok=True)
        packed.unlink(missing_ok=True)


def _begin_with_cuda() -> None:
    """Begin the recording that has waited for CUDA, inside its initialisation."""
    waiting = _running
    if waiting is not None and waiting._thread is None and waiting._pid == os.getpid():
        with _telling():
            waiting._begin()


def _hear_of_profilers(hear: Callable[[], None]) -> Callable[[], None]:
    """Call `hear` before the program prepares a profiler; return what undoes that."""
    kind: Any = profiler.profile
    prepare = kind._prepare_trace

    def hear_and_prepare(one: Any) -> None:
        hear()
        prepare(one)

    def restore() -> None:
        if kind._prepare_trace is hear_and_prepare:
            kind._prepare_trace = prepare

    kind._prepare_trace = hear_and_prepare
    return restore


def _tell(what: str) -> None:
    sys.stderr.write(f"truedag: {what}\n")


@contextmanager
def _telling() -> Iterator[None]:
    """Keep failures away from the program, and say what is missing."""
    try:
        yield
    except Exception as error:  # whatever it is, the program is not at fault
        _tell(f"kernels are not recorded, the program runs on: {type(error).__name__}: {error}")
