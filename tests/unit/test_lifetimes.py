"""What a program has in memory, by lifetime: with memory and without it, and as the allocator counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from truedag.tracer import annotate
from truedag.tracer.dry.recording import record_dry
from truedag.tracer.merge.lifetimes import measure_memory
from truedag.tracer.merge.nodes import extract_nodes
from truedag.tracer.merge.places import find_memory
from truedag.tracer.record.recording import record
from truedag.tracer.record.trace import read_trace

DEVICES = ("cpu", "meta")
Program = Callable[[str], Any]


def measured(program: Program, device: str, folder: Path) -> dict[str, Any]:
    """Record what a program does after it said `yield`, on a device; return its memory."""
    path = folder / f"{len(list(folder.iterdir()))}-{device}.trace"
    running = program(device)
    next(running)
    with record_dry(path) if device == "meta" else record(path, synchronize=False) as recording:
        for _ in running:
            pass
    assert recording.switched_off == ""
    memory = measure_memory(extract_nodes(read_trace(path)))
    assert memory is not None
    return memory


def row(what: str, op: str | None, num_bytes: int) -> dict[str, Any]:
    """One storage that is alive."""
    return {"what": what, "op": op, "layers": [], "num": 1, "bytes": num_bytes}


def chain(device: str) -> Any:
    yield
    first = torch.zeros(1000, device=device)  # 4,000 bytes
    second = first.double()  # 8,000
    del first
    third = second + 1
    del second
    fourth = third.view(10, 100).sum(0)  # 800; a view is no memory of its own
    del third
    fourth.mul_(2)
    yield


def lie_where_others_lay(device: str) -> Any:
    """Storages of other sizes at one address: each second one under a tensor that lies elsewhere."""
    other = torch.zeros(4, device=device)
    yield
    for _ in range(300):
        small = torch.zeros(3, device=device)
        del small
        between = other.data  # takes the small one's object, and no operator makes it
        large = torch.zeros(5, device=device)
        del large, between
    yield


@pytest.mark.parametrize("device", DEVICES)
def test_a_storage_that_lies_where_another_lay_has_its_own_size(device: str, tmp_path: Path) -> None:
    measured(lie_where_others_lay, device, tmp_path)
    (path,) = tmp_path.iterdir()
    trace = read_trace(path)
    (thread,) = trace.threads
    zeros = [number for number, op in trace.ops.items() if op["name"] == "aten::zeros"]
    events = np.flatnonzero(np.isin(thread.events["op"], zeros))
    assert len(events) == 600
    made = thread.events["first_ref"][events].astype(np.int64) + thread.events["num_inputs"][events]
    _, num_bytes = find_memory(trace, thread, made, events)
    sizes = [trace.layouts[int(number)].num_bytes for number in thread.refs["layout"][made]]
    assert num_bytes.tolist() == sizes


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_given_back_is_not_there_any_more(device: str, tmp_path: Path) -> None:
    memory = measured(chain, device, tmp_path)
    assert (memory["peak_bytes"], memory["activation_bytes"], memory["peak_op"]) == (16_000, 16_000, "aten::add")
    assert memory["alive"] == [row("no module", "aten::_to_copy", 8_000), row("no module", "aten::add", 8_000)]


def with_names(device: str) -> Any:
    weight = torch.ones(100, device=device)
    unused, other, given_back = (torch.ones(size, device=device) for size in (50, 25, 10))
    yield
    annotate.tensor(weight, "weight", role="parameter")
    annotate.tensor(unused, "moment", role="state")
    given_back.mul_(2)
    del given_back
    weight.mul_(other[0])
    other.add_(torch.ones(200, device=device).sum())
    yield


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_there_counts_by_its_role_used_or_not_until_it_is_given_back(device: str, tmp_path: Path) -> None:
    memory = measured(with_names, device, tmp_path)
    assert (memory["parameter_bytes"], memory["state_bytes"]) == (400, 200)
    assert memory["peak_bytes"] == 400 + 200 + 100 + 800 + 4  # without the 40 that were given back
    assert memory["alive"] == [
        row("no module", "aten::ones", 800),
        row("parameter", None, 400),
        row("state", None, 200),
        row("before", None, 100),
        row("no module", "aten::sum", 4),
    ]


def training(device: str) -> Any:
    layers = [torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64), torch.nn.LayerNorm(64)]
    model = torch.nn.Sequential(*layers, *[torch.nn.Linear(64, 64) for _ in range(3)]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    batch = torch.ones(128, 64, device=device)
    for step in range(2):
        if step:
            yield
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    yield


def test_a_program_without_memory_has_what_it_has_with_it(tmp_path: Path) -> None:
    real, dry = (measured(training, device, tmp_path) for device in DEVICES)
    assert real == dry


def test_the_peak_is_what_the_allocator_counts(tmp_path: Path) -> None:
    memory = measured(training, "cpu", tmp_path)
    running = training("cpu")
    next(running)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in running:
            pass
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    before = sum(row["bytes"] for row in memory["alive"] if row["what"] == "before")
    assert most > 100_000
    assert memory["peak_bytes"] - before == pytest.approx(most, rel=0.05)


def test_a_program_that_did_nothing_had_nothing(tmp_path: Path) -> None:
    def nothing(_: str) -> Any:
        yield

    memory = measured(nothing, "cpu", tmp_path)
    assert (memory["peak_bytes"], memory["peak_node"], memory["alive"]) == (0, -1, [])
