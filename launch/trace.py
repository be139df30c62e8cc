"""The flow of `truedag trace`: run a program as it is, recorded, and merge what its ranks left."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from truedag.launch.console import Progress, shorten
from truedag.launch.deployment import PACKAGES, Deployment, installed_version
from truedag.launch.errors import LaunchError, RunError
from truedag.launch.run import build_recorder
from truedag.launch.run_folder import ENDED, RUNNING, Launcher, RunFolder
from truedag.tracer.record.options import RecordOptions
from truedag.tracer.record.trace_folder import find_trace_folders

_GRACE_S = 40.0  # torchrun gives its ranks 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a person wants recorded, and how it is started."""

    arguments: tuple[str, ...]
    """The script or module, and what belongs to it."""

    is_module: bool
    torchrun: tuple[str, ...]
    """torchrun's options; none: the program starts its ranks itself, or is one."""

    @property
    def name(self) -> str:
        """What the recording is called."""
        first = self.arguments[0]
        return first.rpartition(".")[2] if self.is_module else Path(first).stem

    @property
    def node(self) -> int:
        """Which node this is."""
        told = dict(option.partition("=")[::2] for option in self.torchrun)
        text = told.get("--node-rank", "0")
        return int(text) if text.isdecimal() else 0

    @property
    def is_on_several_nodes(self) -> bool:
        """Whether torchrun is told of more than one."""
        return any(option.startswith("--nnodes=") and option != "--nnodes=1" for option in self.torchrun)

    def command(self, options: RecordOptions, *, python: Sequence[str], torchrun: Sequence[str]) -> list[str]:
        """Return what starts it, recorded."""
        own = [*options.arguments(), *(["-m"] if self.is_module else [])]
        if not self.torchrun:
            return [*python, "-m", "truedag.tracer.attach", *own, *self.arguments]
        # torchrun reads the program's options too, and refuses those that could be short for several of its own.
        end = ["--"] if any(argument.startswith("-") for argument in self.arguments) else []
        return [*torchrun, *self.torchrun, "-m", *end, "truedag.tracer.attach", *own, *self.arguments]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowResult:
    """What was recorded of some steps."""

    first_step: int | None
    """None: everything was to be recorded."""

    traces: Path
    dag: Path | None
    """None: not merged."""
    pictures: list[Path] = field(default_factory=list)
    not_drawn: str = ""
    """Why there are none, where there is a graph."""

    merge: Mapping[str, Any] = field(default_factory=dict)
    audit: Mapping[str, Any] = field(default_factory=dict)
    """Of the dataset: verdict, num_faults and the file that says more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceResult:
    """What came out of a recorded program."""

    program: str
    out: Path
    windows: list[WindowResult]
    is_elsewhere: bool
    """Whether all traces were collected on another node."""
    seconds: float


def trace_program(
    program: Program,
    options: RecordOptions,
    *,
    deployment: Deployment | None,
    merges: bool,
    prints_json: bool,
    command: Sequence[str],
    progress: Progress,
) -> TraceResult:
    """Run a program with this process's input and output, recorded; merge each window into a dataset beside it.

    On several nodes each calls it. The first one makes the folder and merges; where traces are collected, the node on
    which they are, and that is rank 0's, which a rendezvous may put anywhere.

    Args:
        program: what is started.
        options: what is recorded, and where it goes.
        deployment: what the audit compares the datasets with; None: with nothing.
        merges: whether datasets are made.
        prints_json: whether stdout is kept for the result: the program's goes to stderr.
        command: the command line, for the folder's record.
        progress: hears what goes on.

    Raises:
        FolderError: the output folder is in the way.
        LaunchError: there is no such script, or the recorder could not be built.
        RunError: the program failed, was interrupted, or nothing was recorded.
        TruedagError: the traces could not be merged.
    """
    started = time.monotonic()
    script = Path(program.arguments[0])
    if not program.is_module and not script.is_file():
        raise LaunchError(f"there is no script {script}: what is recorded is a Python file, or with -m a module")
    folder = RunFolder(root=options.out.absolute())
    is_first = program.node == 0
    if is_first:
        folder.check_free(replace=options.force)
    if options.recorder == "native":
        build_recorder(progress.show)
    if is_first:
        folder.make(replace=options.force)
        _write_record(folder, program, options, command)
    progress.close()
    try:
        exit_code = _run(program, options, prints_json=prints_json)
    except KeyboardInterrupt as error:
        raise RunError(f"interrupted; the program has been stopped.\n{_describe_kept(folder)}") from error
    finally:
        _end(folder, program.node)
    if exit_code != 0:
        raise RunError(f"the program {_describe_end(exit_code)}; what it printed says why.\n{_describe_kept(folder)}")
    traces = find_trace_folders(folder.root)
    if not traces and is_first:
        raise RunError(f"the program ended well, but nothing was recorded in {shorten(folder.root)}: see above")
    has_all = is_first
    if options.collect and program.is_on_several_nodes:
        has_all = _has_collected(traces, options, is_first=is_first)
        if has_all and not is_first:
            has_all = _take_over(folder, program, options, command)
    windows = [_merge(path, program, deployment, merges=merges and has_all, progress=progress) for path in traces]
    return TraceResult(
        program=program.name,
        out=folder.root,
        windows=windows,
        is_elsewhere=options.collect and not has_all,
        seconds=time.monotonic() - started,
    )


def _has_collected(traces: Sequence[Path], options: RecordOptions, *, is_first: bool) -> bool:
    """Whether all traces are here: they came by wire, or lie on a disk that all nodes share."""
    if any(any(path.glob("*.trace.gz")) for path in traces):
        return True
    first_rank = min(options.wanted_ranks or {0})
    return is_first and any((path / f"rank-{first_rank:05d}.trace").exists() for path in traces)


def _take_over(folder: RunFolder, program: Program, options: RecordOptions, command: Sequence[str]) -> bool:
    """Make the folder that of the whole recording, unless another node has."""
    try:
        folder.record.touch(exist_ok=False)
    except FileExistsError:
        return False
    folder.node(0).parent.mkdir(exist_ok=True)
    _write_record(folder, program, options, command)
    folder.node(0).write_text(ENDED)
    return True


def write_command(program: Program, options: RecordOptions) -> str:
    """What to start on a cluster, and what makes the graph of it afterwards, as lines of a shell."""
    out = options.out
    single = options.schedule is None or options.schedule.is_single
    traces, dag = (out / name if single else out / "windows" / "step-N" / name for name in ("traces", "dag"))
    return (
        shlex.join(program.command(options, python=["python"], torchrun=["torchrun"]))
        + "\n# afterwards, where the traces are"
        + ("" if single else ", for each step-N")
        + f":\n# {shlex.join(['truedag', 'merge', str(traces), '--out', str(dag)])}\n"
    )


def _run(program: Program, options: RecordOptions, *, prints_json: bool) -> int:
    command = program.command(
        options,
        python=[sys.executable],
        torchrun=[sys.executable, "-m", "torch.distributed.run"],
    )
    process = subprocess.Popen(command, stdout=sys.stderr.fileno() if prints_json else None)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
        if process.poll() is None:
            process.kill()
            process.wait()


def _write_record(folder: RunFolder, program: Program, options: RecordOptions, command: Sequence[str]) -> None:
    record = {
        "truedag_run": 1,
        "kind": "trace",
        "command": list(command),
        "program": list(program.arguments),
        "is_module": program.is_module,
        "torchrun": list(program.torchrun),
        "options": asdict(options),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": platform.platform(),
        "cores": os.cpu_count() or 1,
        "versions": {"python": platform.python_version()} | {name: installed_version(name) for name in PACKAGES},
    }
    folder.record.write_text(json.dumps(record, indent=2, default=str) + "\n")
    folder.node(0).write_text(f"{RUNNING} {Launcher.here().mark()}")


def _end(folder: RunFolder, node: int) -> None:
    """Say that nothing writes there any more, and take away what nothing was written into."""
    if node == 0:
        with suppress(OSError):  # the program may have taken the folder away
            folder.node(0).write_text(ENDED)
    for place in (folder.traces, folder.ranks, folder.logs):
        with suppress(OSError):
            place.rmdir()


def _merge(
    traces: Path, program: Program, deployment: Deployment | None, *, merges: bool, progress: Progress
) -> WindowResult:
    window = traces.parent
    number = window.name.removeprefix("step-")
    first_step = int(number) if window.parent.name == "windows" and number.isdecimal() else None
    if not merges:
        return WindowResult(first_step=first_step, traces=traces, dag=None)
    from truedag.launch.run_audit import audit_run
    from truedag.tracer.errors import DrawError
    from truedag.tracer.merge.merging import Resources, merge_traces
    from truedag.tracer.views.draw import draw

    dag = window / "dag"
    name = program.name if deployment is None else deployment.name
    strategy = None if deployment is None else deployment.strategy.describe()
    merged = merge_traces(
        traces,
        dag,
        deployment=name,
        strategy=strategy,
        progress=progress.show,
        resources=Resources.of_machine(),
    )
    progress.show("drawing")
    try:
        pictures = [drawing.svg for drawing in draw(dag, window / "views", progress=progress.show)]
        not_drawn = ""
    except DrawError as error:  # the graph is there all the same
        pictures, not_drawn = [], str(error)
    progress.show("auditing")
    return WindowResult(
        first_step=first_step,
        traces=traces,
        dag=dag,
        pictures=pictures,
        not_drawn=not_drawn,
        merge=asdict(merged),
        audit=audit_run(dag, window, deployment),
    )


def _describe_end(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    return f"was killed by {name}"


def _describe_kept(folder: RunFolder) -> str:
    traces = find_trace_folders(folder.root)
    if not traces:
        return "Nothing had been recorded."
    last = traces[-1]
    kept, dag = (shlex.quote(str(shorten(path))) for path in (last, last.parent / "dag"))
    more = f", and {len(traces) - 1} windows before it" if len(traces) > 1 else ""
    return f"What had been recorded is kept in {kept}{more}.\nnext: truedag merge {kept} --out {dag}"
