"""The report as titled tables of text, whatever they are shown in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from truedag.tracer.analysis.device_fit import describe_unfit
from truedag.tracer.analysis.quantities import (
    write_bytes,
    write_digits,
    write_rate,
    write_runs,
    write_shares,
    write_time,
)
from truedag.tracer.analysis.shares import PARTS, RankShares
from truedag.tracer.analysis.spread import Spread

if TYPE_CHECKING:
    from truedag.tracer.analysis.report import Report

_TOP = 10
_MOST_HELD = 6
_MOST_RANKS = 64  # rows of a table that has one for each rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A table, or lines of text.

    Attributes:
        name: what `--explain` calls it.
        title: above it.
        note: a sentence below the title; '': none.
        columns: heads.
        rows: cells, as many as heads.
        right: which columns are numbers.
        bars: shares of each row that are drawn as a bar after it, if the medium can; none: no bars.
    """

    name: str
    title: str
    note: str = ""
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    right: tuple[int, ...] = ()
    bars: Sequence[Sequence[float]] = field(default_factory=tuple)


def write_title(report: Report) -> str:
    """Say what ran."""
    return " · ".join(part for part in (write_name(report), report.strategy) if part)


def write_name(report: Report) -> str:
    """Name what ran, in a few words."""
    ranks = "1 rank" if report.world_size == 1 else f"{report.world_size:,} ranks"
    return f"{report.deployment or 'recorded program'} · {ranks}"


def list_facts(report: Report) -> list[str]:
    """Say in lines what the graph holds and how long a step took."""
    steps = ", ".join(f"{number}: {write_time(span)}" for number, span in report.steps_ns.items()) or "unknown"
    if len(report.steps_ns) > 8 and report.step_spread is not None:
        steps = f"{min(report.steps_ns)} to {max(report.steps_ns)}: {_spread(report.step_spread)}"
    missing = report.world_size - report.num_ranks
    facts = [
        *describe_unfit(report.fits),
        f"{sum(report.nodes.values()):,} nodes: {_counts(report.nodes)}; {report.num_views_dropped:,} views dropped",
        f"{sum(report.edges.values()):,} edges: {_counts(report.edges)}",
        f"unmatched communications: {report.num_unmatched:,}"
        + (f"; {missing} ranks recorded nothing" if missing else ""),
        f"time of step {steps}",
    ]
    if 1 < len(report.steps_ns) <= 8 and report.step_spread is not None:
        facts.append(f"over {len(report.steps_ns)} steps: {_spread(report.step_spread)}")
    if report.num_estimated:
        facts.append(
            f"ESTIMATED: the times of {report.num_estimated:,} nodes are estimates, and enter no figure but those that "
            "are said to be; truedag critical-path has more"
        )
    return facts


def list_sections(report: Report) -> list[Section]:
    """Return the sections that have something to say, in order."""
    found = [
        _shares(report), *_steps(report), _communications(report), _stragglers(report), _path(report),
        _path_operators(report), _throughput(report), _estimates(report), *_generations(report), _memory(report),
        _held(report), _experts(report), _loads(report),
    ]  # fmt: skip
    return [section for section in found if section.rows]


def _shares(report: Report) -> Section:
    known = [one for one in report.ranks if one.fractions is not None]
    unknown = [one.rank for one in report.ranks if one.fractions is None]
    note = (
        "Each moment counts once: compute, else exposed transfer, else waiting for a rank of the own stage, else for "
        "another stage (bubble), else the host's own. hidden: transfer behind compute, of all transfer."
    )
    if len(known) > _MOST_RANKS:
        note += f" The {_MOST_RANKS} of {len(known):,} ranks with the least compute; report.json has all."
        known = sorted(known, key=lambda one: (one.compute_ns or 0, one.rank))[:_MOST_RANKS]
    rows = [
        [str(one.rank), "-" if one.stage is None else str(one.stage), *_percent(one), _hidden(one)] for one in known
    ]
    bars: list[Sequence[float]] = [one.fractions or () for one in known]
    if unknown:
        rows.append([write_runs(unknown), "", *["unknown"] * (len(PARTS) + 1)])
        bars.append(())
    return Section(
        name="shares", title="Time of each rank", note=note, columns=("rank", "stage", *PARTS, "hidden"), rows=rows,
        right=tuple(range(len(PARTS) + 3)), bars=bars,
    )  # fmt: skip


