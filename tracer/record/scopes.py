"""Module scopes: which module's forward pass runs, without hooks and unknown to the model.

Each watched module has one label, made before recording: its name in the model, and the layer and the expert that
`annotate.module` told of it or of a module around it. While it is watched, the module's own attribute `forward` is what
sets the label and calls the method of its class; it holds on the thread that runs it, and the backward pass finds it
through autograd's sequence numbers. (A forward hook would do the same and take every call of the module off the fast
path of `nn.Module`, which costs many times what the label does.)
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch

from truedag.tracer.annotate import REGISTRY, ModuleLabel
from truedag.tracer.record.format import TableKind
from truedag.tracer.record.recorder import Recorder

_NOTHING = object()


def _is_compiled(module: torch.nn.Module) -> bool:
    """Whether it is what torch.compile made; torch's compiler is not imported to find out."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def _label(module: torch.nn.Module, label: int, set_label: Callable[[int], int]) -> Callable[..., Any]:
    """Return what calls the module's forward under a label: a method of it, as long as its forward is one.

    A copy of the module, in memory or through a file, then has a method of its own.
    """
    method = module.forward
    is_method = isinstance(method, MethodType) and method.__self__ is module
    forward: Callable[..., Any] = method.__func__ if isinstance(method, MethodType) and is_method else method

    @functools.wraps(forward)
    def labelled(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a label must not break a compiled graph in two
            return forward(*args, **kwargs)
        before = set_label(label)
        try:
            return forward(*args, **kwargs)
        finally:
            set_label(before)

    return MethodType(labelled, module) if is_method else labelled


class ModuleScopes:
    """The labels on the watched models."""

    def __init__(self, engine: Recorder, watch: Sequence[tuple[str, torch.nn.Module]]) -> None:
        self._engine = engine
        self._watch = watch
        self._labelled: list[tuple[torch.nn.Module, Callable[..., Any], Any]] = []
        self._num_labels = 0

    def attach(self) -> None:
        """Label every module of the watched models from now on."""
        for name, model in self._watch:
            self._attach(model, name, ModuleLabel(), set())

    def detach(self) -> None:
        """Leave every module as it was; one whose `forward` somebody else has set since keeps that."""
        for module, labelled, before in self._labelled:
            if module.__dict__.get("forward") is not labelled:
                continue
            if before is _NOTHING:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        self._labelled.clear()

    def _attach(self, module: torch.nn.Module, path: str, around: ModuleLabel, seen: set[int]) -> None:
        # TorchScript has no Python method to call; the module around it is where its operators are.
        if id(module) in seen or isinstance(module, torch.jit.ScriptModule):
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
        labelled = _label(module, self._num_labels, self._engine.set_label)
        self._labelled.append((module, labelled, module.__dict__.get("forward", _NOTHING)))
        module.__dict__["forward"] = labelled
        if _is_compiled(module):
            return  # what is compiled is compiled as it was written
        for name, child in module.named_children():
            self._attach(child, f"{own.name}.{name}" if own.name else name, own, seen)
