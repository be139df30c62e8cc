"""What a rank computes on, and whether this machine has it, and memory enough for all its ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from truedag.launch.deployment import Backend, Deployment
from truedag.launch.deployment_file import shipped_deployments
from truedag.launch.errors import LaunchError
from truedag.launch.nodes import Nodes

if TYPE_CHECKING:
    import torch

# NCCL's own watchdog ends the process without a word about who is missing: ours comes first by this much.
NCCL_MARGIN_S = 20.0
# A rough figure for a process that has loaded torch and holds a small model.
_RANK_BYTES = 400_000_000


def check_device(deployment: Deployment, nodes: Nodes) -> None:
    """Look whether this node's ranks can run on this machine as the deployment's backend says.

    Raises:
        LaunchError: torch has no CUDA or NCCL, there are too few GPUs, or on the CPU too little memory.
    """
    backend, num_local_ranks = deployment.backend, nodes.ranks_per_node
    if backend.device == "cpu":
        check_memory(nodes, _available_bytes())
        return
    import torch
    from torch import distributed

    if not torch.cuda.is_available():
        built = "torch finds no GPU here" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
        sibling = f"{deployment.name}-cpu"
        on_cpu = f"truedag run {sibling}" if sibling in shipped_deployments() else "backend='{name: gloo}'"
        raise LaunchError(
            f"backend.device=cuda: {built}. On the CPU: {on_cpu}; for a cluster, "
            "truedag run --print-command or --slurm prints what to start there"
        )
    if backend.name == "nccl" and not distributed.is_nccl_available():
        raise LaunchError(
            f"backend.name=nccl: torch {torch.__version__} is built without NCCL; use "
            "backend='{name: gloo, device: cuda}'"
        )
    available = torch.cuda.device_count()
    if backend.name == "nccl" and available < num_local_ranks:
        raise LaunchError(
            f"{num_local_ranks} ranks on this node need {num_local_ranks} GPUs under NCCL, there are {available}: "
            f"start {available} on a node (--nproc-per-node {available}, and --nnodes), or let ranks share GPUs with "
            "backend='{name: gloo, device: cuda}'"
        )


def check_memory(nodes: Nodes, available_bytes: int) -> None:
    """Look whether the processes of this node's ranks can fit into so much memory, whatever their model.

    Raises:
        LaunchError: they cannot; the message has how many can, and over how many nodes all can.
    """
    num_ranks = nodes.ranks_per_node
    if num_ranks * _RANK_BYTES <= available_bytes:
        return
    fitting, world_size = available_bytes // _RANK_BYTES, nodes.num_nodes * num_ranks
    counts = (number for number in range(1, world_size + 1) if world_size % number == 0)
    num_nodes = next((number for number in counts if world_size // number <= fitting), None)
    choice = (
        "free some memory"
        if num_nodes is None
        else f"choose a strategy of at most {fitting} {'rank' if fitting == 1 else 'ranks'}, or several machines: "
        f"--nnodes {num_nodes} with {world_size // num_nodes} on each"
    )
    raise LaunchError(
        f"{num_ranks} {'rank needs' if num_ranks == 1 else 'ranks need'} about {num_ranks * _RANK_BYTES / 1e9:.1f} GB "
        f"of memory on this node, {_RANK_BYTES / 1e9:g} GB each, and {available_bytes / 1e9:.1f} GB are "
        f"available: {choice}"
    )


def _available_bytes() -> int:
    """What new processes can have without swapping, as Linux estimates it; elsewhere all that is built in."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def take_device(backend: Backend) -> torch.device:
    """Make this rank's device the current one and return it. Local; LOCAL_RANK is as torchrun sets it."""
    import torch

    if backend.device == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ["LOCAL_RANK"])
    # Under NCCL a GPU has one rank; under gloo several may share one.
    index = local_rank % torch.cuda.device_count() if backend.name == "gloo" else local_rank
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device
