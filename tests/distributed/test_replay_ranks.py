"""Training on two gloo ranks is executed again from its graph alone, communications and all, bitwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron_ranks import run_ranks
from torch import distributed as dist
from torch import nn

from truedag.tracer import annotate
from truedag.tracer.graph import Graph
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.record.recording import record
from truedag.tracer.replay.proof import Proof, prove


class SumOverRanks(torch.autograd.Function):
    """What a row-parallel layer does with its partial results; the gradient is everybody's."""

    @staticmethod
    def forward(_: object, partial: torch.Tensor) -> torch.Tensor:
        whole = partial.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(_: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def tensor_parallel_step(kept: list[torch.Tensor]) -> None:
    """A column-parallel and a row-parallel layer, SGD with momentum; the ranks hold one half of the weights each."""
    torch.manual_seed(dist.get_rank())
    up, down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
    parameters = [*up.parameters(), *down.parameters()]
    for number, parameter in enumerate(parameters):
        annotate.tensor(parameter, f"parameter {number}", role="parameter")
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True)
    torch.manual_seed(7)
    for _ in range(2):
        data = torch.randn(4, 8)
        loss = (SumOverRanks.apply(down(torch.relu(up(data)))) - data).square().mean()
        annotate.tensor(loss, "loss", role="output")
        kept.append(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    kept.extend(parameters)


def sharded_step(kept: list[torch.Tensor]) -> None:
    """Data parallel with flat gradients and a sharded optimizer, then tokens and activations that change ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3)
    weight = nn.Parameter(torch.randn(6, 8))
    annotate.tensor(weight, "weight", role="parameter")
    torch.manual_seed(10 + rank)
    loss = (torch.randn(5, 6) @ weight).tanh().square().mean()
    loss.backward()
    assert weight.grad is not None
    shard = torch.empty(weight.numel() // size)
    dist.reduce_scatter_tensor(shard, weight.grad.view(-1))
    mine = weight.detach().view(-1)[rank * len(shard) : (rank + 1) * len(shard)]
    mine.sub_(shard, alpha=0.1 / size)
    dist.all_gather_into_tensor(weight.detach().view(-1), mine.clone())
    worst = loss.detach().clone()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    tokens = torch.randn(4, 3)
    received = torch.empty(4, 3)
    dist.all_to_all_single(received, tokens)
    first = received[0].clone()
    dist.broadcast(first, 1)
    passed = torch.zeros(3)
    if rank == 0:
        dist.send(first * 2, 1)
    else:
        dist.recv(passed, 0)
    reduced = loss.detach().clone()
    dist.reduce(reduced, 1)  # on rank 0 gloo leaves in it what is read below
    kept.extend([weight, received + first + passed + reduced, worst * 2])
    for tensor, name in zip(kept[-2:], ("mixed", "worst"), strict=True):
        annotate.tensor(tensor, name, role="output")


STEPS = {"tensor parallel": tensor_parallel_step, "sharded": sharded_step}


def record_step(folder: Path, name: str) -> bool:
    kept: list[torch.Tensor] = []
    path = folder / f"rank-{dist.get_rank():05d}.trace"
    with record(path, recorder="python", arguments=True) as recording:
        STEPS[name](kept)
    assert recording.switched_off == ""
    return len(kept) > 0


def prove_step(folder: Path, name: str, **counts: int) -> Proof:
    traces = folder / "traces"
    traces.mkdir()
    assert run_ranks(2, record_step, traces, name, timeout_s=120) == [True, True]
    merge_traces(traces, folder / "dag")
    return prove(Graph.open(folder / "dag"), traces, **counts)


@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("tensor parallel", {"loss", "parameter 0", "parameter 1", "parameter 2"}),
        ("sharded", {"weight", "mixed", "worst"}),
    ],
)
def test_two_ranks_are_executed_again_from_their_graph(name: str, results: set[str], tmp_path: Path) -> None:
    proof = prove_step(tmp_path, name, num_orders=10, num_removals=40)
    assert proof.first_failure == ""
    assert proof.is_proven
    assert not proof.unspecified
    assert set(proof.results) == results
    assert sum(removal.is_noticed for removal in proof.removals) > 20
    assert any(removal.dst_op.startswith("c10d::") and removal.is_noticed for removal in proof.removals)
