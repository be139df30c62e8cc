"""What is printed to be started on a cluster."""

from __future__ import annotations

import re
import subprocess

import pytest

from truedag.launch.cluster_script import ClusterRun, plan_cluster_run, write_commands, write_slurm_script
from truedag.launch.deployment import Deployment
from truedag.launch.deployment_file import load_deployment
from truedag.launch.errors import LaunchError
from truedag.launch.nodes import TorchrunOptions

FULL = "moe-30b-ep64-tp2-pp8"


def plan(
    name: str, *overrides: str, gpus_per_node: int | None = None, options: TorchrunOptions | None = None
) -> ClusterRun:
    deployment: Deployment = load_deployment(name, overrides)[1]
    return plan_cluster_run(
        deployment,
        program=["truedag"],
        arguments=[name, *overrides],
        out=None,
        options=options or TorchrunOptions(),
        gpus_per_node=gpus_per_node,
    )


def check_syntax(script: str) -> None:
    result = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_a_thousand_ranks_are_128_nodes_of_eight_gpus() -> None:
    script = write_slurm_script(plan(FULL))
    check_syntax(script)
    assert "#SBATCH --nodes=128\n#SBATCH --ntasks-per-node=1\n" in script
    assert "#SBATCH --gpus-per-node=8\n" in script
    assert "--nnodes=128 --nproc-per-node=8" in script
    assert "--rdzv-backend" not in script
    assert "(nccl)" in script


def test_each_node_has_its_command() -> None:
    commands = write_commands(plan(FULL))
    check_syntax(commands)
    found = re.findall(
        r"# node (\d+): ranks (\d+) to (\d+)\n.* --nnodes=128 --nproc-per-node=8 --node-rank=(\d+) ", commands
    )
    assert [tuple(map(int, row)) for row in found] == [(n, 8 * n, 8 * n + 7, n) for n in range(128)]


def test_the_shell_asks_for_the_first_host_where_it_is_not_given() -> None:
    run = plan("moe-10b-tp2-ep2-pp2-cpu", gpus_per_node=4)
    missing = subprocess.run(
        ["bash"], input=write_commands(run), env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False,
        executable="/bin/bash",
    )  # fmt: skip
    assert missing.returncode != 0
    assert "MASTER_ADDR: set it to the host of node 0" in missing.stderr
    given = plan(
        "moe-10b-tp2-ep2-pp2-cpu", gpus_per_node=4, options=TorchrunOptions(rdzv_endpoint="first:1234", rdzv_id="7")
    )
    assert "--node-rank=1 --rdzv-endpoint=first:1234 --rdzv-id=7\n" in write_commands(given)


def test_what_a_shell_would_take_for_its_own_is_quoted() -> None:
    run = plan("moe-10b-tp2-ep2-pp2-cpu", "description=it's $HOME; `ls`", gpus_per_node=4)
    script, commands = write_slurm_script(run), write_commands(run)
    check_syntax(script)
    check_syntax(commands)
    # srun, scontrol and truedag as functions that print what they are given.
    stubs = 'scontrol() { echo first; }; srun() { while [ "$1" != bash ]; do shift; done; "$@"; }\n'
    script = script.replace("exec truedag", "printf %s\\\\n")
    environment = {"SLURM_JOB_ID": "7", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "x", "SLURM_CPUS_PER_TASK": "4",
                   "PATH": "/usr/bin:/bin"}  # fmt: skip
    said = subprocess.run(
        ["bash"], input=stubs + script, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "description=it's $HOME; `ls`" in said
    assert "--node-rank=1" in said
    assert "--rdzv-endpoint=first:20007" in said
    assert "truedag-out/moe-10b-tp2-ep2-pp2-cpu-7" in said


@pytest.mark.parametrize("gpus", [0, 3, 7])
def test_ranks_that_do_not_fill_the_nodes_are_refused(gpus: int) -> None:
    with pytest.raises(LaunchError, match="the deployment has 8 ranks"):
        plan("moe-10b-tp2-ep2-pp2-cpu", gpus_per_node=gpus)
