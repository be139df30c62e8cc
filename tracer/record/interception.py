"""What the native recorder's interceptor must be told of: other observers, and PyTorch's compiler.

On a thread that is intercepted nothing is announced to PyTorch's observers, but a profiler of the program's must see
what it would see. Where Dynamo compiles, the recorder only observes, because compiled code goes by a thread's dispatch
keys and would be compiled anew. Sources: torch/autograd/profiler.py, torch/profiler/profiler.py,
torch/_dynamo/callback.py, torch/csrc/dynamo/guards.h (LocalState).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch.autograd import profiler
from torch.profiler import profiler as traces

from truedag.tracer.record.arrival import on_import
from truedag.tracer.record.native.build import NativeRecorder

_COMPILER = "torch._dynamo.callback"
_running: list[Interception] = []  # the one of this process's recording


def has_compiled() -> bool:
    """Whether Dynamo has compiled anything in this process; it is not imported to find out."""
    counted = sys.modules.get("torch._dynamo.utils")
    return counted is not None and bool(counted.counters["frames"])


def _hear_compiler(module: ModuleType) -> None:
    started = module.callback_handler.start_callbacks
    if _observe not in started:
        started.append(_observe)


def _observe(_: object) -> None:
    for interception in _running:
        interception.observe()


class Interception:
    """Tells the interceptor, while a recording runs."""

    def __init__(self, engine: NativeRecorder) -> None:
        self._engine = engine
        self._undo: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Tell of everything from now on."""
        _running.append(self)
        on_import(_COMPILER, _hear_compiler)
        self._wrap(profiler, "_run_on_profiler_start", lambda start: self._listening(start, begins=True))
        self._wrap(profiler, "_run_on_profiler_stop", lambda stop: self._listening(stop, begins=False))
        self._wrap(traces, "_enable_execution_trace_observer", lambda start: self._listening(start, begins=True))
        self._wrap(traces, "_disable_execution_trace_observer", lambda stop: self._listening(stop, begins=False))

    def detach(self) -> None:
        """Take everything away again; what somebody has wrapped since stays within theirs."""
        if self in _running:
            _running.remove(self)
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def observe(self) -> None:
        """Have this process's operators observed and no more intercepted."""
        self._engine.observe()

    def _wrap(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(owner, name)
        wrapped = functools.wraps(original)(wrap(original))

        def undo() -> None:
            if getattr(owner, name) is wrapped:
                setattr(owner, name, original)

        setattr(owner, name, wrapped)
        self._undo.append(undo)

    def _listening(self, call: Callable[..., Any], *, begins: bool) -> Callable[..., Any]:
        def call_listening(*args: Any, **kwargs: Any) -> Any:
            if begins:
                self._engine.listen(True)
            try:
                return call(*args, **kwargs)
            finally:
                if not begins:
                    self._engine.listen(False)

        return call_listening
