"""Runs the programs of tests/programs, as they are, on gloo ranks of one start: recorded or not."""

from __future__ import annotations

import contextlib
import io
import os
import random
import runpy
import socket
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ranks import run_ranks

from truedag.tracer.record.recording import RecorderName, record

PROGRAMS = Path(__file__).parents[1] / "programs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One program's run: by which recorder, and into which folder; by none, then unrecorded."""

    program: str
    folder: Path | None = None
    recorder: RecorderName = "native"


def run_programs(world_size: int, runs: Sequence[Run], *, timeout_s: float) -> list[list[str]]:
    """Run one program after the other; return what each rank printed, by run and rank."""
    for run in runs:
        if run.folder is not None:
            run.folder.mkdir(parents=True)
    told = run_ranks(world_size, _run_all, runs, _free_ports(len(runs)), timeout_s=timeout_s, process_group=False)
    return [list(printed) for printed in zip(*told, strict=True)]


def _free_ports(count: int) -> list[int]:
    """Ports below those that the system gives out by itself, which may be gone by the time a program wants them."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(15000, 32000)
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            found.append(port)
    return found


def _run_all(runs: Sequence[Run], ports: Sequence[int]) -> list[str]:
    sys.path.insert(0, str(PROGRAMS))
    return [_run(run, port) for run, port in zip(runs, ports, strict=True)]


def _run(run: Run, port: int) -> str:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    path = PROGRAMS / f"{run.program}.py"
    sys.argv = [str(path)]
    recording = (
        record(run.folder / f"rank-{int(os.environ['RANK']):05d}.trace", recorder=run.recorder, synchronize=False)
        if run.folder is not None
        else contextlib.nullcontext()
    )
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.simplefilter("ignore")  # what the program makes PyTorch warn of is its own business
        try:
            with recording:
                runpy.run_path(str(path), run_name="__main__")
        except BaseException as error:
            raise RuntimeError(f"{run} failed") from error
    return printed.getvalue()
