"""What no observer can see, told by the program (DESIGN rule 9).

Theory of operation: a recorder sees operators, tensors and process groups. It cannot see which axis a group is,
which microbatch runs, which expert a module is, or that a tensor is a parameter's gradient. A program says so
here, before or during a recording; what it does not say is unknown and shown so. Nothing here costs anything worth
naming while no recorder runs, and nothing here ever raises into the program because of a recorder.

Said once (kept for every later recording of this process): `group`, `rank`, `module`, `tensor`.
Said as it happens: `scope`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from truedag.tracer.identity import IdentityMap

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

Axis = Literal["tp", "ep", "etp", "pp", "dp", "edp", "cp", "world"]
Phase = Literal["forward", "backward", "optimizer", "prefill", "decode"]
Category = Literal["computation", "routing"]
Role = Literal["parameter", "gradient", "input", "output", "state"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Where in the program's course an operator ran; None is unsaid."""

    step: int | None = None
    microbatch: int | None = None
    phase: Phase | None = None
    decode_step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleLabel:
    """What a module is to the reader of the graph; None is unsaid and is taken from the module around it."""

    name: str | None = None
    layer: int | None = None
    expert: int | None = None
    category: Category | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTensor:
    """A tensor that the program named."""

    name: str
    role: Role
    tensor: weakref.ref[torch.Tensor]


class ScopeListener(Protocol):
    """What a running recorder wants to hear."""

    def on_context(self, context: Context) -> None:
        """The calling thread's context has become `context`."""

    def on_tensor(self, named: NamedTensor) -> None:
        """A tensor was named while recording."""


class Registry:
    """All that was said in this process."""

    def __init__(self) -> None:
        self.axes: dict[str, str] = {}  # by group name; several axes joined by +
        self.coordinates: dict[str, int] = {}
        self.modules: IdentityMap[ModuleLabel] = IdentityMap()
        self.tensors: list[NamedTensor] = []
        self.listener: ScopeListener | None = None
        self._thread = threading.local()

    @property
    def context(self) -> Context:
        """The calling thread's context."""
        context: Context = getattr(self._thread, "context", _NOTHING_SAID)
        return context

    def enter(self, context: Context) -> None:
        """Make `context` the calling thread's, and tell the recorder."""
        self._thread.context = context
        if self.listener is not None:
            self.listener.on_context(context)


_NOTHING_SAID = Context()
REGISTRY = Registry()


def group(process_group: ProcessGroup, *axes: Axis) -> None:
    """Say which axis of the parallel strategy a process group is, or which axes it spans together.

    Local; any rank of the group may say it; does not synchronise. What is said first of a group stays.
    """
    REGISTRY.axes.setdefault(process_group.group_name, "+".join(axes))


def rank(**coordinates: int) -> None:
    """Say where this rank stands on each axis, for example ``rank(tp=1, pp=0, dp=0, ep=1)``. Local."""
    REGISTRY.coordinates.update(coordinates)


def module(
    module: torch.nn.Module,
    *,
    name: str | None = None,
    layer: int | None = None,
    expert: int | None = None,
    category: Category | None = None,
) -> None:
    """Say what a module is: its name, the layer (0-based, in the whole model) or expert (in the whole layer) it is.

    `category` tells modules that decide and carry out where tokens go ("routing") from those that compute on them.
    Modules inside it inherit layer, expert and category. A second call adds to the first. Has effect on the
    recordings that watch the model afterwards.
    """
    before = REGISTRY.modules.get(module, ModuleLabel())
    REGISTRY.modules[module] = ModuleLabel(
        name=before.name if name is None else name,
        layer=before.layer if layer is None else layer,
        expert=before.expert if expert is None else expert,
        category=before.category if category is None else category,
    )


def tensor(tensor: torch.Tensor, name: str, *, role: Role) -> None:
    """Name a tensor: a parameter, its gradient (by the parameter's name), optimizer state, an input or an output.

    The memory that the tensor occupies now is what is named, for as long as the tensor object lives.
    """
    named = NamedTensor(name=name, role=role, tensor=weakref.ref(tensor))
    REGISTRY.tensors.append(named)
    if REGISTRY.listener is not None:
        REGISTRY.listener.on_tensor(named)


@contextmanager
def scope(
    *,
    step: int | None = None,
    microbatch: int | None = None,
    phase: Phase | None = None,
    decode_step: int | None = None,
) -> Iterator[None]:
    """Say what runs on this thread inside the block. Nested scopes add to the outer one; None keeps what it said.

    Operators of the backward pass take the microbatch and the module of their forward operator by themselves.
    """
    outer = REGISTRY.context
    said = {
        key: value
        for key, value in (("step", step), ("microbatch", microbatch), ("phase", phase), ("decode_step", decode_step))
        if value is not None
    }
    REGISTRY.enter(replace(outer, **said))  # type: ignore[arg-type]
    try:
        yield
    finally:
        REGISTRY.enter(outer)
