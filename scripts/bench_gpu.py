"""What recording costs where a GPU computes: `python scripts/bench_gpu.py [--quick] [--json] [--device cpu]`.

As bench_recorder.py does, one process runs the same step under each recorder in turn, shuffled every round. A step
ends when the GPU has ended, and its time is the wall clock's. Small operators are bound by the host: what a recorder
adds to a launch is added to the step. A realistic step is bound by the GPU, and hides what the host does meanwhile.
Kernels cost a recorder time on the GPU's side too (CUPTI), so truedag stands here with kernels and without.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_peers import BARE, ETO, FLOOR, Kept, Recorder, execution_trace, nothing, observer
from bench_recorder import Step, Timing, added_ns, count_events, interleave
from bench_tables import align
from torch.profiler import ProfilerActivity, profile

from truedag.tracer.record.recording import record

OPERATORS, KERNELS = "truedag, operators", "truedag, operators and kernels"
KINETO_CUDA, KINETO_BOTH, KINETO_SHAPES = "Kineto, CUDA", "Kineto, CPU and CUDA", "Kineto, CPU and CUDA, shapes"


def truedag(*, kernels: bool) -> Recorder:
    """Return truedag's native recorder."""

    @contextmanager
    def observe(folder: Path, _models: Sequence[torch.nn.Module]) -> Iterator[Kept]:
        kept = Kept()
        with record(folder / "truedag.trace", synchronize=False, kernels=kernels) as recording:
            yield kept
        if recording.switched_off:
            raise SystemExit(f"truedag switched itself off: {recording.switched_off}")
        kept.entries = recording.num_events

    return observe


def kineto(*activities: ProfilerActivity, shapes: bool = False) -> Recorder:
    """Return PyTorch's profiler."""

    @contextmanager
    def observe(_folder: Path, _models: Sequence[torch.nn.Module]) -> Iterator[Kept]:
        with profile(activities=activities, record_shapes=shapes, acc_events=True):
            yield Kept()

    return observe


RECORDERS: Mapping[str, Recorder] = {
    BARE: nothing,
    FLOOR: observer(inputs=True, outputs=True),
    OPERATORS: truedag(kernels=False),
    KERNELS: truedag(kernels=True),
    KINETO_CUDA: kineto(ProfilerActivity.CUDA),
    KINETO_BOTH: kineto(ProfilerActivity.CPU, ProfilerActivity.CUDA),
    KINETO_SHAPES: kineto(ProfilerActivity.CPU, ProfilerActivity.CUDA, shapes=True),
    ETO: execution_trace,
}


def training_step(
    device: torch.device, dtype: torch.dtype, *, hidden: int, sequence: int, layers: int
) -> tuple[torch.nn.Module, Step]:
    """Return a transformer and its training step: forward, backward, fused AdamW, and the end of it all."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(hidden, max(hidden // 128, 2), 4 * hidden, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens_BSH = torch.randn(1, sequence, hidden, device=device, dtype=dtype)

    def step() -> None:
        model(tokens_BSH).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return model, step


def measure(model: torch.nn.Module, step: Step, *, rounds: int, steps: int) -> dict[str, Any]:
    """Measure what each recorder adds to a step."""
    for _ in range(5):
        step()
    events = count_events(step)
    recorders = RECORDERS if torch.cuda.is_available() else {k: v for k, v in RECORDERS.items() if k != KINETO_CUDA}
    timings: dict[str, Timing] = interleave(
        recorders, model, step, rounds=rounds, steps=steps, slow_steps=max(steps // 5, 2)
    )
    rows = {}
    for name, timing in timings.items():
        fastest, median = added_ns(timings, name)
        rows[name] = {
            "step_us_min": timing.fastest() / 1e3,
            "us_per_event_min": fastest / 1e3 / events,
            "us_per_event_median": median / 1e3 / events,
            "percent_min": 100 * fastest / timings[BARE].fastest(),
            "percent_median": 100 * median / statistics.median(timings[BARE].medians()),
        }
    return {"events_per_step": events, "rounds": rounds, "steps": steps, "rows": rows}


def tell(results: Mapping[str, Any]) -> str:
    """Return the measurements as text."""
    keys = {"step_us_min": "step, µs", "us_per_event_min": "event, min", "us_per_event_median": "event, median",
            "percent_min": "%, min", "percent_median": "%, median"}  # fmt: skip
    tables = []
    for name, found in results.items():
        if not isinstance(found, dict):
            continue
        head = f"{name}, {found['events_per_step']} events a step, {found['rounds']} rounds of {found['steps']} steps"
        rows = [[recorder, *(f"{row[key]:.2f}" for key in keys)] for recorder, row in found["rows"].items()]
        tables.append(
            f"{head}: µs a step, µs added to an event, % added to a step\n{align([['', *keys.values()], *rows])}"
        )
    return "\n\n".join([f"{results['device']}, torch {results['torch']}", *tables])


def main() -> None:
    """Measure, and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and a smaller realistic step")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--device", default="cuda", help="cpu: to try the script where there is no GPU")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no GPU here; bench_recorder.py measures the CPU")
    torch.set_num_threads(1)
    rounds = 4 if options.quick else 16
    width = 512 if options.quick else 4096
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "Small operators": lambda: measure(
            *training_step(device, torch.float32, hidden=16, sequence=4, layers=1), rounds=rounds, steps=40
        ),
        f"bfloat16, hidden {width}, sequence {width}": lambda: measure(
            *training_step(device, torch.bfloat16, hidden=width, sequence=width, layers=2), rounds=rounds, steps=5
        ),
    }
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    results = {"device": name, "torch": torch.__version__} | {what: run() for what, run in measures.items()}
    print(json.dumps(results, indent=1) if options.json else tell(results))


if __name__ == "__main__":
    main()
