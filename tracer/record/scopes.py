"""Module scopes: which module's forward pass runs, without hooks and unknown to the model.

Each watched module has one label, made before recording: its name in the model, and the layer and the expert that
`annotate.module` told of it or of a module around it. While it is watched, the module's own attribute `forward` is what
sets the label and calls the method of its class; it holds on the thread that runs it, and the backward pass finds it
through autograd's sequence numbers. (A forward hook would do the same and take every call of the module off the fast
path of `nn.Module`, which costs many times what the label does.)
"""

from __future__ import annotations

import copy
import json
import sys
import weakref
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch

from truedag.tracer.annotate import REGISTRY, ModuleLabel
from truedag.tracer.record.format import TableKind
from truedag.tracer.record.recorder import Recorder

_NOTHING = object()


def is_scripted(module: torch.nn.Module) -> bool:
    """Whether it is TorchScript, which has no Python method to call."""
    return isinstance(module, torch.jit.ScriptModule)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether it is what torch.compile made; torch's compiler is not imported to find out."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


class _LabelledForward:
    """What stands in for a module's `forward`: calls it under a label.

    It does not hold the module, which is freed as it would be. A copy of the module, in memory or through a file, has
    the method of its class. To those who look at it (`inspect.signature`) it is what it stands for.
    """

    def __init__(self, module: torch.nn.Module, label: int, set_label: Callable[[int], int]) -> None:
        method = module.forward
        is_method = isinstance(method, MethodType) and method.__self__ is module
        self._module = weakref.ref(module)
        self._method = None if is_method else method
        self._function: Callable[..., Any] = type(module).forward
        self._label = label
        self._set_label = set_label
        self.__doc__ = method.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a label must not break a compiled graph in two
            return (
                self._function(self._module(), *args, **kwargs)
                if self._method is None
                else self._method(*args, **kwargs)
            )
        before = self._set_label(self._label)
        try:
            if self._method is None:
                return self._function(self._module(), *args, **kwargs)
            return self._method(*args, **kwargs)
        finally:
            self._set_label(before)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return MethodType(self._function, self._module()) if self._method is None else self._method

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (self._module(), "forward")) if self._method is None else (copy.copy, (self._method,))


class LabelledModules:
    """Modules whose forward passes run under labels, until they are restored."""

    def __init__(self, set_label: Callable[[int], int]) -> None:
        self._set_label = set_label
        self._labelled: list[tuple[weakref.ref[torch.nn.Module], _LabelledForward, Any]] = []

    def add(self, module: torch.nn.Module, label: int) -> None:
        """Run the module's forward passes under a label from now on."""
        labelled = _LabelledForward(module, label, self._set_label)
        self._labelled.append((weakref.ref(module), labelled, module.__dict__.get("forward", _NOTHING)))
        module.__dict__["forward"] = labelled

    def restore(self) -> None:
        """Leave every module as it was; one whose `forward` somebody else has set since keeps that."""
        for reference, labelled, before in self._labelled:
            module = reference()
            if module is None or module.__dict__.get("forward") is not labelled:
                continue
            if before is _NOTHING:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        self._labelled.clear()


class ModuleScopes:
    """The labels on the watched models."""

    def __init__(self, engine: Recorder, watch: Sequence[tuple[str, torch.nn.Module]]) -> None:
        self._engine = engine
        self._watch = watch
        self._modules = LabelledModules(engine.set_label)
        self._num_labels = 0

    def attach(self) -> None:
        """Label every module of the watched models from now on."""
        for name, model in self._watch:
            self._attach(model, name, ModuleLabel(), set())

    def detach(self) -> None:
        """Leave every module as it was."""
        self._modules.restore()

    def _attach(self, module: torch.nn.Module, path: str, around: ModuleLabel, seen: set[int]) -> None:
        # The operators of TorchScript are those of the module around it.
        if id(module) in seen or is_scripted(module):
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
        payload = {
            "module": own.name,
            "type": type(module).__name__,
            "layer": own.layer,
            "expert": own.expert,
            "category": own.category,
        }
        self._engine.write(TableKind.LABEL, self._num_labels, json.dumps(payload).encode())
        self._modules.add(module, self._num_labels)
        if is_compiled(module):
            return  # what is compiled is compiled as it was written
        for name, child in module.named_children():
            self._attach(child, f"{own.name}.{name}" if own.name else name, own, seen)
