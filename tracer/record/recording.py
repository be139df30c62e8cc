"""Record what runs inside a block, on this rank, into one trace file.

Theory of operation: a `Recorder` writes events, tensors and communications (natively, or by a TorchDispatchMode); this
module adds what Python knows: module scopes by forward hooks, the contexts that `annotate` is told, names of tensors,
process groups and their ranks, the clock. A recorder that cannot go on switches itself off and the program runs on.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist

from truedag.tracer.annotate import REGISTRY, Context, NamedTensor
from truedag.tracer.errors import RecordError
from truedag.tracer.record.clock_measuring import ClockMeasuring
from truedag.tracer.record.compiled import CompiledGraphs
from truedag.tracer.record.counters import finish_lanes, write_lanes
from truedag.tracer.record.discovery import ModuleDiscovery
from truedag.tracer.record.format import TableKind
from truedag.tracer.record.interception import Interception, has_compiled
from truedag.tracer.record.kernels_file import kernels_path
from truedag.tracer.record.kineto import KernelTrace
from truedag.tracer.record.place import GroupNews, describe_process, find_place, name_clock, sample_clock
from truedag.tracer.record.recorder import Recorder
from truedag.tracer.record.scopes import ModuleScopes

if TYPE_CHECKING:
    from truedag.tracer.record.native.build import NativeRecorder

RecorderName = Literal["native", "python"]


@dataclass(slots=True)
class Recording:
    """What a block recorded; filled in when the block has ended."""

    path: Path
    num_events: int = 0
    switched_off: str = ""


@contextmanager
def record(
    path: Path,
    *,
    recorder: RecorderName = "native",
    watch: Sequence[tuple[str, torch.nn.Module]] = (),
    synchronize: bool = True,
    max_bytes: int = 0,
    kernels: bool = True,
    arguments: bool = False,
) -> Iterator[Recording]:
    """Record all operators and communications of this process inside the block into a new file.

    Every rank that shall be in the graph calls it, each with a path of its own. With `synchronize` and a process group
    initialised, all ranks meet in a barrier before the block, which is not recorded: messages between ranks are then
    counted from the same point everywhere. Begin where nothing is in flight: a collective that is, is reported as
    unmatched; a message that is may be taken for the next one of its size, since backends do not number messages.

    Args:
        path: the trace file; its folder exists, it does not.
        recorder: "native", or "python" (slow: the fallback and the oracle).
        watch: models by name; their modules' forward passes label the operators.
        synchronize: meet the other ranks in a barrier first. All of them must call it then; where only some record,
            the barrier would never end.
        max_bytes: the recorder switches itself off when the file has become as large as this; 0: no bound.
        kernels: record what runs on this process's GPUs, beside the trace (`kernels_file`); its end waits for them.
        arguments: keep beside the trace what every operator was given and gave (`arguments`), so that the graph can be
            executed again (`truedag.tracer.replay`). The Python recorder on the CPU can; it is for small programs.

    Raises:
        RecordError: the file cannot be made, a recording is running already, or this recorder keeps no arguments.
        BuildError: the native recorder cannot be compiled.
    """
    engine = load_engine(recorder, arguments=arguments)
    if synchronize and dist.is_available() and dist.is_initialized():
        dist.barrier()
    running = OpenRecording(
        path,
        engine,
        recorder,
        watch=watch,
        max_bytes=max_bytes,
        is_synchronized=synchronize,
        kernels=kernels,
    )
    try:
        yield running.recording
    finally:
        running.end()


class OpenRecording:
    """A recording that runs from here to `end`. Local: no other rank need record, or stop when this one does."""

    def __init__(
        self,
        path: Path,
        engine: Recorder,
        recorder: RecorderName,
        *,
        watch: Sequence[tuple[str, torch.nn.Module]] = (),
        max_bytes: int = 0,
        is_rank_told: bool = True,
        is_synchronized: bool = False,
        discovers: bool = False,
        kernels: bool = True,
    ) -> None:
        """Begin, as `record` does without synchronising.

        Args:
            path: the trace file; its folder exists, it does not.
            engine: what `load_engine` returned.
            recorder: its name.
            watch: models by name.
            max_bytes: 0: no bound.
            is_rank_told: whether the environment says truly which rank this is, as torchrun's does for the processes
                that it starts. Else the process is rank 0 of 1 until it has a process group.
            is_synchronized: whether all ranks have just met in a barrier.
            discovers: whether to find the models by oneself, where none is watched.
            kernels: whether to record what runs on this process's GPUs.

        Raises:
            RecordError: the file cannot be made, or a recording is running already.
        """
        path = Path(path)
        self.recording = Recording(path)
        self._engine = engine
        self._pid = os.getpid()
        self._is_rank_told = is_rank_told
        self._place: dict[str, Any] = {}
        self._groups = GroupNews()
        self._clocks = ClockMeasuring(name_clock(), self._write_clock)
        if REGISTRY.listener is not None:
            raise RecordError("a recording is running in this process already; end it before the next")
        self._interception = _start(engine, recorder, path, max_bytes)
        self._said = _Said(engine)
        self._scopes = ModuleDiscovery(engine) if discovers and not watch else ModuleScopes(engine, watch)
        self._compiled = CompiledGraphs(engine)
        self._kernels = KernelTrace()
        _open_recordings.add(self)
        with _shield(self.recording):
            engine.write(TableKind.META, 0, json.dumps(describe_process(recorder)).encode())
            self.note_place()
            write_lanes(engine, synchronized=is_synchronized)
            self._said.begin()
            self._scopes.attach()
            self._compiled.attach()
            if self._interception is not None:
                self._interception.attach()
            if dist.is_available():
                engine.watch_waits(dist.Work)
            if kernels:
                self._kernels.start(kernels_path(path))

    def stop_discovering(self) -> None:
        """Name no modules any more."""
        if isinstance(self._scopes, ModuleDiscovery):
            self._scopes.detach()

    def note_place(self) -> None:
        """Write down which rank this is and which ranks its groups have, as far as that is new."""
        with _shield(self.recording):
            place = find_place(is_rank_told=self._is_rank_told)
            if place and place != self._place:  # a group that is gone does not make it another rank
                self._place = place
                self._engine.write(TableKind.META, 0, json.dumps(place).encode())
            for told in self._groups.take_news():
                self._engine.write(TableKind.GROUP_RANKS, 0, json.dumps(told).encode())
            self._clocks.join(is_rank_told=self._is_rank_told)

    def forget(self) -> None:
        """In a forked child: leave the parent's recording alone, and take away what listens for it."""
        self._kernels.stop()
        self._clocks.forget()
        self._engine.unwatch_waits()
        if self._interception is not None:
            self._interception.detach()
        self._compiled.detach()
        self._scopes.detach()
        REGISTRY.listener = None

    def end(self) -> None:
        """Stop and close the file. Nothing happens in a child that was forked meanwhile: the recording is its parent's.

        Raises nothing: what goes wrong is told once on stderr, and in `recording.switched_off`.
        """
        if self._pid != os.getpid() or self not in _open_recordings:
            return
        _open_recordings.discard(self)
        self._kernels.stop()
        with _shield(self.recording):
            self._engine.unwatch_waits()
            if self._interception is not None:
                self._interception.detach()
            self._compiled.detach()
            self._scopes.detach()
            self._said.end()
            finish_lanes(self._engine)
            self.note_place()  # the process group may have been made, or have changed, meanwhile
            self._engine.write(TableKind.META, 1, json.dumps({"clock_end": sample_clock()}).encode())
        with _shield(self.recording):
            self._clocks.end()
            self.recording.num_events, why = self._engine.stop()
            self.recording.switched_off = self.recording.switched_off or why

    def _write_clock(self, told: dict[str, Any]) -> None:
        self._engine.write(TableKind.CLOCK, 0, json.dumps(told).encode())


