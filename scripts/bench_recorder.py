"""What recording costs, beside the peers: `python scripts/bench_recorder.py [--quick] [--json] [--demo] [--programs]`.

Theory of operation: one process runs the same short step again and again, under each recorder in turn, in an order
that is shuffled every round, so that whatever else the machine does falls on all of them alike. What a recorder adds is
the difference to the bare step: of the fastest steps of all rounds (min), and the median over the rounds of the
difference of their medians. An event is a call that PyTorch's dispatcher or autograd announces to an observer; an
observer that counts them says how many a step has. Starting and stopping a recorder is not part of a step here, and has
a table of its own.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_peers import (
    BARE,
    ETO,
    KINETO,
    KINETO_SHAPES,
    NATIVE,
    PYTHON,
    RECORDERS,
    SCOPED,
    SLOW,
    Recorder,
    load_floor_observer,
    nothing,
)

TARGETS = {
    "native_us_per_event": 0.25,
    "eto_over_native": 25.0,
    "demo_percent": 2.0,
    "realistic_percent": 1.0,
    "raw_bytes": 100.0,
    "compressed_bytes": 40.0,
}


Step = Callable[[], None]


# The steps.


def training_step(hidden: int, sequence: int, layers: int) -> tuple[torch.nn.Module, Step]:
    """Return a small transformer and its training step: forward, backward, foreach AdamW."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(hidden, max(hidden // 64, 2), 4 * hidden, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    tokens = torch.randn(1, sequence, hidden)

    def step() -> None:
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def count_events(step: Step) -> int:
    floor = load_floor_observer()
    floor.start(False, False, True)
    step()
    return int(floor.stop())


# Measuring.


@dataclass(slots=True)
class Timing:
    """Steps under one recorder."""

    rounds: list[list[int]] = field(default_factory=list)
    """Nanoseconds of each step, by round."""
    start_ns: list[int] = field(default_factory=list)
    stop_ns: list[int] = field(default_factory=list)
    entries_per_step: float = 0.0

    def fastest(self) -> int:
        return min(min(steps) for steps in self.rounds)

    def medians(self) -> list[float]:
        return [statistics.median(steps) for steps in self.rounds]


def run_steps(recorder: Recorder, model: torch.nn.Module, step: Step, num_steps: int, timing: Timing) -> None:
    clock = time.perf_counter_ns
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        before = clock()
        with recorder(Path(folder), [model]) as kept:
            begun = clock()
            for _ in range(num_steps):
                start = clock()
                step()
                taken.append(clock() - start)
            ended = clock()
        timing.stop_ns.append(clock() - ended)
    timing.start_ns.append(begun - before)
    timing.rounds.append(taken)
    timing.entries_per_step = kept.entries / num_steps


def interleave(
    recorders: Mapping[str, Recorder], model: torch.nn.Module, step: Step, *, rounds: int, steps: int, slow_steps: int
) -> dict[str, Timing]:
    for name, recorder in recorders.items():
        run_steps(recorder, model, step, 3, Timing())
    timings = {name: Timing() for name in recorders}
    shuffled = random.Random(0)
    gc.disable()
    for _ in range(rounds):
        for name in shuffled.sample(list(recorders), len(recorders)):
            gc.collect()
            run_steps(recorders[name], model, step, slow_steps if name in SLOW else steps, timings[name])
    gc.enable()
    return timings


def added_ns(timings: Mapping[str, Timing], name: str) -> tuple[float, float]:
    """Return what a step takes more under this recorder: of the fastest steps, and of the median ones."""
    bare, own = timings[BARE], timings[name]
    differences = [mine - other for mine, other in zip(own.medians(), bare.medians(), strict=True)]
    return own.fastest() - bare.fastest(), statistics.median(differences)