def _steps(report: Report) -> list[Section]:
    """How the shares vary over ranks and steps, where there are several steps."""
    if len(report.steps_ns) < 2:
        return []
    known = [one.fractions for one in report.ranks_by_step if one.fractions is not None]
    rows = []
    for place, part in enumerate(PARTS):
        spread = Spread.of([100 * parts[place] for parts in known])
        if spread is not None:
            told = (spread.least, spread.median, spread.mean, spread.p90, spread.most)
            rows.append([part, *(f"{value:.1f} %" for value in told)])
    if report.step_spread is not None:
        of_steps = report.step_spread
        told = (of_steps.least, of_steps.median, of_steps.mean, of_steps.p90, of_steps.most)
        rows.insert(0, ["step time", *map(write_time, told)])
    return [
        Section(
            name="steps", title=f"Over {len(report.steps_ns)} steps",
            note="Step time over the steps, shares over all ranks and steps.",
            columns=("", "least", "median", "mean", "90 %", "most"), rows=rows, right=(1, 2, 3, 4, 5),
        )
    ]  # fmt: skip


def _communications(report: Report) -> Section:
    rows = [
        [
            one.axis or "unknown",
            one.kind,
            f"{one.num:,}",
            write_bytes(one.num_bytes),
            write_rate(one.algorithm_bytes_per_s),
            write_rate(one.bus_bytes_per_s) if one.kind != "barrier" else "-",
            write_time(one.transfer_ns),
            write_time(one.exposed_ns),
            write_time(one.wait_ns),
        ]
        for one in report.communications
    ]
    return Section(
        name="communication",
        title="Communication",
        note="Bytes are what all participants gave; times are summed over participants; bandwidths are nccl-tests'.",
        columns=("axis", "kind", "number", "bytes", "alg. bw", "bus bw", "transfer", "exposed", "waiting"),
        rows=rows, right=tuple(range(2, 9)),
    )  # fmt: skip


def _stragglers(report: Report) -> Section:
    rows = []
    for one in report.stragglers[:_TOP]:
        if not one.num_last and not one.slow:
            continue
        slow = ", ".join(f"{_short(more.op)} +{write_time(more.excess_ns)}" for more in one.slow)
        number = "unknown" if one.num_last is None else f"{one.num_last:,}"
        excess = "unknown" if one.excess_ns is None else f"{'-' if one.excess_ns < 0 else '+'}" + write_time(
            abs(one.excess_ns)
        )  # fmt: skip
        rows.append([str(one.rank), number, write_time(one.waited_ns), one.late_for or "-", excess, slow or "-"])
    return Section(
        name="stragglers",
        title="Stragglers",
        note="Whom the others waited for, and what it was at meanwhile; and operators beyond the median of its stage.",
        columns=("rank", "came last", "others waited", "late for", "compute", "most of it"), rows=rows,
        right=(0, 1, 2, 4),
    )  # fmt: skip


def _path(report: Report) -> Section:
    path = report.critical_path
    rows = [
        [kind, write_time(time), f"{100 * time / max(path.length_ns, 1):.1f} %"] for kind, time in path.by_kind.items()
    ]
    if path.reason is not None and report.steps_ns:
        rows = [["unknown", path.reason, ""]]
    return Section(
        name="critical-path", title="Critical path", columns=("spent", "time", "share"), rows=rows, right=(1, 2),
        note="What the time went to, one thing after the other over all ranks; more: truedag critical-path.",
    )  # fmt: skip


def _path_operators(report: Report) -> Section:
    path = report.critical_path
    rows = [
        [_short(str(row["op"])), write_time(row["total_ns"]), f"{100 * row['total_ns'] / max(path.length_ns, 1):.1f} %"]
        for row in path.by_op[:_TOP]
    ]
    return Section(
        name="critical-path", title="Operators on the critical path", columns=("operator", "time", "share"), rows=rows,
        right=(1, 2), note="With the host's time before each.",
    )  # fmt: skip


