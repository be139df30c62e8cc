"""What to start on a cluster: a command for each node, or one script for Slurm."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from truedag.launch.deployment import Deployment
from truedag.launch.errors import LaunchError
from truedag.launch.nodes import TorchrunOptions, divide_ranks

_PORT = 29500
_GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRun:
    """A run on a cluster that somebody else starts."""

    deployment: Deployment
    program: tuple[str, ...]
    """How `truedag` is called there."""

    arguments: tuple[str, ...]
    """Deployment, overrides, and options that have nothing to do with nodes."""

    out: str | None
    options: TorchrunOptions
    num_nodes: int
    ranks_per_node: int


def plan_cluster_run(
    deployment: Deployment,
    *,
    program: Sequence[str],
    arguments: Sequence[str],
    out: str | None,
    options: TorchrunOptions,
    gpus_per_node: int | None,
) -> ClusterRun:
    """Lay a deployment out over nodes: one process per GPU; without GPUs all on one node, unless said otherwise.

    Raises:
        LaunchError: the ranks cannot be laid out so; the message has the nearest numbers that can.
    """
    world_size = deployment.world_size
    if gpus_per_node is not None and options.nproc_per_node not in (None, gpus_per_node):
        raise LaunchError(
            f"--gpus-per-node {gpus_per_node} and --nproc-per-node {options.nproc_per_node}: one process runs on each "
            "GPU, so they are the same number; give one of them"
        )
    ranks_per_node = gpus_per_node if gpus_per_node is not None else options.nproc_per_node
    if ranks_per_node is None and options.nnodes is None:
        ranks_per_node = min(_GPUS_PER_NODE, world_size) if deployment.backend.device == "cuda" else world_size
    nnodes = options.nnodes
    if nnodes is None and ranks_per_node is not None:
        wanted = ranks_per_node
        if ranks_per_node < 1 or world_size % ranks_per_node:
            nearest = min(
                (number for number in range(1, world_size + 1) if world_size % number == 0),
                key=lambda number: abs(number - wanted),
            )
            raise LaunchError(
                f"{ranks_per_node} processes on a node: the deployment has {world_size} ranks, the same number on each "
                f"node; nearest: --gpus-per-node {nearest}, which makes {world_size // nearest} nodes"
            )
        nnodes = str(world_size // ranks_per_node)
    num_nodes, ranks_per_node = divide_ranks(nnodes, ranks_per_node, world_size)
    return ClusterRun(
        deployment=deployment,
        program=tuple(program),
        arguments=tuple(arguments),
        out=out,
        options=options,
        num_nodes=num_nodes,
        ranks_per_node=ranks_per_node,
    )


def write_commands(run: ClusterRun) -> str:
    """One command for each node, as lines of a shell; where node 0 is not named, they ask for it as MASTER_ADDR."""
    out = [] if run.out is None else ["--out", shlex.quote(run.out)]
    command = [shlex.join([*run.program, "run", *run.arguments]), *out]
    if run.num_nodes == 1:
        return " ".join(command) + "\n"
    rendezvous = [shlex.quote(option) for option in run.options.rendezvous()]
    if run.options.rdzv_endpoint is None and run.options.master_addr is None:
        rendezvous.append(f'--rdzv-endpoint="${{MASTER_ADDR:?set it to the host of node 0}}:{_PORT}"')
    size = [f"--nnodes={run.num_nodes}", f"--nproc-per-node={run.ranks_per_node}"]
    lines = []
    for node in range(run.num_nodes):
        first = node * run.ranks_per_node
        ranks = f"ranks {first} to {first + run.ranks_per_node - 1}" if run.ranks_per_node > 1 else f"rank {first}"
        is_numbered = run.options.rdzv_backend in (None, "static")
        lines.append(f"# node {node}: {ranks if is_numbered else 'the ranks that the rendezvous gives it'}")
        lines.append(" ".join([*command, *size, f"--node-rank={node}", *rendezvous]))
    return "\n".join(lines) + "\n"


def write_slurm_script(run: ClusterRun) -> str:
    """A script for sbatch: one task on each node, which starts that node's ranks; the first node is the rendezvous."""
    deployment = run.deployment
    cuda = deployment.backend.device == "cuda"
    directives = [
        f"--job-name={deployment.name}",
        f"--nodes={run.num_nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={run.ranks_per_node * deployment.backend.threads}",
        *([f"--gpus-per-node={run.ranks_per_node}"] if cuda else []),
        "--exclusive",
        "--output=%x-%j.log",
    ]
    out = f"truedag-out/{deployment.name}-" if run.out is None else f"{run.out}-"
    command = [
        shlex.join([*run.program, "run", *run.arguments]),
        f'--out {shlex.quote(out)}"$SLURM_JOB_ID"',
        f"--nnodes={run.num_nodes}",
        f"--nproc-per-node={run.ranks_per_node}",
        '--node-rank="$SLURM_NODEID"',
        '--rdzv-endpoint="$rendezvous"',
        '--rdzv-id="$SLURM_JOB_ID"',
    ]
    unit = "GPU" if cuda else "core"
    lines = [
        "#!/bin/bash",
        f"# {deployment.world_size} ranks of {deployment.name}, {' '.join(deployment.strategy.describe().split())}: "
        f"{run.ranks_per_node} on each of {run.num_nodes} nodes, one per {unit} ({deployment.backend.name}).",
        *(f"#SBATCH {directive}" for directive in directives),
        "set -euo pipefail",
        "",
        "# The nodes meet at the first one; ports of different jobs differ.",
        'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        'export rendezvous="${hosts[0]}:$((20000 + SLURM_JOB_ID % 20000))"',
        "",
        "# The quotes keep what differs between the nodes for each of them to fill in.",
        f'srun --nodes={run.num_nodes} --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
        + shlex.quote(" ".join(["exec", *command])),
    ]
    return "\n".join(lines) + "\n"
