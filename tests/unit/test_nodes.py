"""Ranks over nodes, what torchrun is told, and whether a machine can take its ranks."""

from __future__ import annotations

import pytest
import torch

from truedag.launch.deployment_file import load_deployment
from truedag.launch.device import check_device, check_memory
from truedag.launch.errors import LaunchError
from truedag.launch.nodes import TorchrunOptions, place_ranks

TWO = TorchrunOptions(nnodes="2", node_rank=1, rdzv_endpoint="host:29500")


def test_without_options_all_ranks_run_here() -> None:
    nodes = place_ranks(TorchrunOptions(), 8)
    assert (nodes.num_nodes, nodes.node, nodes.ranks_per_node) == (1, 0, 8)
    assert nodes.torchrun_arguments() == ["--standalone", "--nproc-per-node=8"]


def test_several_nodes_share_the_ranks_and_options_pass_through() -> None:
    nodes = place_ranks(TWO, 8)
    assert nodes.torchrun_arguments() == [
        "--nnodes=2",
        "--nproc-per-node=4",
        "--node-rank=1",
        "--rdzv-endpoint=host:29500",
    ]


def test_all_rendezvous_options_pass_through() -> None:
    options = TorchrunOptions(
        nnodes="2", node_rank=0, rdzv_backend="c10d", rdzv_endpoint="host", rdzv_id="7", rdzv_conf="timeout=9",
        local_addr="me", nproc_per_node=1,
    )  # fmt: skip
    assert place_ranks(options, 2).torchrun_arguments()[2:] == [
        "--rdzv-backend=c10d", "--rdzv-endpoint=host", "--rdzv-id=7", "--rdzv-conf=timeout=9", "--local-addr=me",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "world_size", "expected"),
    [
        (TorchrunOptions(nnodes="3"), 8, "--nnodes 3: the deployment has 8 ranks, .* --nnodes 2 --nproc-per-node 4"),
        (TorchrunOptions(nproc_per_node=4), 8, "nearest: --nnodes 2 --nproc-per-node 4"),
        (TorchrunOptions(nnodes="2", nproc_per_node=8), 8, "nearest: --nnodes 1 --nproc-per-node 8"),
        (TorchrunOptions(nproc_per_node=0), 8, "--nproc-per-node 0: give a number from 1"),
        (TorchrunOptions(nnodes="1:4"), 8, "--nnodes 1:4: a deployment has a fixed number"),
        (TorchrunOptions(nnodes="2", node_rank=0), 8, "--rdzv-endpoint HOST:PORT"),
        (TorchrunOptions(nnodes="2", rdzv_endpoint="h:1"), 8, "--node-rank 0 to --node-rank 1"),
        (TorchrunOptions(nnodes="2", node_rank=2, rdzv_endpoint="h:1"), 8, "--node-rank 2: with --nnodes 2 it is 0"),
        (TorchrunOptions(rdzv_backend="c10d"), 8, "needs an address"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(options: TorchrunOptions, world_size: int, expected: str) -> None:
    with pytest.raises(LaunchError, match=expected):
        place_ranks(options, world_size)


@pytest.mark.parametrize(
    ("options", "endpoint"),
    [
        (TWO, "--rdzv-endpoint host:29500"),
        (TorchrunOptions(nnodes="2", node_rank=0, master_addr="host"), "--master-addr host"),
        (TorchrunOptions(nnodes="2", node_rank=0, master_addr="h", master_port=7), "--master-addr h --master-port 7"),
        (TorchrunOptions(), None),
    ],
)
def test_where_the_nodes_meet_is_named_as_it_was_given(options: TorchrunOptions, endpoint: str | None) -> None:
    assert place_ranks(options, 8).endpoint == endpoint


def test_ranks_that_cannot_fit_into_memory_are_refused_with_what_can() -> None:
    check_memory(place_ranks(TorchrunOptions(), 8), 3_200_000_000)
    said = (
        "2048 ranks need about 819.2 GB of memory on this node, 0.4 GB each, and 24.0 GB are available: "
        "choose a strategy of at most 60 ranks, or several machines: --nnodes 64 with 32 on each"
    )
    with pytest.raises(LaunchError, match=said):
        check_memory(place_ranks(TorchrunOptions(), 2048), 24_000_000_000)
    with pytest.raises(LaunchError, match="at most 3 ranks, or several machines: --nnodes 4 with 2 on each"):
        check_memory(place_ranks(TWO, 8), 1_500_000_000)
    with pytest.raises(LaunchError, match=r"1 rank needs about 0\.4 GB .*: free some memory"):
        check_memory(place_ranks(TorchrunOptions(), 1), 100_000_000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so it is not refused")
@pytest.mark.parametrize(
    ("name", "overrides", "choice"),
    [
        ("llama3-70b-tp2-pp4", [], "On the CPU: truedag run llama3-70b-tp2-pp4-cpu; for a cluster"),
        ("moe-10b-tp2-ep2-pp2-cpu", ["backend={name: nccl}"], "On the CPU: backend='{name: gloo}'; for a cluster"),
    ],
)
def test_without_a_gpu_the_deployment_for_the_cpu_is_named(name: str, overrides: list[str], choice: str) -> None:
    _, deployment = load_deployment(name, overrides)
    with pytest.raises(LaunchError, match=choice):
        check_device(deployment, place_ranks(TorchrunOptions(), deployment.world_size))
