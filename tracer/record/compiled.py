"""Record graphs that torch.compile has compiled: each call is one operator, with its tensors in and out.

Inductor's code runs outside of the dispatcher, but for the library operators that it calls: what those read would have
been written by nobody. While a recording runs, the class of all compiled graphs calls through here, whenever in the
process each was compiled, and a replay of a CUDA graph that Inductor has made of one is inside its call. Source:
torch/_inductor/output_code.py (CompiledFxGraph).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from truedag.tracer.record.recorder import Recorder

_MODULE = "torch._inductor.output_code"
_NAME = "inductor::compiled_graph"
_SCHEMA = f"{_NAME}(Tensor[] read, Tensor(a!)[] written) -> Tensor[] results"


class CompiledGraphs:
    """Puts itself in front of compiled graphs while a recording runs."""

    def __init__(self, engine: Recorder) -> None:
        self._engine = engine
        self._finder: _Finder | None = None
        self._undo: Callable[[], None] | None = None

    def attach(self) -> None:
        """Record every call from now on; Inductor is not imported for that."""
        module = sys.modules.get(_MODULE)
        if module is None:
            self._finder = _Finder(self._attach)
            sys.meta_path.insert(0, self._finder)
        else:
            self._attach(module)

    def detach(self) -> None:
        """Take everything away again."""
        if self._finder is not None and self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        self._finder = None
        if self._undo is not None:
            self._undo()
        self._undo = None

    def _attach(self, module: ModuleType) -> None:
        kind: Any = module.CompiledFxGraph
        original, engine = kind.__call__, self._engine

        @functools.wraps(original)
        def call(graph: Any, inputs: Sequence[Any]) -> Any:
            # A backward graph may make a result in the memory of a saved tensor that nobody else needs, and does not
            # say which.
            may_reuse = bool(graph.fx_kwargs.get("is_backward"))
            key = (graph._fx_graph_cache_key or "")[:12]
            if not engine.open_region(_NAME, key, _SCHEMA, inputs, tuple(graph.mutated_input_idxs), may_reuse):
                return original(graph, inputs)
            results = None
            try:
                results = original(graph, inputs)
            finally:
                engine.close_region(results)
            return results

        def undo() -> None:
            if kind.__call__ is call:
                kind.__call__ = original

        kind.__call__ = call
        self._undo = undo


class _Finder(MetaPathFinder):
    """Tells of Inductor's module when the program imports it."""

    def __init__(self, tell: Callable[[ModuleType], None]) -> None:
        self._tell = tell

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._tell)
        return spec


class _Loader(Loader):
    """Loads as another loader does, and tells."""

    def __init__(self, loader: Loader, tell: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._tell = tell

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._tell(module)
