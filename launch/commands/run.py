"""Run a deployment, record one step on every rank, and build its DAG.

DEPLOYMENT is the name of one that ships (truedag deployments lists them) or the path of a YAML file. Any of its values
can be overridden: truedag run moe-10b-tp2-ep2-pp2-cpu workload.sequence_length=32

On several nodes, start it on each with its own --node-rank and otherwise the same: truedag run DEPLOYMENT --nnodes 2
--node-rank 0 --rdzv-endpoint HOST:29500. What to start on a cluster is printed by --print-command and --slurm.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from truedag.launch.cluster_script import plan_cluster_run, write_commands, write_slurm_script
from truedag.launch.console import Progress, print_audited, print_json, print_report, print_result, shorten
from truedag.launch.deployment_file import load_deployment
from truedag.launch.errors import LaunchError
from truedag.launch.nodes import TorchrunOptions
from truedag.launch.results import GenerationResult, StepResult
from truedag.launch.run import RunResult, run_deployment
from truedag.launch.stall import list_ranks


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("deployment", metavar="DEPLOYMENT", help="a name, or the path of a YAML file")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="values to override")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: truedag-out/NAME)")
    parser.add_argument("--force", action="store_true", help="replace the folder of an earlier run")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--recorder",
        choices=("native", "python", "off"),
        help="what records: native (compiled), python (slower, no compiler), off (no DAG); the same as trace.recorder=",
    )

    nodes = parser.add_argument_group("nodes", "torchrun's options, passed to it; without them all runs here")
    nodes.add_argument("--nnodes", metavar="N", help="number of nodes (default: 1)")
    _add(nodes, "--node-rank", type=int, metavar="K", help="which node this is, from 0")
    _add(nodes, "--nproc-per-node", type=int, metavar="N", help="ranks on each node (default: the same on all)")
    _add(nodes, "--rdzv-endpoint", metavar="HOST:PORT", help="where the nodes meet: node 0 and a free port there")
    _add(nodes, "--rdzv-backend", metavar="NAME", help="static (default: nodes in order of their rank), c10d, etcd-v2")
    _add(nodes, "--rdzv-id", metavar="ID", help="names the job, where several meet at one place")
    _add(nodes, "--rdzv-conf", metavar="KEY=VALUE,...", help="more about the rendezvous")
    _add(nodes, "--master-addr", metavar="HOST", help="node 0, instead of --rdzv-endpoint")
    _add(nodes, "--master-port", type=int, metavar="PORT", help="the port there")
    _add(nodes, "--local-addr", metavar="HOST", help="this node's address, where it is not found by itself")
    cluster = parser.add_argument_group("clusters", "print to stdout, start nothing")
    printed = cluster.add_mutually_exclusive_group()
    printed.add_argument("--print-command", action="store_true", help="print what to start on each node")
    printed.add_argument("--slurm", action="store_true", help="print a script for sbatch")
    cluster.add_argument(
        "--gpus-per-node", type=int, metavar="N", help="processes on each node (default: 8, one a GPU)"
    )


def _add(group: argparse._ArgumentGroup, name: str, **settings: Any) -> None:
    """Add an option under both spellings that torchrun has."""
    group.add_argument(name, "--" + name[2:].replace("-", "_"), **settings)


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    overrides: list[str] = list(arguments.overrides)
    if arguments.recorder is not None:
        overrides.append(f"trace.recorder={arguments.recorder}")
    options = TorchrunOptions(
        nnodes=arguments.nnodes,
        node_rank=arguments.node_rank,
        nproc_per_node=arguments.nproc_per_node,
        rdzv_backend=arguments.rdzv_backend,
        rdzv_endpoint=arguments.rdzv_endpoint,
        rdzv_id=arguments.rdzv_id,
        rdzv_conf=arguments.rdzv_conf,
        master_addr=arguments.master_addr,
        master_port=arguments.master_port,
        local_addr=arguments.local_addr,
    )
    if arguments.print_command or arguments.slurm:
        return _print_for_cluster(arguments, overrides, options)
    if arguments.gpus_per_node is not None:
        raise LaunchError("--gpus-per-node goes with --print-command or --slurm; to run, give --nproc-per-node")
    with Progress() as progress:
        result = run_deployment(
            arguments.deployment,
            overrides,
            options=options,
            out=arguments.out,
            replace=arguments.force,
            command=sys.argv,
            progress=progress,
        )
    if arguments.json:
        print_json(TypeAdapter(RunResult).dump_python(result, mode="json"))
    else:
        _print_result(result, arguments.deployment)
    return 0


def _print_for_cluster(arguments: argparse.Namespace, overrides: list[str], options: TorchrunOptions) -> int:
    _, deployment = load_deployment(arguments.deployment, overrides)
    run = plan_cluster_run(
        deployment,
        program=_program(),
        arguments=[arguments.deployment, *overrides, *(["--force"] if arguments.force else [])],
        out=None if arguments.out is None else str(arguments.out),
        options=options,
        gpus_per_node=arguments.gpus_per_node,
    )
    sys.stdout.write(write_slurm_script(run) if arguments.slurm else write_commands(run))
    return 0


def _program() -> list[str]:
    """How this very program is called: as typed, or as a module of this interpreter."""
    typed = Path(sys.argv[0])
    return [sys.argv[0]] if typed.name == "truedag" else [sys.executable, "-m", "truedag.launch.cli"]


def _print_result(result: RunResult, deployment: str) -> None:
    if result.dag is not None:
        print_report(result.dag)
    else:
        print_result(f"{result.deployment} · {result.strategy}")
    iterations: list[StepResult | GenerationResult] = [*result.steps, *result.generations]
    for iteration in iterations:
        print_result(f"  {iteration.describe()}")
    if result.dag is not None:
        _print_places(result, result.dag)
    elif not any(iteration.recorded for iteration in iterations):
        print_result(f"  {result.seconds:.0f} s in all; nothing was to be recorded, so there is no DAG")
        traced = shlex.quote(f"{shorten(result.out)}-traced")
        print_result(f"next: truedag run {shlex.quote(deployment)} --out {traced}")
    else:
        _print_parts(result)


def _print_places(result: RunResult, dag: Path) -> None:
    assert result.views is not None
    if result.not_drawn:
        print_result(f"Nothing was drawn: {result.not_drawn}")
    print_audited(result.audit)
    print_result(
        f"{result.seconds:.0f} s in all. The DAG is in {shorten(dag)}, its pictures in {shorten(result.views)}."
    )
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    assert result.page is not None
    print_result(f"next: {opener} {shlex.quote(str(shorten(result.page)))}")


def _print_parts(result: RunResult) -> None:
    """What a node says whose traces, or the other nodes' traces, are elsewhere."""
    out = shlex.quote(str(shorten(result.out)))
    ran = f"{result.seconds:.0f} s in all. {list_ranks(result.ranks).capitalize()} ran here, on node {result.node}."
    if result.missing_ranks:
        print_result(
            f"{ran} The DAG needs the traces of {list_ranks(result.missing_ranks)} as well, which are on other nodes: "
            "each of those printed a command that brings them here. After that:"
        )
        print_result(f"next: truedag merge {out}/traces --out {out}/dag")
    elif result.bring:
        print_result(f"{ran} The DAG is built where rank 0 ran; this brings the traces there:")
        print_result(f"next: {result.bring}")
    else:
        print_result(f"{ran} The node where rank 0 ran builds the DAG in the same folder. When it is done:")
        print_result(f"next: truedag report {out}")
