"""Messages that go through the host, on real gloo ranks: here all do, and those of a GPU do where there is one."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from megatron_ranks import run_ranks
from torch import distributed
from torch.distributed import P2POp

from truedag.parallel.host_messages import on_gpu, through_host

Told = dict[str, object]


def exchange() -> Told:
    """Rank 0 sends a tensor that is not contiguous, both swap in a batch, and rank 1 sends one to whoever asks."""
    from truedag.parallel.cpu import replace  # with megatron-core, which only the ranks import

    rank = distributed.get_rank()
    told: Told = {}
    originals = (distributed.isend, distributed.irecv)
    with ExitStack() as installed:
        replace(installed, through_host(lambda _: True))
        tensor_SB = torch.arange(6.0).reshape(2, 3).T if rank == 0 else torch.zeros(3, 2)
        tensor_SB.requires_grad_()
        if rank == 0:
            distributed.send(tensor_SB, 1)
        else:
            work = distributed.irecv(tensor_SB, 0)
            told["before"], told["is_completed before"] = tensor_SB.tolist(), work.is_completed()
            work.wait()
            told["is_completed"] = work.is_completed()
        told["sent"] = tensor_SB.tolist()

        mine, other = torch.full((2,), float(rank)), torch.empty(2)
        ops = [P2POp(distributed.isend, mine, 1 - rank), P2POp(distributed.irecv, other, 1 - rank)]
        for work in distributed.batch_isend_irecv(ops):
            work.wait()
        told["swapped"] = other.tolist()

        if rank == 1:
            distributed.send(mine, 0)
        else:
            told["from"] = distributed.recv(mine)
            told["from anyone"] = mine.tolist()
    told["is undone"] = (distributed.isend, distributed.irecv) == originals
    return told


def test_messages_through_the_host_arrive_when_they_are_waited_for() -> None:
    first, second = run_ranks(2, exchange, timeout_s=60)
    wanted = [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert (first["sent"], second["sent"]) == (wanted, wanted)
    assert (second["before"], second["is_completed before"]) == ([[0.0, 0.0]] * 3, False)
    assert second["is_completed"] is True
    assert (first["swapped"], second["swapped"]) == ([1.0, 1.0], [0.0, 0.0])
    assert (first["from"], first["from anyone"]) == (1, [1.0, 1.0])
    assert (first["is undone"], second["is undone"]) == (True, True)


def test_tensors_of_the_host_are_sent_as_they_are() -> None:
    assert not on_gpu(torch.ones(1))
