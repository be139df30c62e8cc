"""What torchrun starts on each rank: `python -m truedag.launch.worker RUN_FOLDER NODE LAUNCHER_PID`.

Builds this rank's part of the deployment in run.json, runs its iterations, records the one that is to be recorded, and
keeps a state file that the launcher reads. Nothing but that iteration is recorded.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from truedag.launch.board import Board
from truedag.launch.deployment import Deployment, RunRecord
from truedag.launch.device import NCCL_MARGIN_S, take_device
from truedag.launch.errors import LaunchError
from truedag.launch.rank_state import RankState
from truedag.launch.reporter import Reporter
from truedag.launch.run_folder import RunFolder
from truedag.launch.watchdog import StoppedError, Watchdog
from truedag.parallel.environment import prepare_process

if TYPE_CHECKING:
    from truedag.launch.runner import Runner


def main(root: Path, *, node: int, launcher: int) -> int:
    """Run this rank (RANK in the environment, as torchrun sets it); return its exit code."""
    folder = RunFolder(root=root)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _redirect_output(folder.log(rank))
    record = RunRecord.model_validate_json(folder.record.read_bytes())
    state = RankState(rank=rank, pid=os.getpid(), run=record.run, node=node, host=platform.node())
    reporter = Reporter(
        state, path=folder.state(rank), cause=folder.cause, lost=folder.lost(node), world_size=world_size
    )
    watchdog = Watchdog(launcher, reporter, world_size)
    try:
        reporter.enter("starting")
        _run(record, folder, reporter, watchdog)
    except StoppedError:
        reporter.tell_stopped()
        raise
    except BaseException as error:
        reporter.fail(error)
        raise
    reporter.enter("finished")
    return 0


def _run(record: RunRecord, folder: RunFolder, reporter: Reporter, watchdog: Watchdog) -> None:
    prepare_process()
    import torch
    from torch import distributed

    from truedag.launch.runner import build_runner
    from truedag.tracer.record.counters import install

    deployment, state = record.deployment, reporter.state
    place = deployment.strategy.coordinates(state.rank)
    state.coordinates = {str(axis): at for axis, at in place.items()}
    torch.set_num_threads(deployment.backend.threads)
    board = Board(state.rank, deployment.world_size)
    reporter.board = board
    _agree(board, record, state, folder)
    timeout_s = deployment.backend.collective_timeout_s
    device = take_device(deployment.backend)
    if deployment.backend.name == "nccl":
        watchdog.watch_communications(timeout_s)
        timeout_s += NCCL_MARGIN_S
    timeout = timedelta(seconds=timeout_s)
    if deployment.trace.recorder != "off":
        install()  # messages are numbered from the groups' beginning
    distributed.init_process_group(
        deployment.backend.name,
        timeout=timeout,
        device_id=device if deployment.backend.name == "nccl" else None,
    )
    reporter.enter("building")
    runner = build_runner(deployment, device=device, timeout=timeout)
    for index in range(deployment.workload.steps):
        _iterate(index, runner, deployment, folder, reporter, board)
    distributed.barrier()  # whoever is still at work must be able to hear and be heard
    watchdog.ignore_others()
    runner.close()
    distributed.destroy_process_group()


def _agree(board: Board, record: RunRecord, state: RankState, folder: RunFolder) -> None:
    """Learn the run's name and folder on rank 0's node, having seen that all nodes run the same deployment.

    Raises:
        LaunchError: this node was told to run something else.
    """
    values = record.deployment.model_dump(mode="json")
    own = {"run": record.run, "home": str(folder.root), "host": state.host, "deployment": values}
    told = json.loads(board.share("record", json.dumps(own) if state.rank == 0 else None))
    differences = _differences(told["deployment"], values)
    if differences:
        raise LaunchError(
            "this node does not run what rank 0's node runs; start every node with the same deployment and overrides: "
            + "; ".join(differences)
        )
    state.run, state.home, state.home_host = told["run"], told["home"], told["host"]


def _differences(there: object, here: object, key: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        names = sorted(there.keys() | here.keys())
        return [
            found
            for name in names
            for found in _differences(there.get(name), here.get(name), f"{key}.{name}" if key else name)
        ]
    if there == here or all(isinstance(value, str) and Path(value).is_absolute() for value in (there, here)):
        return []  # files may lie elsewhere on another node
    return [f"{key} is {here!r} here and {there!r} there"]


def _iterate(
    index: int, runner: Runner, deployment: Deployment, folder: RunFolder, reporter: Reporter, board: Board
) -> None:
    trace = deployment.trace
    recorded = index == trace.step and trace.recorder != "off"
    reporter.enter("recorded step" if recorded else "warm-up step" if index <= trace.step else "later step")
    with _recording(runner, deployment, folder.trace(reporter.state.rank)) if recorded else nullcontext():
        if recorded:
            board.meet("recording")  # who has begun to record must not wait inside the step for those who have not
        runner.run(index)
    if trace.routing and index == trace.step:
        runner.write_routing(folder.routing(reporter.state.rank))
    runner.report(index, recorded=recorded, state=reporter.state)
    reporter.write()


def _recording(runner: Runner, deployment: Deployment, path: Path) -> AbstractContextManager[object]:
    from truedag.tracer.record.recording import record

    assert deployment.trace.recorder != "off"
    return record(path, recorder=deployment.trace.recorder, watch=runner.model_chunks)


def _redirect_output(log: Path) -> None:
    """Send what this process prints, C++ included, to its own log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)
    faulthandler.enable()


if __name__ == "__main__":
    # No options: torchrun would take them for abbreviations of its own.
    sys.exit(main(Path(sys.argv[1]), node=int(sys.argv[2]), launcher=int(sys.argv[3])))
