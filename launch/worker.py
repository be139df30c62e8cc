"""What torchrun starts on each rank: `python -m truedag.launch.worker RUN_FOLDER`.

Builds this rank's part of the deployment in run.json, runs its steps, records the one that is to be recorded, and keeps
a state file that the launcher reads. Nothing but that step is recorded.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from truedag.launch.deployment import Deployment, RunRecord
from truedag.launch.rank_state import Phase, RankState, StepResult
from truedag.launch.run_folder import RunFolder
from truedag.launch.watchdog import start_watchdog
from truedag.parallel.environment import prepare_process

if TYPE_CHECKING:
    from truedag.parallel.train import Trainer


def main(root: Path) -> int:
    """Run this rank (RANK in the environment, as torchrun sets it); return its exit code."""
    folder = RunFolder(root=root)
    rank = int(os.environ["RANK"])
    _redirect_output(folder.log(rank))
    record = RunRecord.model_validate_json(folder.record.read_bytes())
    start_watchdog(record.launcher)
    state = RankState(rank=rank, pid=os.getpid())
    reporter = _Reporter(state, folder.state(rank))
    reporter.enter("starting")
    try:
        _run(record.deployment, folder, reporter)
    except BaseException as error:
        state.fail(error)
        reporter.write()
        raise
    reporter.enter("finished")
    return 0


class _Reporter:
    """Writes the rank's state whenever it changes."""

    def __init__(self, state: RankState, path: Path) -> None:
        self.state = state
        self._path = path

    def write(self) -> None:
        self.state.write(self._path)

    def enter(self, phase: Phase) -> None:
        self.state.phase = phase
        self.write()


def _run(deployment: Deployment, folder: RunFolder, reporter: _Reporter) -> None:
    prepare_process()
    import torch
    from torch import distributed

    from truedag.parallel.train import build_trainer

    rank = reporter.state.rank
    place = deployment.strategy.coordinates(rank)
    reporter.state.coordinates = {str(axis): at for axis, at in place.items()}
    torch.set_num_threads(deployment.backend.threads)
    timeout = timedelta(seconds=deployment.backend.collective_timeout_s)
    distributed.init_process_group(deployment.backend.name, timeout=timeout)
    reporter.enter("building")
    trainer = build_trainer(
        deployment.model,
        deployment.strategy,
        deployment.workload,
        text=deployment.workload.text,
        device=torch.device("cpu"),
        timeout=timeout,
    )
    for step in range(deployment.workload.steps):
        _step(step, trainer, deployment, folder, reporter)
    trainer.close()
    distributed.destroy_process_group()


def _step(step: int, trainer: Trainer, deployment: Deployment, folder: RunFolder, reporter: _Reporter) -> None:
    trace = deployment.trace
    recorded = step == trace.step and trace.recorder != "off"
    reporter.enter("recorded step" if recorded else "warm-up step" if step <= trace.step else "later step")
    with _recording(trainer, deployment, folder.trace(reporter.state.rank)) if recorded else nullcontext():
        started_ns = time.monotonic_ns()
        result = trainer.step(step)
        wall_ns = time.monotonic_ns() - started_ns
    reporter.state.steps.append(
        StepResult(step=step, recorded=recorded, wall_ns=wall_ns, loss=result.loss, gradient_norm=result.gradient_norm)
    )
    reporter.write()


def _recording(trainer: Trainer, deployment: Deployment, path: Path) -> AbstractContextManager[object]:
    from truedag.tracer.record.recording import record

    assert deployment.trace.recorder != "off"
    return record(path, recorder=deployment.trace.recorder, watch=trainer.model_chunks)


def _redirect_output(log: Path) -> None:
    """Send what this process prints, C++ included, to its own log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)
    faulthandler.enable()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