_open_recordings: set[OpenRecording] = set()


def _forget_in_child() -> None:
    for running in _open_recordings:
        running.forget()
    _open_recordings.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def _start(engine: Recorder, recorder: RecorderName, path: Path, max_bytes: int) -> Interception | None:
    """Start it; return what the native recorder's interceptor must be told by, where it intercepts."""
    try:
        if recorder == "python":
            engine.start(str(path), max_bytes)
            return None
        native = cast("NativeRecorder", engine)
        may_intercept = not has_compiled()
        native.start(str(path), max_bytes, may_intercept)
    except RuntimeError as error:
        raise RecordError(f"cannot record into {path}: {error}") from error
    return Interception(native) if may_intercept else None


@contextmanager
def _shield(recording: Recording) -> Iterator[None]:
    """Keep the recorder's own failures away from the program: it is told once, and runs on."""
    try:
        yield
    except Exception as error:  # whatever it is, the program is not at fault
        if not recording.switched_off:
            recording.switched_off = f"{type(error).__name__}: {error}"
            sys.stderr.write(f"truedag: recording is incomplete, the program runs on: {recording.switched_off}\n")


def load_engine(recorder: RecorderName, *, arguments: bool = False) -> Recorder:
    """Return what records, with the operators' arguments or without.

    Raises:
        BuildError: the native recorder cannot be compiled.
        RecordError: it keeps no arguments, and was asked to.
    """
    if arguments and recorder != "python":
        raise RecordError("only the Python recorder keeps arguments: record with recorder='python'")
    if recorder == "native":
        from truedag.tracer.record.native.build import load_recorder

        return load_recorder()
    from truedag.tracer.record.dispatch_mode import PythonRecorder

    return PythonRecorder(arguments=arguments)


class _Said:
    """Passes on what the program says through `annotate`."""

    def __init__(self, engine: Recorder) -> None:
        self._engine = engine
        self._contexts: dict[Context, int] = {}
        self._lock = threading.Lock()

    def begin(self) -> None:
        REGISTRY.tensors[:] = [named for named in REGISTRY.tensors if named.tensor() is not None]
        for named in REGISTRY.tensors:
            self.on_tensor(named)
        REGISTRY.listener = self
        self.on_context(REGISTRY.context)

    def end(self) -> None:
        if REGISTRY.listener is not self:
            return
        REGISTRY.listener = None
        for named in REGISTRY.tensors:  # a parameter's memory may have been swapped for other memory
            if named.role == "parameter":
                self._write(named, final=True)

    def on_context(self, context: Context) -> None:
        with self._lock:
            known = self._contexts.get(context)
            if known is None:
                known = self._contexts[context] = len(self._contexts) + 1
                self._engine.write(TableKind.CONTEXT, known, json.dumps(asdict(context)).encode())
        self._engine.set_context(known)

    def on_tensor(self, named: NamedTensor) -> None:
        self._write(named, final=False)

    def _write(self, named: NamedTensor, *, final: bool) -> None:
        tensor = named.tensor()
        if tensor is None:
            return
        storage, layout, offset = self._engine.where(tensor)
        if storage == 0:
            return
        told = {
            "name": named.name,
            "role": named.role,
            "storage": storage,
            "layout": layout,
            "offset_bytes": offset,
            "time_ns": time.monotonic_ns(),
            "final": final,
        }
        self._engine.write(TableKind.NAMED_TENSOR, 0, json.dumps(told).encode())
