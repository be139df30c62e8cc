"""Record what runs inside a block, on this rank, into one trace file.

Theory of operation: a `Recorder` writes events, tensors and communications (natively, or by a TorchDispatchMode); this
module adds what Python knows: module scopes by forward hooks, the contexts that `annotate` is told, names of tensors,
process groups and their ranks, the clock. A recorder that cannot go on switches itself off and the program runs on.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from truedag.tracer.annotate import REGISTRY, Context, NamedTensor
from truedag.tracer.errors import RecordError
from truedag.tracer.record.compiled import CompiledGraphs
from truedag.tracer.record.format import TableKind
from truedag.tracer.record.recorder import Recorder
from truedag.tracer.record.scopes import ModuleScopes

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
        synchronize: meet the other ranks in a barrier first.

    Raises:
        RecordError: the file cannot be made, or a recording is running already.
        BuildError: the native recorder cannot be compiled.
    """
    engine = _load(recorder)
    recording = Recording(path)
    if synchronize and dist.is_available() and dist.is_initialized():
        dist.barrier()
    try:
        engine.start(str(path))
    except RuntimeError as error:
        raise RecordError(f"cannot record into {path}: {error}") from error
    said = _Said(engine)
    scopes = ModuleScopes(engine, watch)
    compiled = CompiledGraphs(engine)
    try:
        with _shield(recording):
            _write_meta(engine, recorder)
            _write_groups(engine)
            said.begin()
            scopes.attach()
            compiled.attach()
            if dist.is_available():
                engine.watch_waits(dist.Work)
        yield recording
    finally:
        with _shield(recording):
            engine.unwatch_waits()
            compiled.detach()
            scopes.detach()
            said.end()
            _write_groups(engine)
            # The process group may have been made, or have changed, inside the block.
            place = _place() if dist.is_available() and dist.is_initialized() else {}
            engine.write(TableKind.META, 1, json.dumps(place | {"clock_end": _clock_sample()}).encode())
        with _shield(recording):
            recording.num_events, why = engine.stop()
            recording.switched_off = recording.switched_off or why


@contextmanager
def _shield(recording: Recording) -> Iterator[None]:
    """Keep the recorder's own failures away from the program: it is told once, and runs on."""
    try:
        yield
    except Exception as error:  # whatever it is, the program is not at fault
        if not recording.switched_off:
            recording.switched_off = f"{type(error).__name__}: {error}"
            sys.stderr.write(f"truedag: recording is incomplete, the program runs on: {recording.switched_off}\n")


def _load(recorder: RecorderName) -> Recorder:
    if recorder == "native":
        from truedag.tracer.record.native.build import load_recorder

        return load_recorder()
    from truedag.tracer.record.dispatch_mode import PythonRecorder

    return PythonRecorder()


class _Said:
    """Passes on what the program says through `annotate`."""

    def __init__(self, engine: Recorder) -> None:
        self._engine = engine
        self._contexts: dict[Context, int] = {}
        self._lock = threading.Lock()

    def begin(self) -> None:
        if REGISTRY.listener is not None:
            raise RecordError("a recording is running in this process already; end it before the next")
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


def _write_meta(engine: Recorder, recorder: RecorderName) -> None:
    meta = _place() | {
        "host": platform.node(),
        "boot_id": _boot_id(),
        "pid": os.getpid(),
        "torch": torch.__version__,
        "recorder": recorder,
        "coordinates": dict(REGISTRY.coordinates),
        "clock_begin": _clock_sample(),
    }
    engine.write(TableKind.META, 0, json.dumps(meta).encode())


def _place() -> dict[str, Any]:
    """Say which rank this is; before there is a process group, as torchrun told it."""
    device = "cuda" if torch.cuda.is_initialized() else "cpu"  # type: ignore[no-untyped-call]
    if not (dist.is_available() and dist.is_initialized()):
        rank, world_size = (
            int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))
        )
        return {"rank": rank, "world_size": world_size, "device": device}
    return {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "device": device}


def _write_groups(engine: Recorder) -> None:
    """Say which ranks each process group has, and which axis it is, as far as the program told."""
    if not dist.is_initialized():
        return
    for group, members in dist.distributed_c10d._world.pg_group_ranks.items():
        if not isinstance(group, dist.ProcessGroup):
            continue  # the mark for groups that this rank is not in
        ranks = [rank for rank, _ in sorted(members.items(), key=lambda item: item[1])]
        told = {
            "name": group.group_name,
            "ranks": ranks or list(range(dist.get_world_size())),
            "axis": REGISTRY.axes.get(group.group_name),
        }
        engine.write(TableKind.GROUP_RANKS, 0, json.dumps(told).encode())


def _clock_sample() -> dict[str, int]:
    before = time.monotonic_ns()
    realtime = time.time_ns()
    return {"monotonic_ns": before, "realtime_ns": realtime, "spread_ns": time.monotonic_ns() - before}


def _boot_id() -> str:
    """Name the running kernel: processes with the same one share CLOCK_MONOTONIC."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{platform.node()}-{time.time_ns() - time.monotonic_ns():d}"[:-9]
