"""Counts a program's steps by its optimizer's, and marks what the optimizer does.

Where there are several optimizers, the first that finishes a step is the one that counts: one inside another finishes
first, and of several in turn each finishes once a step.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from truedag.tracer.annotate import REGISTRY, Context
from truedag.tracer.record.tracer import Tracer


class OptimizerSteps:
    """The hooks on all optimizers of this process; `tracer` is told."""

    def __init__(self) -> None:
        self.tracer: Tracer | None = None
        self._counting: weakref.ref[Optimizer] | None = None
        self._stepping: weakref.ref[Optimizer] | None = None
        self._around = Context()
        register_optimizer_step_pre_hook(self._before)
        register_optimizer_step_post_hook(self._after)

    def _before(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        """What runs from here on is the optimizer's, unless the program said what it is."""
        if self.tracer is None or not self.tracer.is_recording:
            return
        stepping = self._stepping() if self._stepping is not None else None
        if stepping not in (None, optimizer):  # one inside another; one that is left over raised in its step
            return
        context = REGISTRY.context
        if context.phase is None or stepping is optimizer:
            self._around = replace(context, phase=None)
            self._stepping = weakref.ref(optimizer)
            REGISTRY.enter(replace(context, phase="optimizer"))

    def _after(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if self.tracer is None:
            return
        if self._stepping is not None and self._stepping() is optimizer:
            self._stepping = None
            REGISTRY.enter(self._around)
        counting = self._counting() if self._counting is not None else None
        if counting is None:
            self._counting = weakref.ref(optimizer)
        if counting in (None, optimizer):
            self.tracer.count_step()
