"""How each figure of the report is computed, for `truedag report --explain FIGURE`."""

from __future__ import annotations

import inspect
from types import ModuleType

from truedag.tracer.analysis import (
    communications,
    critical_path,
    device_fit,
    estimates,
    experts,
    held_memory,
    memory,
    shares,
    stragglers,
    throughput,
)

# Where a figure is computed, its module says how: one text for who reads the code and for who reads the report.
_MODULES: dict[str, tuple[ModuleType, type | None]] = {
    "step-time": (shares, None),
    "shares": (shares, shares.RankShares),
    "steps": (shares, None),
    "communication": (communications, communications.CommunicationTotals),
    "bandwidth": (communications, communications.CommunicationTotals),
    "stragglers": (stragglers, stragglers.Straggler),
    "critical-path": (critical_path, critical_path.CriticalPath),
    "throughput": (throughput, throughput.Throughput),
    "mfu": (throughput, throughput.Throughput),
    "estimates": (estimates, estimates.Estimates),
    "fit": (device_fit, device_fit.Fit),
    "generation": (throughput, throughput.Generation),
    "memory": (memory, memory.RankMemory),
    "held-memory": (held_memory, held_memory.HeldMemory),
    "experts": (experts, experts.ExpertPlace),
    "expert-load": (experts, experts.ExpertLoad),
}
FIGURES = tuple(_MODULES)


def explain(figure: str) -> str:
    """Return how a figure is computed: the theory of its module, and what each of its values is."""
    module, record = _MODULES[figure]
    texts = [inspect.cleandoc(module.__doc__ or "")]
    if record is not None:
        texts.append(f"In report.json: {inspect.cleandoc(record.__doc__ or '')}")
    return "\n\n".join(texts)
