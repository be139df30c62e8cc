"""What happened: record, merge, graph, audit, analysis, views.

For a program that wants to be recorded: `trace` around what is to be recorded, and `step` at the end of each step. Both
are loaded when they are asked for, so that nothing else here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from truedag.tracer.record.tracing import step, trace

__all__ = ["step", "trace"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from truedag.tracer.record import tracing

    return getattr(tracing, name)
