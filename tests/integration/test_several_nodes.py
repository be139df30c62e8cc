"""Several torchrun agents, here all on one machine, that meet at a localhost rendezvous."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from command_line import TIMEOUT_S, free_port, is_running, start_truedag, truedag, write_small_deployment

from truedag.launch.rank_state import RankState, read_states

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so it is not refused")
LONG = ("workload.steps=1", "trace.step=0", "workload.global_batch_size=100000", "--recorder", "off")


def start_nodes(folder: Path, outs: tuple[str, str], *options: str) -> list[subprocess.Popen[str]]:
    deployment = write_small_deployment(folder)
    place = ("--nnodes", "2", "--rdzv-endpoint", f"localhost:{free_port()}")
    return [
        start_truedag("run", deployment.name, *place, "--node-rank", str(node), "--out", out, *options, cwd=folder)
        for node, out in enumerate(outs)
    ]


def finish(nodes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Wait for all; return exit code, stdout and stderr of each."""
    try:
        spoken = [process.communicate(timeout=TIMEOUT_S) for process in nodes]
    finally:
        for process in nodes:
            process.kill()
    return [(process.returncode, *words) for process, words in zip(nodes, spoken, strict=True)]


def wait_for_step(folder: Path, outs: tuple[str, str], nodes: list[subprocess.Popen[str]]) -> list[RankState]:
    """Wait until the only rank of each node is in its step."""
    while True:
        assert all(process.poll() is None for process in nodes), finish(nodes)
        states = [read_states(folder / out / "ranks").get(node) for node, out in enumerate(outs)]
        told = [state for state in states if state is not None and state.phase == "warm-up step"]
        if len(told) == len(nodes):
            return told


def check_whole(dag: Path) -> None:
    meta = json.loads((dag / "meta.json").read_text())
    assert meta["missing_ranks"] == []
    assert meta["num_unmatched"] == 0
    assert meta["world_size"] == 2


def test_nodes_without_a_shared_disk_say_how_to_bring_their_traces_together(tmp_path: Path) -> None:
    (code0, said0, error0), (code1, said1, error1) = finish(start_nodes(tmp_path, ("here", "there")))
    assert code0 == 0, error0
    assert code1 == 0, error1
    assert "needs the traces of rank 1 as well" in said0
    bring, merge = (said.splitlines()[-1] for said in (said1, said0))
    assert merge == "next: truedag merge here/traces --out here/dag"
    subprocess.run(["bash", "-c", bring.removeprefix("next: ")], cwd=tmp_path, check=True, timeout=60)
    merged = truedag(*merge.split()[2:], cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    check_whole(tmp_path / "here" / "dag")
    # A trace of another run in between would make a graph that never was.
    state = read_states(tmp_path / "here" / "ranks")[1]
    state.run = "another"
    state.write(tmp_path / "here" / "ranks" / "rank-00001.json")
    refused = truedag(*merge.split()[2:], "--force", cwd=tmp_path)
    assert refused.returncode == 1
    assert "traces of different runs" in refused.stderr


def test_the_slurm_script_runs_and_nodes_with_a_shared_disk_make_one_dag(tmp_path: Path) -> None:
    deployment = write_small_deployment(tmp_path)
    printed = truedag("run", deployment.name, "--slurm", "--gpus-per-node", "1", cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    assert not (tmp_path / "truedag-out").exists()
    (tmp_path / "job.sh").write_text(printed.stdout)
    # What only a cluster has: the name of the first node, and a task on each.
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "scontrol").write_text("#!/bin/bash\necho localhost\n")
    (commands / "srun").write_text(
        '#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\n'
        'SLURM_NODEID=1 "$@" & other=$!\nSLURM_NODEID=0 "$@"; own=$?\nwait $other && exit $own\n'
    )
    for path in commands.iterdir():
        path.chmod(0o755)
    job = free_port() - 20000
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_PER_TASK": "1",
    }
    result = subprocess.run(
        ["bash", "job.sh"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    out = Path("truedag-out") / f"small-{job}"
    check_whole(tmp_path / out / "dag")
    assert f"next: truedag report {out}" in result.stdout  # the node that does not merge


def test_the_printed_command_runs_in_a_shell(tmp_path: Path) -> None:
    deployment = write_small_deployment(tmp_path)
    options = ("workload.steps=1", "--recorder", "off", "trace.step=0", "--out", "a folder")
    printed = truedag("run", deployment.name, *options, "--print-command", cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    assert not (tmp_path / "a folder").exists()
    ran = subprocess.run(
        ["bash", "-c", printed.stdout], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "a folder" / "run.json").exists()


def test_nodes_that_run_different_things_are_refused(tmp_path: Path) -> None:
    deployment = write_small_deployment(tmp_path)
    place = ("--nnodes", "2", "--rdzv-endpoint", f"localhost:{free_port()}", "--recorder", "off")
    nodes = [
        start_truedag(
            "run", deployment.name, *place, "--node-rank", str(node), "--out", f"out{node}", value, cwd=tmp_path
        )
        for node, value in enumerate(("model.num_layers=2", "model.num_layers=4"))
    ]
    for code, _, error in finish(nodes):
        assert code == 1
        assert "model.num_layers is 4 here and 2 there" in error


@pytest.mark.parametrize("killed", [0, 1])
def test_both_nodes_end_when_one_agent_is_killed(tmp_path: Path, killed: int) -> None:
    outs = ("here", "there")
    nodes = start_nodes(tmp_path, outs, *LONG)
    states = wait_for_step(tmp_path, outs, nodes)
    agent = int(Path(f"/proc/{states[killed].pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(agent, signal.SIGKILL)
    ended = finish(nodes)
    assert [code for code, _, _ in ended] == [1, 1]
    assert "torchrun was killed by SIGKILL" in ended[killed][2]
    assert not any(is_running(state.pid) for state in states)


def test_an_unknown_option_is_a_usage_error(tmp_path: Path) -> None:
    result = truedag("run", "moe-10b-tp2-ep2-pp2-cpu", "--max-restarts", "3", cwd=tmp_path)
    assert result.returncode == 2
    assert "--max-restarts" in result.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--nnodes", "3"], "nearest: --nnodes 2 --nproc-per-node 4"),
        (["--nnodes", "2", "--node-rank", "0"], "--rdzv-endpoint HOST:PORT"),
        (["--gpus-per-node", "4"], "goes with --print-command or --slurm"),
        pytest.param(["backend={name: nccl}"], "backend.device=cuda: torch", marks=NO_GPU),
        pytest.param(["backend={name: gloo, device: cuda}"], "backend.device=cuda: torch", marks=NO_GPU),
        (["backend={name: nccl, device: cpu}"], "name=nccl needs device=cuda"),
    ],
)
def test_what_cannot_run_here_is_refused_before_anything_starts(
    tmp_path: Path, options: list[str], expected: str
) -> None:
    result = truedag("run", "moe-10b-tp2-ep2-pp2-cpu", *options, cwd=tmp_path)
    assert result.returncode == 1
    assert expected in result.stderr
    assert list(tmp_path.iterdir()) == []
