"""What `bench_recorder.py` found, as tables, and held against what was to be reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench_peers import ETO, KINETO, KINETO_SHAPES, MODE, NATIVE, SCOPED

TARGETS = {
    "native_us_per_event": 0.25,
    "eto_over_native": 25.0,
    "demo_percent": 2.0,
    "realistic_percent": 1.0,
    "raw_bytes": 100.0,
    "compressed_bytes": 40.0,
}


def tell(results: dict[str, Any]) -> str:
    """Return the sections of a run as text."""
    sections = {"cost": _tell_cost, "cold": _tell_cold, "start": _tell_start, "bytes": _tell_bytes,
                "realistic": _tell_realistic, "demo": _tell_demo, "programs": _tell_programs}  # fmt: skip
    return "\n\n".join(sections[name](result) for name, result in results.items())


def _tell_cost(cost: dict[str, Any]) -> str:
    keys = {"step_us_min": "step, min", "us_per_event_min": "event, min", "us_per_event_median": "event, median",
            "us_per_entry_median": "operator, median", "start_ms": "start, ms", "stop_ms": "stop, ms"}  # fmt: skip
    return (
        f"Small operators, {cost['events_per_step']} events a step, {cost['rounds']} rounds of {cost['steps']} steps: "
        f"µs a step, and added to each event and recorded operator\n{_table(keys, cost['rows'], 3)}"
    )


def _tell_cold(cold: dict[str, Any]) -> str:
    keys = {"hot_us": "hot", "cold_us": "cold"}
    return (
        f"A module call of four small operators, {cold['events']} events, {cold['hot_us']:.1f} µs; "
        f"{cold['cold_us']:.1f} with the caches swept: µs added\n{_table(keys, cold['rows'], 2)}"
    )


def _tell_start(start: dict[str, Any]) -> str:
    return (
        f"{start['modules']} modules watched: start {start['start_scoped_ms']:.1f} ms (none watched: "
        f"{start['start_ms']:.1f}), stop {start['stop_scoped_ms']:.1f} ms ({start['stop_ms']:.1f}), "
        f"{start['us_per_module_call']:.2f} µs a module call"
    )


def _tell_bytes(size: dict[str, Any]) -> str:
    keys = {"entries_per_step": "operators", "per_entry": "B an operator", "per_entry_file": "with room",
            "per_entry_gzip": "gzip -1", "per_entry_zstd": "zstd", "per_event": "B an event"}  # fmt: skip
    return f"On disk, a step's operators and their bytes\n{_table(keys, size['rows'], 1)}"


def _tell_realistic(real: dict[str, Any]) -> str:
    keys = {"percent_min": "min", "percent_median": "median", "percent_lower": "quartile", "percent_upper": "quartile"}
    return (
        f"Matrices of realistic size, {real['events_per_step']} events in {real['step_ms_min']:.0f} ms, "
        f"{real['rounds']} pairs: % of processor time added\n{_table(keys, real['rows'], 2)}"
    )


def _tell_demo(demo: dict[str, Any]) -> str:
    keys = {"step new, min": "ms, min", "step running, %": "running, %", "step new, %": "new, %",
            "cpu running, %": "processor, running, %", "cpu new, %": "new, %", "operators": "operators a rank",
            "start": "start, ms", "stop": "stop, ms"}  # fmt: skip
    return (
        f"{demo['deployment']}, {demo['ranks']} ranks of {demo['modules']} modules, {demo['rounds']} rounds: a step's "
        f"slowest rank, and all ranks' processor time; in a running recording, in a new one\n"
        f"{_table(keys, {name: demo['rows'][name] for name in sorted(demo['rows'])}, 1)}"
    )


def _tell_programs(told: dict[str, Any]) -> str:
    names = {NATIVE: "truedag", KINETO: "Kineto", KINETO_SHAPES: "K. shapes", ETO: "ETO", MODE: "mode"}
    head = ["", "events", *(f"{name} B" for name in names.values() if name != "mode")]
    head += [f"{name} %" for name in names.values()]
    lines = []
    for program, found in told["programs"].items():
        rows = found["rows"]
        cells = [f"{rows[name]['bytes']}" if name in rows else "crashed" for name in names if name != MODE]
        cells += [f"{rows[name]['percent_min']:+.1f}" if name in rows else "crashed" for name in names]
        lines.append([program, str(found["events"]), *cells])
    return (
        f"Programs on {told['ranks']} ranks, {told['rounds'] - 1} rounds: bytes on disk, % of processor time added (of "
        f"the fastest runs)\n{align([head, *lines])}"
    )


def _table(keys: Mapping[str, str], rows: Mapping[str, Mapping[str, float | None]], digits: int) -> str:
    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.0f}"

    return align([["", *keys.values()], *([name, *(cell(row[key]) for key in keys)] for name, row in rows.items())])


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def judge(results: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """Return each target as (what, measured, wanted, met)."""
    told = []

    def at_most(what: str, value: float, limit: float, unit: str) -> None:
        told.append((what, value, f"<= {limit:g} {unit}", value <= limit))

    if cost := results.get("cost"):
        for key in ("min", "median"):
            per_event = {name: row[f"us_per_event_{key}"] for name, row in cost["rows"].items()}
            own = per_event[NATIVE]
            at_most(f"µs per event ({key})", own, TARGETS["native_us_per_event"], "µs")
            at_most(f"over Kineto without shapes ({key})", own / per_event[KINETO], 1, "x")
            ratio, wanted = per_event[ETO] / own, TARGETS["eto_over_native"]
            told.append((f"below ExecutionTraceObserver ({key})", ratio, f">= {wanted:g} x", ratio >= wanted))
    if real := results.get("realistic"):
        at_most(
            "% of a realistic step (median)", real["rows"][SCOPED]["percent_median"], TARGETS["realistic_percent"], "%"
        )
    if demo := results.get("demo"):
        for when in ("running", "new"):
            percent = demo["rows"][SCOPED][f"step {when}, %"]
            at_most(f"% of the demo's step, {when} recording (median)", percent, TARGETS["demo_percent"], "%")
    if size := results.get("bytes"):
        at_most("bytes per operator", size["rows"][NATIVE]["per_entry"], TARGETS["raw_bytes"], "B")
        at_most("  compressed (gzip -1)", size["rows"][NATIVE]["per_entry_gzip"], TARGETS["compressed_bytes"], "B")
    return told
