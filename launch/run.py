"""The flow of `truedag run`: check everything, run the ranks, merge what they recorded, draw and report it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from truedag.launch.console import Progress
from truedag.launch.deployment import PACKAGES, Deployment, RunRecord, installed_version
from truedag.launch.deployment_file import load_deployment
from truedag.launch.errors import LaunchError, RunError
from truedag.launch.failure import describe_failure, describe_kept, describe_timeout
from truedag.launch.rank_state import Phase, RankState, StepResult, read_states
from truedag.launch.run_folder import RunFolder
from truedag.launch.torchrun import TimeUpError, Torchrun

_SHOWN: Mapping[Phase, str] = {
    "starting": "starting the ranks",
    "building": "building the model",
    "warm-up step": "warm-up step",
    "recorded step": "recorded step",
    "later step": "steps after the recorded one",
    "finished": "ending the ranks",
}
_PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What came out of a run."""

    deployment: str
    strategy: str
    world_size: int
    out: Path
    steps: list[StepResult]
    """As rank 0 saw them."""
    dag: Path | None = None
    """None: nothing was to be recorded."""
    views: Path | None = None
    """The folder of the pictures."""
    pictures: list[Path] = field(default_factory=list)
    not_drawn: str = ""
    """Why there are no pictures, where there should be."""
    merge: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    seconds: float


def run_deployment(
    name_or_path: str,
    overrides: Sequence[str],
    *,
    out: Path | None,
    replace: bool,
    command: Sequence[str],
    progress: Progress,
) -> RunResult:
    """Run a deployment on this machine and leave its folder behind. Nothing starts before everything is checked.

    Raises:
        DeploymentError: the deployment or an override is wrong.
        FolderError: the output folder is in the way.
        LaunchError: the recorder could not be built.
        RunError: a rank failed, the run took too long or was interrupted.
        TruedagError: the traces could not be merged.
    """
    started = time.monotonic()
    source, deployment = load_deployment(name_or_path, overrides)
    folder = RunFolder(root=(out if out is not None else Path("truedag-out") / deployment.name).absolute())
    folder.check_free(replace=replace)
    if deployment.trace.recorder == "native":
        progress.show("building the recorder")
        _build_recorder()
    folder.make(replace=replace)
    record = _describe(source, deployment, overrides, command)
    folder.record.write_text(record.model_dump_json(indent=2) + "\n")
    _run_ranks(deployment, folder, progress)
    result = RunResult(
        deployment=deployment.name,
        strategy=record.strategy,
        world_size=deployment.world_size,
        out=folder.root,
        steps=read_states(folder.ranks)[0].steps,
        seconds=time.monotonic() - started,
    )
    if deployment.trace.recorder == "off":
        return result
    result = _build_dag(result, folder, progress.show)
    return dataclasses.replace(result, seconds=time.monotonic() - started)


def _build_recorder() -> None:
    """Build the native recorder before eight ranks want it at once; a child does it, to keep torch out of here."""
    build = subprocess.run(
        [sys.executable, "-m", "truedag.tracer.record.native"], capture_output=True, text=True, check=False
    )
    if build.returncode != 0:
        raise LaunchError(build.stderr.strip().removeprefix("truedag: "))


def _describe(source: Path, deployment: Deployment, overrides: Sequence[str], command: Sequence[str]) -> RunRecord:
    return RunRecord(
        source=source.absolute(),
        overrides=tuple(overrides),
        command=tuple(command),
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        host=platform.node(),
        platform=platform.platform(),
        cores=os.cpu_count() or 1,
        launcher=os.getpid(),
        versions={"python": platform.python_version()} | {name: installed_version(name) for name in PACKAGES},
        strategy=deployment.strategy.describe(),
        deployment=deployment,
    )


def _run_ranks(deployment: Deployment, folder: RunFolder, progress: Progress) -> None:
    world_size = deployment.world_size
    timeout_s = deployment.backend.run_timeout_s

    def show(states: Mapping[int, RankState]) -> None:
        slowest = min((_PHASES.index(state.phase) for state in states.values()), default=0)
        phase = _PHASES[slowest] if len(states) == world_size else "starting"
        progress.show(f"{_SHOWN[phase]} ({world_size} ranks)")

    try:
        with Torchrun(folder, world_size=world_size, threads=deployment.backend.threads) as torchrun:
            exit_code = torchrun.wait(timeout_s, show)
    except TimeUpError as error:
        raise RunError(describe_timeout(folder, world_size, timeout_s)) from error
    except KeyboardInterrupt as error:
        raise RunError(f"interrupted; the ranks have been stopped.\n{describe_kept(folder, world_size)}") from error
    states = read_states(folder.ranks)
    if exit_code != 0 or len(states) != world_size or any(state.phase != "finished" for state in states.values()):
        raise RunError(describe_failure(folder, world_size))


def _build_dag(result: RunResult, folder: RunFolder, show: Callable[[str], None]) -> RunResult:
    from truedag.tracer.analysis.report import write_report
    from truedag.tracer.errors import DrawError
    from truedag.tracer.merge.merging import merge_traces
    from truedag.tracer.views.draw import draw

    show("merging the traces")
    merged = merge_traces(
        folder.traces, folder.dag, deployment=result.deployment, strategy=result.strategy, progress=show
    )
    show("drawing")
    try:
        draw(folder.dag, folder.views)
        not_drawn = ""
    except DrawError as error:  # the graph is there all the same
        not_drawn = str(error)
    show("reporting")
    write_report(folder.dag, folder.root)
    return dataclasses.replace(
        result,
        dag=folder.dag,
        views=folder.views,
        pictures=sorted(folder.views.glob("*.svg")),
        not_drawn=not_drawn,
        merge=dataclasses.asdict(merged),
        report=json.loads((folder.root / "report.json").read_text()),
    )
