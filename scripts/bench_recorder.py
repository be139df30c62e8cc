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
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_peers import (
    BARE,
    ETO,
    FLOOR,
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
from bench_programs import measure_programs
from bench_tables import align, judge, tell

Step = Callable[[], None]
_SWEEP_BYTES = 8 << 20


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
    """Return how many events the dispatcher and autograd announce in a step."""
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
        """Return the nanoseconds of the fastest step."""
        return min(min(steps) for steps in self.rounds)

    def medians(self) -> list[float]:
        """Return the median step of each round, in nanoseconds."""
        return [statistics.median(steps) for steps in self.rounds]


def run_steps(
    recorder: Recorder,
    model: torch.nn.Module,
    step: Step,
    num_steps: int,
    timing: Timing,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> None:
    """Run a round of steps under a recorder; the steps are timed by `clock`."""
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
    """Run rounds of steps under all recorders; those that are slow by themselves have fewer steps a round."""
    for recorder in recorders.values():
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
                run_steps(recorder, model, step, 1, timing, clock=time.process_time_ns)
                gc.collect()
    gc.enable()
    every = [steps[0] for timing in bare.values() for steps in timing.rounds]
    rows = {}
    for name in names:
        ratios = [
            100 * (mine[0] / other[0] - 1) for mine, other in zip(timings[name].rounds, bare[name].rounds, strict=True)
        ]
        lower, _, upper = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "percent_min": 100 * (timings[name].fastest() / min(every) - 1),
            "percent_median": statistics.median(ratios),
            "percent_lower": lower,
            "percent_upper": upper,
        }
    return {"events_per_step": events, "step_ms_min": min(every) / 1e6, "rounds": rounds, "rows": rows}


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
            "per_entry": kept.used_bytes / kept.entries,
            "per_entry_file": len(data) / kept.entries,
            "per_entry_gzip": len(gzip.compress(data, 1)) / kept.entries,
            "per_entry_zstd": zstd_bytes(data) / kept.entries,
            "per_event": kept.used_bytes / steps / events,
        }
    return {"events_per_step": events, "steps": steps, "rows": rows}


def zstd_bytes(data: bytes) -> int:
    """Return the size when compressed by zstd, which Python has not of itself and Polars has."""
    import polars as pl

    with tempfile.NamedTemporaryFile() as file:
        pl.DataFrame({"data": [data]}).write_ipc(file.name, compression="zstd")
        return Path(file.name).stat().st_size


class Cell(torch.nn.Module):
    """A module of four small operators."""

    def forward(self, a_SS: torch.Tensor, b_SS: torch.Tensor) -> torch.Tensor:
        """Return a scalar."""
        return (torch.add(a_SS, b_SS) * b_SS).sum().neg()


def measure_cold(*, rounds: int) -> dict[str, Any]:
    """Measure a module call of four small operators when the caches hold the program's matrices, and when they do not.

    Between large operators a recorder finds nothing of its own in the caches: what it touches is what it costs.
    """
    model = Cell()
    a_SS, b_SS = torch.randn(8, 8), torch.randn(8, 8)
    source, target = np.zeros(_SWEEP_BYTES, np.uint8), np.zeros(_SWEEP_BYTES, np.uint8)
    events = count_events(lambda: model(a_SS, b_SS))
    names = (BARE, "observer, empty", FLOOR, NATIVE, SCOPED, KINETO, KINETO_SHAPES)
    taken: dict[tuple[str, str], list[int]] = {(name, state): [] for name in names for state in ("hot", "cold")}
    shuffled = random.Random(0)
    gc.disable()
    for _ in range(rounds):
        for name in shuffled.sample(names, len(names)):
            gc.collect()
            with tempfile.TemporaryDirectory() as folder, RECORDERS[name](Path(folder), [model]):
                for state in ("hot", "cold"):
                    for _ in range(100):
                        if state == "cold":
                            np.copyto(target, source)
                        start = time.perf_counter_ns()
                        model(a_SS, b_SS)
                        taken[name, state].append(time.perf_counter_ns() - start)
    gc.enable()
    medians = {key: statistics.median(values) / 1e3 for key, values in taken.items()}
    rows = {
        name: {f"{state}_us": medians[name, state] - medians[BARE, state] for state in ("hot", "cold")}
        for name in names
        if name != BARE
    }
    return {"events": events, "hot_us": medians[BARE, "hot"], "cold_us": medians[BARE, "cold"], "rows": rows}


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


