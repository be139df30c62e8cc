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
    spread,
    stragglers,
    throughput,
)

# Where a figure is computed, its module says how: one text for who reads the code and for who reads the report.
_MODULES: dict[str, tuple[ModuleType, type | None]] = {
    "step-time": (shares, None),
    "shares": (shares, shares.RankShares),
    "steps": (spread, spread.Spread),
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
# Heads of columns and rows, and what else people call them, beside the names of sections.
_OTHER_NAMES = {
    "shares": ("compute", "transfer", "waiting", "bubble", "host", "hidden", "stage", "overlap"),
    "communication": ("number", "bytes", "exposed", "axis", "kind"),
    "bandwidth": ("alg. bw", "bus bw", "algorithm bandwidth", "bus bandwidth"),
    "stragglers": ("came last", "others waited", "late for", "most of it"),
    "critical-path": ("spent", "operator"),
    "throughput": ("flops", "flops of matrix products", "model flops", "flop/s, all ranks", "model flop/s of a rank",
                   "tokens", "tokens/s", "tokens/s, all ranks", "tokens/s of a rank"),
    "mfu": ("hfu", "hardware utilisation"),
    "generation": ("prefill", "decoding", "replica", "microbatch", "prompts", "first token", "output token", "ttft",
                   "tpot", "time to first token", "time per output token"),
    "memory": ("parameters", "state", "live at most", "after"),
    "held-memory": ("gradients", "made", "peak", "at"),
    "experts": ("layers", "experts"),
    "expert-load": ("most", "by expert", "most / mean", "imbalance", "idle experts"),
    "steps": ("least", "median", "mean", "90 %"),
}  # fmt: skip


def find_figure(name: str) -> str | None:
    """Return which figure a name is of: its own, or one that the report heads a column or row of it with."""
    asked = name.strip().lower()
    if asked in _MODULES:
        return asked
    return next((figure for figure, others in _OTHER_NAMES.items() if asked in others), None)


def explain(figure: str) -> str:
    """Return how a figure is computed: the theory of its module, and what each of its values is."""
    module, record = _MODULES[figure]
    texts = [inspect.cleandoc(module.__doc__ or "")]
    if record is not None:
        texts.append(f"In report.json: {inspect.cleandoc(record.__doc__ or '')}")
    return "\n\n".join(texts)
