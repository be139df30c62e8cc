"""Ranks over nodes, and what torchrun is told."""

from __future__ import annotations

import pytest

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