def _throughput(report: Report) -> Section:
    done = report.throughput
    rows = []
    if done.flops:
        rows.append(["FLOPs of matrix products", _count(done.flops)])
        rows.append(["model FLOPs", _count(done.model_flops)])
        if done.flops_per_s is not None and done.model_flops_per_s_per_rank is not None:
            rows.append(["FLOP/s, all ranks", _count(done.flops_per_s)])
            rows.append(["model FLOP/s of a rank", _count(done.model_flops_per_s_per_rank)])
        if done.mfu is not None and done.hfu is not None and done.peak_flops_per_s is not None:
            rows.append([f"MFU of {_count(done.peak_flops_per_s)}FLOP/s", f"{write_digits(100 * done.mfu)} %"])
            rows.append(["hardware utilisation", f"{write_digits(100 * done.hfu)} %"])
        elif done.peak_flops_per_s is None:
            rows.append(["MFU", "unknown: say with --peak-flops what one device can do"])
        else:
            rows.append(["MFU", "unknown: the steps have no measured time"])
    if done.num_tokens is not None:
        rows.append(["tokens", f"{done.num_tokens:,}"])
    if done.tokens_per_s is not None:
        rows.append(["tokens/s, all ranks", f"{done.tokens_per_s:,.1f}"])
    if done.tokens_per_s_per_rank is not None:
        rows.append(["tokens/s of a rank", write_digits(done.tokens_per_s_per_rank)])
    return Section(
        name="throughput", title="Throughput", columns=("", "value"), rows=rows, right=(1,),
        note="A multiplication and an addition are two FLOPs. Model FLOPs are the forward pass's, in training three "
        "times those: what is computed again, or need not be computed, does not change them.",
    )  # fmt: skip


def _estimates(report: Report) -> Section:
    told = report.estimates
    rows: list[list[str]] = []
    if told is not None:
        shares = {
            "GPUs compute": told.compute_share,
            "only communicate": told.exposed_communication_share,
            "are in the pipeline's bubble": told.bubble_share,
            "wait for others": told.waiting_share,
        }
        rows += [["time of a step", write_time(told.step_ns)]] if told.prefill_ns is None else [
            ["time to first token", write_time(told.prefill_ns)], ["all tokens", write_time(told.step_ns)]
        ]  # fmt: skip
        rows += [
            ["tokens/s, all ranks", f"{told.tokens_per_s:,.1f}"],
            ["MFU", f"{100 * told.mfu:.2f} %"],
            ["hardware utilisation", f"{100 * told.hfu:.2f} %"],
            *([name, f"{100 * share:.1f} %"] for name, share in shares.items()),
            *(["assumed", line] for line in told.assumptions),
        ]
    where = "" if told is None else f" on {told.device}, {told.gpus_per_node} of them a node"
    return Section(
        name="estimates", title=f"Estimated{where}, not measured", columns=("", "estimate"), rows=rows,
        note="What operators and communications would take, simulated on the ranks. No other figure has it in it.",
    )  # fmt: skip


def _generations(report: Report) -> list[Section]:
    rows = [
        [
            str(one.step),
            str(one.replica),
            str(one.microbatch),
            "unknown" if one.num_prompts is None else str(one.num_prompts),
            "unknown" if one.num_prompt_tokens is None else str(one.num_prompt_tokens),
            write_time(one.first_token_ns),
            "-" if one.output_token_ns is None else write_time(one.output_token_ns),
        ]
        for one in report.generations
    ]
    return [
        Section(
            name="generation", title="Prefill and decoding",
            note="Time to first token is from the step's beginning to the end of the prompts' prefill; time per output "
            "token is from there to the last decode step's end, by their number.",
            columns=("step", "replica", "microbatch", "prompts", "tokens", "first token", "output token"), rows=rows,
            right=tuple(range(7)),
        )
    ]  # fmt: skip


