"""The flow of `truedag run`: check everything, run this node's ranks, merge what all recorded, draw and report it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from truedag.launch.console import Progress, shorten
from truedag.launch.deployment import PACKAGES, Deployment, RunRecord, installed_version
from truedag.launch.deployment_file import load_deployment
from truedag.launch.device import check_device
from truedag.launch.errors import LaunchError, RunError
from truedag.launch.failure import describe_failure, describe_kept, describe_silence, describe_timeout
from truedag.launch.nodes import Nodes, TorchrunOptions, place_ranks
from truedag.launch.pictures import draw_pictures
from truedag.launch.rank_state import Phase, RankState, read_states
from truedag.launch.results import GenerationResult, StepResult
from truedag.launch.run_folder import ENDED, RunFolder
from truedag.launch.torchrun import SilentError, TimeUpError, Torchrun
from truedag.tracer.record.native.library import recorder_path

_SHOWN: Mapping[Phase, str] = {
    "starting": "starting the ranks",
    "building": "building the model",
    "warm-up step": "warm-up step",
    "recorded step": "recorded step",
    "later step": "steps after the recorded one",
    "finished": "ending the ranks",
}
_PHASES: tuple[Phase, ...] = get_args(Phase)
_SHARED_DISK_S = 30.0
# Ranks that wait for a silent one say more: they come first.
_SILENCE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What came out of a run."""

    deployment: str
    strategy: str
    world_size: int
    out: Path
    node: int = 0
    """Which node of the run this is the result of."""

    ranks: list[int]
    """Those that ran on this node."""

    missing_ranks: list[int] = field(default_factory=list)
    """Those whose traces are on other nodes and must be brought together by hand before they can be merged."""

    bring: str = ""
    """A command that brings this node's traces to the node where they are merged; empty where there is no need."""

    steps: list[StepResult]
    """Training steps, as the first of `ranks` saw them."""
    generations: list[GenerationResult]
    """Runs of an inference workload, as the first of `ranks` saw them."""
    dag: Path | None = None
    """None: nothing was to be recorded."""
    views: Path | None = None
    """The folder of the pictures."""
    pictures: list[Path] = field(default_factory=list)
    page: Path | None = None
    """The interactive page."""
    not_drawn: str = ""
    """Why there are no pictures, where there should be."""
    merge: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    audit: Mapping[str, Any] = field(default_factory=dict)
    """verdict, num_faults and the file that says more."""
    seconds: float


def run_deployment(
    name_or_path: str,
    overrides: Sequence[str],
    *,
    options: TorchrunOptions,
    out: Path | None,
    replace: bool,
    command: Sequence[str],
    progress: Progress,
) -> RunResult:
    """Run a deployment, or this node's part of it, and leave its folder behind. All is checked before anything starts.

    Where there are several nodes, each of them calls it. They may share the folder or each have one; the node of rank 0
    builds the DAG if it has the traces of all.

    Raises:
        DeploymentError: the deployment or an override is wrong.
        FolderError: the output folder is in the way, or another run is going on in it.
        LaunchError: the ranks do not fit the nodes or the machine, or the recorder could not be built.
        RunError: a rank failed, here or on another node; the run took too long or was interrupted.
        TruedagError: the traces could not be merged.
    """
    started = time.monotonic()
    source, deployment = load_deployment(name_or_path, overrides)
    nodes = place_ranks(options, deployment.world_size)
    check_device(deployment, nodes)
    folder = RunFolder(root=(out if out is not None else Path("truedag-out") / deployment.name).absolute())
    record = describe_run(source, deployment, overrides, command, nodes)
    if folder.find_run(record, nodes.node) is None:
        folder.check_free(replace=replace)
    if deployment.trace.recorder == "native":
        build_recorder(progress.show)
    folder.claim(record, nodes.node, replace=replace)
    try:
        _run_ranks(deployment, folder, nodes, progress)
        result = _collect(deployment, folder, nodes, progress)
        if result.ranks[0] == 0 and not result.missing_ranks and deployment.trace.recorder != "off":
            result = _build_dag(result, deployment, folder, progress.show)
    finally:
        folder.node(nodes.node).write_text(ENDED)
    return dataclasses.replace(result, seconds=time.monotonic() - started)


def build_recorder(show: Callable[[str], None]) -> None:
    """Build the native recorder, where it is not there, before eight ranks want it at once.

    A child does it, to keep torch out of here.

    Args:
        show: is told, when there is something to build.

    Raises:
        LaunchError: it could not be built.
    """
    if recorder_path().exists():
        return
    show("building the recorder")
    build = subprocess.run(
        [sys.executable, "-m", "truedag.tracer.record.native"], capture_output=True, text=True, check=False
    )
    if build.returncode != 0:
        raise LaunchError(build.stderr.strip().removeprefix("truedag: "))


def describe_run(
    source: Path, deployment: Deployment, overrides: Sequence[str], command: Sequence[str], nodes: Nodes
) -> RunRecord:
    """Return what run.json says: what was asked for, in full, and where it runs."""
    return RunRecord(
        source=source.absolute(),
        overrides=tuple(overrides),
        command=tuple(command),
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        host=platform.node(),
        platform=platform.platform(),
        cores=os.cpu_count() or 1,
        run=uuid.uuid4().hex,
        num_nodes=nodes.num_nodes,
        versions={"python": platform.python_version()} | {name: installed_version(name) for name in PACKAGES},
        strategy=deployment.strategy.describe(),
        deployment=deployment,
    )