def measure_cost(*, rounds: int, steps: int) -> dict[str, Any]:
    """Measure what each recorder adds to a step of small operators, where there is nothing to hide behind."""
    torch.set_num_threads(1)
    model, step = training_step(hidden=16, sequence=4, layers=1)
    for _ in range(10):
        step()
    events = count_events(step)
    timings = interleave(RECORDERS, model, step, rounds=rounds, steps=steps, slow_steps=max(steps // 5, 4))
    rows = {}
    for name, timing in timings.items():
        fastest, median = added_ns(timings, name)
        per_entry = median / timing.entries_per_step if timing.entries_per_step else None
        rows[name] = {
            "step_us_min": timing.fastest() / 1e3,
            "us_per_event_min": fastest / 1e3 / events,
            "us_per_event_median": median / 1e3 / events,
            "us_per_entry_median": per_entry and per_entry / 1e3,
            "start_ms": statistics.median(timing.start_ns) / 1e6,
            "stop_ms": statistics.median(timing.stop_ns) / 1e6,
        }
    return {"events_per_step": events, "rounds": rounds, "steps": steps, "rows": rows}


def measure_realistic(*, rounds: int) -> dict[str, Any]:
    """Measure a step with matrices of realistic size; each recorded step is compared with the bare one beside it."""
    torch.set_num_threads(2)
    model, step = training_step(hidden=1024, sequence=512, layers=2)
    for _ in range(2):
        step()
    events = count_events(step)
    names = [NATIVE, SCOPED, KINETO, KINETO_SHAPES, ETO]
    timings = {name: Timing() for name in names}
    bare = {name: Timing() for name in names}
    shuffled = random.Random(0)
    gc.disable()
    for turn in range(rounds):
        for name in shuffled.sample(names, len(names)):
            pair = [(RECORDERS[name], timings[name]), (nothing, bare[name])]
            for recorder, timing in pair if turn % 2 else reversed(pair):
                run_steps(recorder, model, step, 1, timing)
                gc.collect()
    gc.enable()
    torch.set_num_threads(1)
    every = [steps[0] for timing in bare.values() for steps in timing.rounds]
    rows = {}
    for name in names:
        ratios = [
            100 * (mine[0] / other[0] - 1) for mine, other in zip(timings[name].rounds, bare[name].rounds, strict=True)
        ]
        quartiles = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "percent_min": 100 * (timings[name].fastest() / min(every) - 1),
            "percent_median": statistics.median(ratios),
            "percent_quartiles": [quartiles[0], quartiles[2]],
        }
    return {
        "events_per_step": events,
        "step_ms_min": min(every) / 1e6,
        "step_ms_median": statistics.median(every) / 1e6,
        "rounds": rounds,
        "rows": rows,
    }


def measure_bytes(*, steps: int) -> dict[str, Any]:
    """Measure what a recording leaves on disk."""
    model, step = training_step(hidden=16, sequence=4, layers=1)
    events = count_events(step)
    rows = {}
    for name in (NATIVE, PYTHON, KINETO, KINETO_SHAPES, ETO):
        with tempfile.TemporaryDirectory() as folder:
            keep = Path(folder) / "keep"
            keep.mkdir()
            with RECORDERS[name](keep, [model]) as kept:
                for _ in range(steps):
                    step()
            assert kept.path is not None
            data = kept.path.read_bytes()
        rows[name] = {
            "entries_per_step": kept.entries / steps,
            "per_entry": len(data) / kept.entries,
            "per_entry_gzip": len(gzip.compress(data, 1)) / kept.entries,
            "per_entry_zstd": zstd_bytes(data) / kept.entries,
            "per_event": len(data) / steps / events,
        }
    return {"events_per_step": events, "steps": steps, "rows": rows}


def zstd_bytes(data: bytes) -> int:
    import polars as pl

    with tempfile.NamedTemporaryFile() as file:
        pl.DataFrame({"data": [data]}).write_ipc(file.name, compression="zstd")
        return Path(file.name).stat().st_size


def measure_start(*, modules: int, rounds: int) -> dict[str, Any]:
    """Measure starting and stopping a recording of a model of many modules, and what a module's hooks cost a call."""
    model = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(modules)))
    tensor = torch.zeros(1)
    timings = {BARE: Timing(), NATIVE: Timing(), SCOPED: Timing()}
    for _ in range(rounds):
        for name, timing in timings.items():
            run_steps(RECORDERS[name], model, lambda: model(tensor), 5, timing)
    hooks = min(timings[SCOPED].fastest(), *map(int, timings[SCOPED].medians())) - timings[NATIVE].fastest()
    return {
        "modules": modules,
        "start_ms": statistics.median(timings[NATIVE].start_ns) / 1e6,
        "stop_ms": statistics.median(timings[NATIVE].stop_ns) / 1e6,
        "start_scoped_ms": statistics.median(timings[SCOPED].start_ns) / 1e6,
        "stop_scoped_ms": statistics.median(timings[SCOPED].stop_ns) / 1e6,
        "us_per_module_call": hooks / 1e3 / (modules + 1),
    }


