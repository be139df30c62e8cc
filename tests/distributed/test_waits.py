"""Waits: when the program waited for which communication, on real gloo ranks."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import polars as pl
import torch
from megatron_ranks import run_ranks
from torch import distributed
from torch.distributed import _functional_collectives as functional

from truedag.tracer.graph import Graph
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.record.recording import record
from truedag.tracer.record.trace import read_trace

DELAY_S = 0.3


def communicate(folder: Path) -> bool:
    rank = distributed.get_rank()
    before = distributed.Work.wait
    with record(folder / f"rank-{rank:05d}.trace") as recording:
        if rank == 1:
            time.sleep(DELAY_S)
        works = [distributed.all_reduce(torch.ones(4), async_op=True) for _ in range(2)]
        for work in reversed(works):
            work.wait()
        tensor = torch.ones(3)
        if rank == 0:
            distributed.recv(tensor, 1)
        else:
            time.sleep(DELAY_S)
            distributed.send(tensor, 0)
        gathered = functional.all_gather_single(tensor, 0, distributed.group.WORLD)
        gathered.sum()
    assert recording.switched_off == ""
    return distributed.Work.wait is before


def test_waits_name_their_communication_and_last_as_long(tmp_path: Path) -> None:
    assert run_ranks(2, communicate, tmp_path, timeout_s=60) == [True, True]
    trace = read_trace(tmp_path / "rank-00000.trace")
    (thread,) = [thread for thread in trace.threads if len(thread.events)]
    ops = [
        (trace.ops[int(event["op"])]["name"], int(thread.comms[event["comm"] - 1]["id"]))
        for event in thread.events
        if event["comm"]
    ]
    names = [name for name, _ in ops]
    assert names == ["c10d::allreduce_", "c10d::allreduce_", "c10d::recv_", "c10d::allgather_into_tensor_coalesced_"]
    waits = thread.waits
    first, second, receive, gather = (number for _, number in ops)
    assert waits["comm_id"].tolist() == [second, first, receive, gather]
    # Both ranks are of one machine, and of one clock: no wait is over before the other rank has begun its part.
    other = read_trace(tmp_path / "rank-00001.trace")
    (parts,) = [part for part in other.threads if len(part.events)]
    begun = parts.events["start_ns"][parts.events["comm"] > 0]
    assert (waits["end_ns"] >= begun[[1, 0, 2, 3]]).all()
    assert (np.diff(waits["start_ns"]) > 0).all()
    merge_traces(tmp_path, tmp_path / "dag")
    graph = Graph.open(tmp_path / "dag")
    mine = graph.participants.filter(pl.col("rank") == 0).join(graph.nodes.select("node", "op"), on="node")
    # By sequence number: which of two asynchronous works arrives first is the backend's business.
    told = mine.sort("op", "seq").collect()
    assert told["op"].to_list() == sorted(names)
    # The two all-reduces were waited for in the other order.
    assert told["waited_ns"].to_list() == (waits["end_ns"] - waits["start_ns"])[[3, 1, 0, 2]].tolist()
