"""Frees: when memory was given back is recorded, on whichever thread, and nothing else changes for the memory."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import torch

from truedag.tracer.record.recording import record
from truedag.tracer.record.trace import Trace, read_trace


def addresses(trace: Trace) -> dict[int, int]:
    """When each address was given back last."""
    return {int(free["address"]): int(free["time_ns"]) for thread in trace.threads for free in thread.frees}


def test_a_free_lies_between_the_last_use_and_the_next(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.trace"
    with record(path, synchronize=False):
        first = torch.ones(1000)
        address = first.data_ptr()
        used = first.sum()
        del first
        used.mul_(2)
    trace = read_trace(path)
    (thread,) = [thread for thread in trace.threads if len(thread.events)]
    names = [trace.ops[int(op)]["name"] for op in thread.events["op"]]
    freed = addresses(trace)[address]
    assert thread.events["end_ns"][names.index("aten::sum")] <= freed
    assert freed <= thread.events["start_ns"][names.index("aten::mul_")]


def test_memory_is_given_back_on_another_thread_and_after_the_recording(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.trace"
    kept: list[torch.Tensor] = []
    with record(path, synchronize=False):
        kept.append(torch.ones(500))
        address = kept[0].data_ptr()
        later = torch.ones(700)
        thread = threading.Thread(target=kept.clear)
        thread.start()
        thread.join()
    freed = addresses(read_trace(path))
    assert address in freed
    assert later.data_ptr() not in freed
    value = later.sum().item()
    del later
    gc.collect()
    assert value == 700.0


def test_memory_moves_as_it_does_unrecorded(tmp_path: Path) -> None:
    def shares() -> tuple[bool, int, bool, list[float]]:
        tensor = torch.arange(6.0)
        grown = torch.arange(4.0)
        grown.resize_(1000)
        array = tensor.numpy()
        shared = torch.arange(3.0).share_memory_()
        clone = torch._lazy_clone(tensor)
        clone.add_(1)
        return shared.is_shared(), grown.untyped_storage().nbytes(), array[1] == 1.0, clone.tolist() + tensor.tolist()

    plain = shares()
    with record(tmp_path / "rank-00000.trace", synchronize=False):
        recorded = shares()
    assert recorded == plain
