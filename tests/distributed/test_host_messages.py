"""Messages that go through the host, on real gloo ranks: here all do, and those of a GPU do where there is one."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import polars as pl
import torch
from megatron_ranks import run_ranks
from torch import distributed
from torch.distributed import P2POp

from truedag.parallel.host_messages import on_gpu, through_host
from truedag.tracer import annotate
from truedag.tracer.graph import Graph
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.record.recording import record

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


def pass_on(folder: Path) -> None:
    """Rank 0 sends what it made in a microbatch, outside of it; rank 1 receives it outside of every scope."""
    from truedag.parallel.cpu import replace

    rank = distributed.get_rank()
    with ExitStack() as installed:
        replace(installed, through_host(lambda _: True))
        tensor = torch.ones(4)
        with record(folder / f"rank-{rank:05d}.trace"):
            if rank == 0:
                with annotate.scope(microbatch=3, phase="forward"):
                    made = tensor * 2
                distributed.send(made, 1)
            else:
                distributed.recv(tensor, 0)
            tensor.clone().copy_(tensor)  # of no message


def test_a_message_and_its_copies_belong_to_the_microbatch_of_what_they_carry(tmp_path: Path) -> None:
    run_ranks(2, pass_on, tmp_path, timeout_s=60)
    merge_traces(tmp_path, tmp_path / "dag")
    nodes = Graph.open(tmp_path / "dag").nodes.filter(pl.col("kind").is_in(["compute", "send", "recv"])).collect()
    told = [(row["rank"], row["op"], row["microbatch"], row["phase"]) for row in nodes.sort("rank", "node").to_dicts()]
    carried = [(0, "aten::mul", 3, "forward"), (0, "aten::copy_", 3, "forward"), (0, "c10d::send", 3, "forward")]
    carried += [(1, "c10d::recv_", 3, "forward"), (1, "aten::copy_", 3, "forward")]
    rest = [(rank, op, -1, None) for rank in (0, 1) for op in ("aten::clone", "aten::copy_")]
    assert [row for row in told if row[1] != "aten::empty"] == sorted([*carried, *rest], key=lambda row: row[0])


def test_tensors_of_the_host_are_sent_as_they_are() -> None:
    assert not on_gpu(torch.ones(1))