# Telling.


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), *map(line, rows)])


def tell(results: dict[str, Any]) -> str:
    parts = []
    if cost := results.get("cost"):
        parts.append(
            f"Small operators: {cost['events_per_step']} events a step, "
            f"{cost['rounds']} rounds of {cost['steps']} steps; µs added"
        )
        head = ["", "step, min", "per event, min", "median", "per operator", "start ms", "stop ms"]
        parts.append(
            table(
                head,
                [
                    [
                        name,
                        f"{row['step_us_min']:.0f}",
                        f"{row['us_per_event_min']:.3f}",
                        f"{row['us_per_event_median']:.3f}",
                        f"{row['us_per_entry_median']:.2f}" if row["us_per_entry_median"] else "",
                        f"{row['start_ms']:.2f}",
                        f"{row['stop_ms']:.2f}",
                    ]
                    for name, row in cost["rows"].items()
                ],
            )
        )
    if real := results.get("realistic"):
        parts.append(
            f"\nRealistic matrices: {real['events_per_step']} events a step of {real['step_ms_min']:.0f} ms "
            f"(median {real['step_ms_median']:.0f}), {real['rounds']} pairs; % added"
        )
        parts.append(
            table(
                ["", "min", "median", "quartiles"],
                [
                    [
                        name,
                        f"{row['percent_min']:+.2f}",
                        f"{row['percent_median']:+.2f}",
                        " to ".join(f"{value:+.2f}" for value in row["percent_quartiles"]),
                    ]
                    for name, row in real["rows"].items()
                ],
            )
        )
    if size := results.get("bytes"):
        parts.append(f"\nBytes on disk, {size['steps']} steps")
        parts.append(
            table(
                ["", "operators a step", "per operator", "gzip -1", "zstd", "per event"],
                [
                    [
                        name,
                        f"{row['entries_per_step']:.0f}",
                        *(f"{row[key]:.1f}" for key in ("per_entry", "per_entry_gzip", "per_entry_zstd", "per_event")),
                    ]
                    for name, row in size["rows"].items()
                ],
            )
        )
    if start := results.get("start"):
        parts.append(
            f"\n{start['modules']} modules watched: start {start['start_scoped_ms']:.1f} ms (none watched "
            f"{start['start_ms']:.1f}), stop {start['stop_scoped_ms']:.1f} ms ({start['stop_ms']:.1f}), "
            f"{start['us_per_module_call']:.2f} µs a module call"
        )
    return "\n".join(parts)


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
        at_most("% of a realistic step (median)", real["rows"][SCOPED]["percent_median"], TARGETS["realistic_percent"], "%")
    if size := results.get("bytes"):
        at_most("bytes per operator", size["rows"][NATIVE]["per_entry"], TARGETS["raw_bytes"], "B")
        at_most("  compressed (gzip -1)", size["rows"][NATIVE]["per_entry_gzip"], TARGETS["compressed_bytes"], "B")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: half a minute")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--only", action="append", choices=["cost", "realistic", "bytes", "start"], help="measure this")
    options = parser.parse_args()
    quick = options.quick
    wanted = options.only or ["cost", "realistic", "bytes", "start"]
    results: dict[str, Any] = {}
    if "cost" in wanted:
        results["cost"] = measure_cost(rounds=8 if quick else 30, steps=40)
    if "start" in wanted:
        results["start"] = measure_start(modules=3000, rounds=3 if quick else 10)
    if "bytes" in wanted:
        results["bytes"] = measure_bytes(steps=100)
    if "realistic" in wanted:
        results["realistic"] = measure_realistic(rounds=4 if quick else 15)
    targets = judge(results)
    if options.json:
        print(json.dumps(results | {"targets": targets}, indent=1))
        return
    print(tell(results))
    print("\nTargets")
    print(table(["", "measured", "wanted", ""], [[w, f"{v:.3g}", x, "met" if ok else "MISSED"] for w, v, x, ok in targets]))


if __name__ == "__main__":
    main()