def _memory(report: Report) -> Section:
    whole = sum(one.parameter_bytes for one in report.memory)
    alike: dict[tuple[str, ...], list[int]] = {}
    for one in report.memory:
        share = f"{write_digits(100 * one.parameter_bytes / whole)} %" if whole else "-"
        cells = (
            write_bytes(one.parameter_bytes), share, write_bytes(one.state_bytes), write_bytes(one.live_bytes),
            f"{one.peak_label or '-'} ({one.peak_phase or 'no phase'})",
        )  # fmt: skip
        alike.setdefault(cells, []).append(one.rank)
    return Section(
        name="memory", title="Data of each rank",
        note="What the data of a rank need at least: parameters that were there when recording began (and their share "
        "of all ranks'), other tensors that were, results still to be read at most. Ranks that agree are one row.",
        columns=("ranks", "parameters", "share", "state", "live at most", "after"),
        rows=[[write_runs(ranks), *cells] for cells, ranks in alike.items()], right=(1, 2, 3, 4),
    )  # fmt: skip


def _held(report: Report) -> Section:
    rows = []
    of_device = {one.ranks: one.describe() for one in report.fits}
    for one in report.held_memory:
        where = one.peak_module or one.peak_phase or "no module"
        at = f"{_short(one.peak_op or '-')} in {where}" + (f", {one.peak_phase}" if one.peak_module else "")
        if one.ranks in of_device:
            at = f"{at} ({of_device[one.ranks]})"
        sizes = (
            one.parameter_bytes, one.gradient_bytes, one.state_bytes, one.activation_bytes, one.peak_bytes,
        )  # fmt: skip
        rows.append([write_runs(list(one.ranks)), *map(write_bytes, sizes), at])
        most = one.alive[:_MOST_HELD]
        rows.extend(["", "", "", "", f"{held.num:,} x", write_bytes(held.num_bytes), held.describe()] for held in most)
    return Section(
        name="held-memory", title="Memory of each rank",
        note="What the program had in memory: made while recording at most, all together at the peak, the operator at "
        f"whose end that was, and the {_MOST_HELD} largest parts of what was alive then. Without what operators and "
        "communications take inside, and what allocators round up or keep.",
        columns=("ranks", "parameters", "gradients", "state", "made", "peak", "at"), rows=rows, right=(1, 2, 3, 4, 5),
    )  # fmt: skip


def _experts(report: Report) -> Section:
    rows = [[write_runs(one.layers), write_runs(one.experts), write_runs(one.ranks)] for one in report.experts]
    return Section(name="experts", title="Experts", columns=("layers", "experts", "ranks"), rows=rows)


def _loads(report: Report) -> Section:
    rows = [
        [
            str(one.layer), f"{sum(one.tokens.values()):,}", f"{max(one.tokens.values()):,}", str(one.busiest),
            "-" if one.imbalance is None else f"{one.imbalance:.2f}", str(one.num_idle),
        ]
        for one in report.expert_loads
    ]  # fmt: skip
    return Section(
        name="expert-load", title="Load of experts", note="Tokens are the rows that an expert's first product had.",
        columns=("layer", "tokens", "most", "by expert", "most / mean", "idle experts"), rows=rows,
        right=(0, 1, 2, 3, 4, 5),
    )  # fmt: skip


def _percent(one: RankShares) -> list[str]:
    parts = one.fractions
    return ["unknown"] * len(PARTS) if parts is None else write_shares(parts)


def _hidden(one: RankShares) -> str:
    if one.overlap_ns is None or one.transfer_ns is None:
        return "unknown"
    moved = one.overlap_ns + one.transfer_ns
    return f"{100 * one.overlap_ns / moved:.1f} %" if moved else "-"


def _spread(spread: Spread) -> str:
    return (
        f"{write_time(spread.median)} (median; {write_time(spread.least)} to {write_time(spread.most)}, "
        f"mean {write_time(spread.mean)})"
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {kind}" for kind, number in counts.items())


def _count(number: float) -> str:
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= 0.9995 * size:
            return f"{write_digits(number / size)} {prefix}"
    return f"{number:,.0f} "


def _short(op: str) -> str:
    return op.removeprefix("aten::").removeprefix("c10d::")
