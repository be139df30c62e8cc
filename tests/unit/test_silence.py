"""Inside PyTorch's own kernels nothing is observed; a program that does something there is heard all the same."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn

from truedag.tracer.record.recording import record
from truedag.tracer.record.trace import read_trace


def names(path: Path) -> list[str]:
    trace = read_trace(path)
    return [trace.ops[int(op)]["name"] for thread in trace.threads for op in thread.events["op"]]


def test_a_communication_in_a_hook_on_saved_tensors_is_recorded(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    norm, x = nn.LayerNorm(8), torch.ones(2, 8)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(torch.ones(1))
        return tensor

    try:
        with record(tmp_path / "a.trace", synchronize=False):
            for _ in range(3):
                norm(x)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                norm(x)
    finally:
        dist.destroy_process_group()
    assert "c10d::allreduce_" in names(tmp_path / "a.trace")


def test_a_profiler_of_the_programs_own_sees_what_it_would_see(tmp_path: Path) -> None:
    norm, x = nn.LayerNorm(8), torch.ones(2, 8)

    def profiled() -> list[str]:
        with torch.profiler.profile() as profiler:
            norm(x)
        return sorted(event.name for event in profiler.events() if event.name.startswith("aten::"))

    norm(x)
    alone = profiled()
    with record(tmp_path / "a.trace", synchronize=False):
        for _ in range(3):
            norm(x)
        recorded = profiled()
    assert len(alone) > 3
    assert recorded == alone
