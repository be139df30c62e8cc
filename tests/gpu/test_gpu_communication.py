"""NCCL with one rank, and gloo with several ranks that share one GPU. Needs a GPU.

NCCL refuses two ranks on one GPU. With one rank its calls, streams, works and waits are those of many; where nothing
need be moved it launches no kernel, and copies instead.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import torch
import torch.distributed as dist
from gpu_programs import Block, Program, training, transformer
from torch import multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from truedag.tracer.graph import Graph
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.record.recording import record

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # other versions of PyTorch and of NCCL say other things
]

NUM_RANKS = 4


@pytest.fixture(scope="module")
def nccl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    store = f"file://{tmp_path_factory.mktemp('nccl') / 'store'}"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=device)
    yield
    dist.destroy_process_group()


def graph_of(folder: Path, program: Program) -> Graph:
    """Record a program on this rank, and merge."""
    with record(folder / "rank-00000.trace", synchronize=False) as recording:
        program()
    assert not recording.switched_off
    merge_traces(folder, folder / "dag")
    return Graph.open(folder / "dag")


def collectives(graph: Graph) -> Counter[str]:
    return Counter(graph.nodes.filter(pl.col("kind") == "collective").collect()["op"].to_list())


def assert_sound(graph: Graph) -> None:
    """Everything is joined, every kernel is some operator's, and who takes part arrives before it begins."""
    assert graph.meta["unmatched"] == []
    assert graph.meta["opaque"] == []
    parts = graph.participants.collect()
    assert len(parts)
    assert (parts["arrive_ns"] <= parts["start_ns"]).all()
    assert (parts["start_ns"] <= parts["end_ns"]).all()


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("async_op", [False, True], ids=["sync", "async"])
def test_every_collective(async_op: bool, tmp_path: Path) -> None:
    """Every collective of NCCL is one node, whether the program waits at once or later."""
    x = torch.randn(1 << 18, device="cuda")
    y, parts = torch.empty_like(x), [torch.empty_like(x)]

    def program() -> None:
        works = [
            dist.all_reduce(x, async_op=async_op),
            dist.broadcast(x, 0, async_op=async_op),
            dist.all_gather(parts, x, async_op=async_op),
            dist.all_gather_into_tensor(y, x, async_op=async_op),
            dist.reduce_scatter(y, [x], async_op=async_op),
            dist.reduce_scatter_tensor(y, x, async_op=async_op),
            dist.all_to_all_single(y, x, async_op=async_op),
            dist.all_to_all(parts, [x], async_op=async_op),
            dist.reduce(x, 0, async_op=async_op),
            dist.gather(x, parts, 0, async_op=async_op),
            dist.scatter(y, parts, 0, async_op=async_op),
            dist.barrier(async_op=async_op),
        ]
        for work in works:
            if work is not None:
                work.wait()
        y.sum().item()

    program()
    graph = graph_of(tmp_path, program)
    assert_sound(graph)
    found = collectives(graph)
    assert sum(found.values()) == 12
    assert {op for op, count in found.items() if count != 1} == set()


@pytest.mark.usefixtures("nccl")
def test_grouped_and_functional(tmp_path: Path) -> None:
    """Coalesced, functional and object collectives, and a batch of messages to oneself, are joined."""
    from torch.distributed import _functional_collectives as functional

    x, y = torch.randn(1 << 16, device="cuda"), torch.empty(1 << 16, device="cuda")

    def program() -> None:
        with dist._coalescing_manager(device=x.device, async_ops=True) as manager:
            dist.all_reduce(x)
            dist.all_reduce(y)
        manager.wait()
        (functional.all_reduce(x, "sum", dist.group.WORLD) + 1).sum()
        dist.all_gather_object([None], {"a": 1})
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, 0), dist.P2POp(dist.irecv, y, 0)]):
            work.wait()
        y.sum().item()

    program()
    graph = graph_of(tmp_path, program)
    assert graph.meta["unmatched"] == []
    kinds = Counter(graph.nodes.collect()["kind"].to_list())
    assert (kinds["send"], kinds["recv"]) == (1, 1)
    assert len(graph.edges.filter(pl.col("kind") == "p2p").collect()) == 1


@pytest.mark.usefixtures("nccl")
def test_data_parallel(tmp_path: Path) -> None:
    """DistributedDataParallel under NCCL: its buckets' all-reduces are in the graph, and every kernel has its node."""
    model = DistributedDataParallel(transformer("cuda"), device_ids=[0], bucket_cap_mb=1)
    graph = graph_of(tmp_path, training(model))
    assert_sound(graph)
    assert collectives(graph)["c10d::allreduce_"] > 2


@pytest.mark.usefixtures("nccl")
def test_fully_sharded(tmp_path: Path) -> None:
    """FSDP2 on one rank, where nothing need be gathered: its copies on streams of its own have their operators."""
    model = transformer("cuda")
    for block in model.children():
        assert isinstance(block, Block)
        fully_shard(block)
    graph = graph_of(tmp_path, training(fully_shard(model)))
    assert graph.meta["unmatched"] == []
    assert graph.meta["opaque"] == []
    assert graph.meta["num_kernels"] > 100


def _share_one_gpu(rank: int, folder: Path) -> None:
    """A rank of several on one GPU: a step under DDP, gradients reduced by gloo."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(NUM_RANKS), LOCAL_RANK="0")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=NUM_RANKS)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(64, 64).cuda())
    x = torch.randn(8, 64, device="cuda") + rank
    model(x).sum().backward()
    model.zero_grad()
    with record(folder / f"rank-{rank:05d}.trace"):
        model(x).sum().backward()
        dist.all_reduce(x)
        x.sum().item()
    dist.destroy_process_group()


def test_ranks_share_a_gpu(tmp_path: Path) -> None:
    """Several ranks share one GPU under gloo: their collectives are joined, their kernels are their operators'."""
    multiprocessing.spawn(_share_one_gpu, (tmp_path,), nprocs=NUM_RANKS)
    merge_traces(tmp_path, tmp_path / "dag")
    graph = Graph.open(tmp_path / "dag")
    assert graph.meta["unmatched"] == []
    assert collectives(graph)["c10d::allreduce_"] == 2
    kernels = graph.kernels.collect()
    assert sorted(kernels["rank"].unique().to_list()) == list(range(NUM_RANKS))
    assert set(graph.ranks.collect()["device"].to_list()) == {"cuda"}