def measure_demo(*, deployment: str, rounds: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Measure training steps of a deployment on ranks of this machine; see bench_ranks.py."""
    from truedag.launch.deployment_file import load_deployment

    _, loaded = load_deployment(deployment, overrides)
    load_floor_observer()  # compiled before the ranks ask for it
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={loaded.world_size}",
        ]
        command += [str(Path(__file__).with_name("bench_ranks.py")), deployment, str(rounds), str(out), *overrides]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"the ranks failed:\n{done.stderr}")
        told: dict[str, Any] = json.loads(out.read_text())
    return told | {"rows": {name: compare_ranks(row) for name, row in told["rows"].items()}}


def compare_ranks(own: Mapping[str, list[float]]) -> dict[str, float]:
    """Compare steps with the bare ones on both sides of them."""
    told = {what: statistics.median(own[what]) for what in ("start", "stop", "operators", "faults")}
    for what in ("step", "cpu"):
        for when in ("new", "running"):
            mine = own[f"{what} {when}"]
            ratios = [100 * (a / b - 1) for a, b in zip(mine, own[f"{what} beside"], strict=True)]
            told[f"{what} {when}"] = statistics.median(mine)
            told[f"{what} {when}, min"] = min(mine)
            told[f"{what} {when}, %"] = statistics.median(ratios)
    return told


def main() -> None:
    """Measure what is asked for, and print it."""
    sections = ("cost", "cold", "start", "bytes", "realistic")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a minute instead of four")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--only", action="append", choices=sections, help="this section alone; may be repeated")
    parser.add_argument("--demo", action="store_true", help="the demo's training step on its ranks too: minutes")
    parser.add_argument("--deployment", default="moe-10b-tp2-ep2-pp2-cpu", help="another deployment for --demo")
    parser.add_argument("--rounds", type=int, help="other than 6 rounds of --demo")
    parser.add_argument("--programs", action="store_true", help="the programs of tests/programs too: minutes")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the deployment")
    options = parser.parse_args()
    quick = options.quick
    torch.set_num_threads(1)
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "cost": lambda: measure_cost(rounds=8 if quick else 40, steps=40),
        "cold": lambda: measure_cold(rounds=4 if quick else 20),
        "start": lambda: measure_start(modules=3000, rounds=3 if quick else 10),
        "bytes": lambda: measure_bytes(steps=100 if quick else 400),
        "realistic": lambda: measure_realistic(rounds=4 if quick else 20),
        "demo": lambda: measure_demo(
            deployment=options.deployment,
            rounds=options.rounds or (2 if quick else 6),
            overrides=options.overrides,
        ),
        "programs": lambda: measure_programs(rounds=3 if quick else 9),
    }
    wanted = options.only or ([] if options.demo or options.programs else sections)
    wanted = [*wanted, *(name for name in ("demo", "programs") if getattr(options, name))]
    results = {name: measures[name]() for name in wanted}
    targets = judge(results)
    if options.json:
        print(json.dumps(results | {"targets": targets}, indent=1))
        return
    print(tell(results))
    if targets:
        rows = [[what, f"{value:.3g}", limit, "met" if met else "MISSED"] for what, value, limit, met in targets]
        print(f"\n{align([['Targets', 'measured', 'wanted', ''], *rows])}")


if __name__ == "__main__":
    main()
