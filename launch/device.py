"""What a rank computes on, and whether this machine has it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from truedag.launch.deployment import Backend
from truedag.launch.errors import LaunchError

if TYPE_CHECKING:
    import torch

# NCCL's own watchdog ends the process without a word about who is missing: ours comes first by this much.
NCCL_MARGIN_S = 20.0


def check_device(backend: Backend, num_local_ranks: int) -> None:
    """Look whether `num_local_ranks` ranks can run on this machine as the backend says.

    Raises:
        LaunchError: torch has no CUDA or NCCL, or there are too few GPUs.
    """
    if backend.device == "cpu":
        return
    import torch
    from torch import distributed

    if not torch.cuda.is_available():
        built = "torch finds no GPU here" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
        raise LaunchError(
            f"backend.device=cuda: {built}. On the CPU: backend='{{name: gloo}}'; for a cluster, "
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
