"""Module scopes: which module's forward pass runs, by hooks that the model does not know of.

Each watched module has one label, made before recording: its name in the model, and the layer and the expert that
`annotate.module` told of it or of a module around it. A label holds from a module's forward pre-hook to its forward
hook, on the thread that runs it; the backward pass finds it through autograd's sequence numbers.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from truedag.tracer.annotate import REGISTRY, ModuleLabel
from truedag.tracer.record.format import TableKind
from truedag.tracer.record.recorder import Recorder


class ModuleScopes:
    """The hooks on the watched models."""

    def __init__(self, engine: Recorder, watch: Sequence[tuple[str, torch.nn.Module]]) -> None:
        self._engine = engine
        self._watch = watch
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._thread = threading.local()
        self._num_labels = 0

    def attach(self) -> None:
        """Label every module of the watched models from now on."""
        for name, model in self._watch:
            self._attach(model, name, ModuleLabel(), set())

    def detach(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _attach(self, module: torch.nn.Module, path: str, around: ModuleLabel, seen: set[int]) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        told = REGISTRY.modules.get(module, ModuleLabel())
        own = ModuleLabel(
            name=told.name or path,
            layer=around.layer if told.layer is None else told.layer,
            expert=around.expert if told.expert is None else told.expert,
            category=told.category or around.category,
        )
        self._num_labels += 1
        label = self._num_labels
        payload = {
            "module": own.name,
            "type": type(module).__name__,
            "layer": own.layer,
            "expert": own.expert,
            "category": own.category,
        }
        self._engine.write(TableKind.LABEL, label, json.dumps(payload).encode())
        self._handles.append(module.register_forward_pre_hook(self._enter(label)))
        self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        for name, child in module.named_children():
            self._attach(child, f"{own.name}.{name}" if own.name else name, own, seen)

    def _stack(self) -> list[int]:
        stack: list[int] | None = getattr(self._thread, "stack", None)
        if stack is None:
            stack = self._thread.stack = []
        return stack

    def _enter(self, label: int) -> Callable[[torch.nn.Module, Any], None]:
        set_label = self._engine.set_label

        def enter(_module: torch.nn.Module, _args: Any) -> None:
            self._stack().append(set_label(label))

        return enter

    def _leave(self, _module: torch.nn.Module, _args: Any, _output: Any) -> None:
        stack = self._stack()
        if stack:
            self._engine.set_label(stack.pop())
