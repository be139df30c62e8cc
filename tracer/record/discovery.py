"""Names for what a program says nothing of: its modules, and the parameters in them.

While a recording begins, hooks on all modules of the process tell whose forward pass runs. A module that is called from
no other is a model: it is named by its class, and everything in it by the names that the model itself gives
(`named_modules`, `named_parameters`). Which layer or expert a module is stays unknown: a name does not say it. From
then on the modules label themselves (`scopes.py`), and once no new model has come for a while, the hooks go: they would
take every call of every module off the fast path of `nn.Module`.

Hooks on all modules would be seen by torch.compile, which warns of them: a program that compiles gets no names.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from truedag.tracer import annotate
from truedag.tracer.annotate import REGISTRY
from truedag.tracer.identity import IdentityMap
from truedag.tracer.record.format import TableKind
from truedag.tracer.record.recorder import Recorder
from truedag.tracer.record.scopes import LabelledModules, is_scripted

# A model inside nothing but one of these is what the program's author calls the model.
_WRAPPED = ("module", "_orig_mod")
# After so many calls of known models nobody waits for new ones any more.
_FAMILIAR = 100


class ModuleDiscovery:
    """The hooks of one recording."""

    def __init__(self, engine: Recorder) -> None:
        self._engine = engine
        self._labels: IdentityMap[int] = IdentityMap()
        self._num_labels = 0
        self._num_models: dict[str, int] = {}
        self._modules = LabelledModules(engine.set_label)
        self._num_familiar = 0  # models called in a row that had been called before
        self._handles: list[Any] = []
        self._lock = threading.Lock()
        self._thread = threading.local()

    def attach(self) -> None:
        """Label modules from now on."""
        if compiles():
            return
        self._handles.append(register_module_forward_pre_hook(self._enter))
        self._handles.append(register_module_forward_hook(self._leave, always_call=True))

    def detach(self) -> None:
        """Take the hooks and the labels away."""
        self._remove_hooks()
        self._modules.restore()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _stack(self) -> list[int | None]:
        """The label before each open call, where this class has set one."""
        stack: list[int | None] | None = getattr(self._thread, "stack", None)
        if stack is None:
            stack = self._thread.stack = []
        return stack

    def _enter(self, module: torch.nn.Module, _args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        stack = self._stack()
        before: int | None = None
        if not stack and module not in self._labels:
            self._num_familiar = 0
            before = self._meet(module)
        elif not stack:
            self._num_familiar += 1
            if self._num_familiar >= _FAMILIAR:
                self._remove_hooks()
        # One that was put into its model later is part of whatever called it.
        stack.append(before)

    def _leave(self, _module: torch.nn.Module, _args: Any, _output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        stack = self._stack()
        before = stack.pop() if stack else None
        if before is not None:
            self._engine.set_label(before)

    def _meet(self, module: torch.nn.Module) -> int | None:
        """Name a model, and label the call of it that has begun; return the label before.

        What the program's own methods raise here is none of the program's business: then the model has no names.
        """
        try:
            with self._lock:
                return self._engine.set_label(self._learn(module))  # this call has fetched its forward already
        except Exception as error:  # whatever it is
            self._labels[module] = 0
            sys.stderr.write(
                f"truedag: the modules of {type(module).__name__} have no names in the graph: "
                f"{type(error).__name__}: {error}\n"
            )
            return None

    def _learn(self, outer: torch.nn.Module) -> int:
        """Name a model and everything in it; return its label."""
        model = _unwrap(outer)
        kind = type(model).__name__
        count = self._num_models[kind] = self._num_models.get(kind, 0) + 1
        name = kind if count == 1 else f"{kind}-{count}"
        for path, module in model.named_modules():
            self._add(module, f"{name}.{path}" if path else name)
        if outer not in self._labels:
            self._add(outer, name)
        known = {id(named.tensor()) for named in REGISTRY.tensors}
        for path, parameter in model.named_parameters():
            local = getattr(parameter, "_local_tensor", parameter)  # a DTensor's own part is what lies in memory here
            if id(local) not in known:
                annotate.tensor(local, f"{name}.{path}", role="parameter")
        return self._labels.get(outer, 0)

    def _add(self, module: torch.nn.Module, name: str) -> None:
        told = REGISTRY.modules.get(module, annotate.ModuleLabel())
        payload = {
            "module": told.name or name,
            "type": type(module).__name__,
            "layer": told.layer,
            "expert": told.expert,
            "category": told.category,
        }
        self._num_labels += 1
        self._labels[module] = self._num_labels
        self._engine.write(TableKind.LABEL, self._num_labels, json.dumps(payload).encode())
        if not is_scripted(module):
            self._modules.add(module, self._num_labels)


def compiles() -> bool:
    """Whether this program has compiled anything."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    backends = getattr(frames, "cached_backends", None) or {}
    return any(backend is not None for backend in backends.values())  # None: compilation was switched off somewhere


def _unwrap(module: torch.nn.Module) -> torch.nn.Module:
    while True:
        children = list(module.named_children())
        if (
            len(children) != 1
            or children[0][0] not in _WRAPPED
            or next(module.parameters(recurse=False), None) is not None
        ):
            return module
        module = children[0][1]
