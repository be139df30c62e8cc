"""The report as pictures, SVG or PNG, drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from truedag.tracer.analysis.report import Report
from truedag.tracer.analysis.report_sections import write_name
from truedag.tracer.analysis.shares import PARTS
from truedag.tracer.errors import GraphError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people tell apart; hatches do so in print.
_COLOURS = dict(zip(PARTS, ("#0072b2", "#009e73", "#e69f00", "#cc79a7", "#999999"), strict=True))
_HATCHES = dict(zip(PARTS, ("", "//", "..", "xx", ""), strict=True))
_TITLES = {
    "shares": "Time of each rank", "communication": "Time in communications", "expert-load": "Load of experts",
    "steps": "Time of steps",
}  # fmt: skip
_MOST_RANKS = 64  # with more, a bar is too thin to be labelled


def plot_report(report: Report, folder: Path, *, to: Literal["svg", "png"] = "svg") -> list[Path]:
    """Draw shares, communications, expert loads and steps, each that there is, and return the files.

    Raises:
        GraphError: matplotlib is not installed, or a file cannot be written.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise GraphError("plots need matplotlib: pip install 'truedag[plots]'") from error
    drawings = {
        "shares": _draw_shares,
        "communication": _draw_communications,
        "expert-load": _draw_loads,
        "steps": _draw_steps,
    }
    # The same picture for the same report: no dates, no random names.
    settings: Any = {"svg.hashsalt": "truedag", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
                "axes.spines.right": False, "figure.constrained_layout.use": True, "hatch.linewidth": 0.4}  # fmt: skip
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(settings):
            for name, draw in drawings.items():
                figure = draw(report)
                if figure is None:
                    continue
                figure.suptitle(f"{_TITLES[name]} · {write_name(report)}", x=0.01, ha="left", fontsize=10)
                path = folder / f"report-{name}.{to}"
                figure.savefig(path, dpi=160, metadata={"Date": None} if to == "svg" else {"Software": None})
                written.append(path)
    except OSError as error:
        raise GraphError(f"cannot write plots into {folder}: {error}") from error
    return written


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _draw_shares(report: Report) -> Figure | None:
    known = [(one.rank, one.fractions) for one in report.ranks if one.fractions is not None]
    if not known:
        return None
    figure, axes = _figure(8, min(1.2 + 0.28 * len(known), 14))
    reached = [0.0] * len(known)
    for place, part in enumerate(PARTS):
        widths = [100 * fractions[place] for _, fractions in known]
        axes.barh(range(len(known)), widths, left=reached, color=_COLOURS[part], hatch=_HATCHES[part], label=part,
                  edgecolor="white", linewidth=0.3)  # fmt: skip
        reached = [left + width for left, width in zip(reached, widths, strict=True)]
    if len(known) <= _MOST_RANKS:
        axes.set_yticks(range(len(known)), [f"rank {rank}" for rank, _ in known])
    else:
        axes.set_ylabel("rank")
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the recorded steps")
    axes.legend(ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    return figure


def _draw_communications(report: Report) -> Figure | None:
    known = [
        one for one in report.communications if None not in (one.wait_ns, one.exposed_ns, one.hidden_ns)
    ]  # fmt: skip
    if not known:
        return None
    figure, axes = _figure(8, 1.2 + 0.3 * len(known))
    longest = max((one.wait_ns or 0) + (one.exposed_ns or 0) + (one.hidden_ns or 0) for one in known)
    size, unit = (1e9, "s") if longest >= 1e10 else (1e6, "ms") if longest >= 1e7 else (1e3, "µs")
    left = [0.0] * len(known)
    for name, colour, hatch in (("exposed", "#d55e00", "//"), ("hidden", "#56b4e9", ""), ("wait", "#e69f00", "..")):
        times = [(getattr(one, f"{name}_ns") or 0) / size for one in known]
        label = {"wait": "waiting", "exposed": "exposed transfer", "hidden": "hidden transfer"}[name]
        axes.barh(range(len(known)), times, left=left, color=colour, hatch=hatch, label=label, edgecolor="white",
                  linewidth=0.3)  # fmt: skip
        left = [one + more for one, more in zip(left, times, strict=True)]
    axes.set_yticks(range(len(known)), [f"{one.axis or 'unknown'} {one.kind} ({one.num:,})" for one in known])
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit}, summed over participants")
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    return figure


def _draw_loads(report: Report) -> Figure | None:
    if not report.expert_loads:
        return None
    experts = sorted({expert for one in report.expert_loads for expert in one.tokens})
    table = [[one.tokens.get(expert, 0) for expert in experts] for one in report.expert_loads]
    figure, axes = _figure(min(2.5 + 0.25 * len(experts), 12), min(1.5 + 0.25 * len(table), 12))
    image = axes.imshow(np.ma.masked_equal(table, 0), aspect="auto", cmap="cividis", vmin=0)
    axes.set_facecolor("#e6e6e6")  # who got nothing
    axes.set_yticks(range(len(table)), [str(one.layer) for one in report.expert_loads])
    step = max(1, len(experts) // 16)
    axes.set_xticks(range(0, len(experts), step), [str(expert) for expert in experts[::step]])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    figure.colorbar(image, label="tokens (grey: none)")
    return figure


def _draw_steps(report: Report) -> Figure | None:
    if len(report.steps_ns) < 2:
        return None
    figure, axes = _figure(8, 3)
    axes.plot(list(report.steps_ns), [time / 1e6 for time in report.steps_ns.values()], "o-", color="#0072b2")
    axes.set_xlabel("step")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    return figure