def _run_ranks(deployment: Deployment, folder: RunFolder, nodes: Nodes, progress: Progress) -> None:
    num_ranks = nodes.ranks_per_node
    timeout_s = deployment.backend.run_timeout_s
    noun = "rank" if num_ranks == 1 else "ranks"
    of = f" of {deployment.world_size}, node {nodes.node} of {nodes.num_nodes}" if nodes.num_nodes > 1 else ""

    def show(states: Mapping[int, RankState]) -> None:
        slowest = min((_PHASES.index(state.phase) for state in states.values()), default=0)
        phase = _PHASES[slowest] if len(states) == num_ranks else "starting"
        progress.show(f"{_SHOWN[phase]} ({num_ranks} {noun}{of})")

    try:
        with Torchrun(folder, nodes, threads=deployment.backend.threads) as torchrun:
            exit_code = torchrun.wait(timeout_s, deployment.backend.collective_timeout_s + _SILENCE_S, show)
    except SilentError as error:
        raise RunError(describe_silence(folder, nodes, error.ranks)) from error
    except TimeUpError as error:
        raise RunError(describe_timeout(folder, nodes, timeout_s)) from error
    except KeyboardInterrupt as error:
        raise RunError(f"interrupted; the ranks have been stopped.\n{describe_kept(folder, nodes)}") from error
    states = _own(folder, nodes)
    well = exit_code == 0 and len(states) == num_ranks and all(state.phase == "finished" for state in states.values())
    if not well or folder.cause.exists():
        raise RunError(describe_failure(folder, nodes, exit_code))


def _own(folder: RunFolder, nodes: Nodes) -> dict[int, RankState]:
    return {rank: state for rank, state in read_states(folder.ranks).items() if state.node == nodes.node}


def _collect(deployment: Deployment, folder: RunFolder, nodes: Nodes, progress: Progress) -> RunResult:
    """Say what this node's ranks did, and whether the traces of the others are here."""
    own = _own(folder, nodes)
    first = own[min(own)]
    result = RunResult(
        deployment=deployment.name,
        strategy=deployment.strategy.describe(),
        world_size=deployment.world_size,
        out=folder.root,
        node=nodes.node,
        ranks=sorted(own),
        steps=first.steps,
        generations=first.generations,
        seconds=0.0,
    )
    if deployment.trace.recorder == "off":
        return result
    home = Path(first.home)
    if first.rank != 0:
        shared = home == folder.root and 0 in read_states(folder.ranks)
        return dataclasses.replace(result, bring="" if shared else _bring(folder, first, home))
    if len(read_states(folder.ranks)) > len(own):  # the disk is shared: the others' files come, some maybe late
        progress.show("waiting for the traces of the other nodes")
        deadline = time.monotonic() + _SHARED_DISK_S
        while _missing(folder, deployment.world_size, first.run) and time.monotonic() < deadline:
            time.sleep(0.2)
    return dataclasses.replace(result, missing_ranks=_missing(folder, deployment.world_size, first.run))


def _missing(folder: RunFolder, world_size: int, run: str) -> list[int]:
    """The ranks that have not left a whole trace of this run here."""
    states = read_states(folder.ranks)
    return [
        rank
        for rank in range(world_size)
        if rank not in states
        or states[rank].run != run
        or states[rank].phase != "finished"
        or not folder.trace(rank).exists()
    ]


def _bring(folder: RunFolder, state: RankState, home: Path) -> str:
    own, there = (shlex.quote(str(path)) for path in (shorten(folder.root), home))
    unpack = f"tar -C {there} -x"
    if state.home_host != state.host:
        unpack = f"ssh {shlex.quote(state.home_host)} {shlex.quote(unpack)}"
    return f"tar -C {own} -c traces ranks | {unpack}"


def _build_dag(result: RunResult, deployment: Deployment, folder: RunFolder, show: Callable[[str], None]) -> RunResult:
    from truedag.launch.page import make_page
    from truedag.launch.run_audit import audit_run
    from truedag.tracer.analysis.report import write_report
    from truedag.tracer.merge.merging import Resources, merge_traces

    show("merging the traces")
    merged = merge_traces(
        folder.traces,
        folder.dag,
        deployment=result.deployment,
        strategy=result.strategy,
        progress=show,
        resources=Resources.of_machine(),
    )
    show("reporting")
    write_report(folder.dag, folder.root)
    show("auditing")
    audited = audit_run(folder.dag, folder.root, deployment)
    pictures = draw_pictures(folder.dag, folder.views, show=show)
    page = make_page(folder.root, folder.views, progress=show)
    return dataclasses.replace(
        result,
        dag=folder.dag,
        views=folder.views,
        pictures=pictures.drawn,
        page=page.html,
        not_drawn=pictures.why_not,
        merge=dataclasses.asdict(merged),
        report=json.loads((folder.root / "report.json").read_text()),
        audit=audited,
    )
