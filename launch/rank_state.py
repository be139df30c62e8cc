"""What each rank tells the launcher while it runs, in a file of its own that is always whole."""

from __future__ import annotations

import re
import time
import traceback
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from truedag.launch.progress import Progress, take_progress
from truedag.launch.results import GenerationResult, StepResult

# gloo's places in its own sources and its advice say nothing to whoever reads the message; the traceback has them.
_NOISE = re.compile(r"\[\S+\.cc:\d+\] | This is typically caused by .*", re.DOTALL)

Phase = Literal["starting", "building", "warm-up step", "recorded step", "later step", "finished"]


class RankError(BaseModel):
    """What ended this rank."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    message: str
    traceback: str
    time_ns: int
    stalls: str = ""
    """Which communications hung and who was missing; empty where it was not that, or nobody knows."""


class RankState(BaseModel):
    """Where a rank is, and what came of it."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    rank: int
    pid: int
    run: str = ""
    """Names the run (`truedag.launch.deployment.RunRecord`), as rank 0's node named it."""

    node: int = 0
    """The node it runs on, as `--node-rank` numbers them."""

    host: str = ""
    home: str = ""
    """The run's folder on rank 0's node: where the DAG is built."""

    home_host: str = ""
    """The name of that node."""

    phase: Phase = "starting"
    coordinates: dict[str, int] = Field(default_factory=dict)
    steps: list[StepResult] = Field(default_factory=list)
    generations: list[GenerationResult] = Field(default_factory=list)
    error: RankError | None = None
    stopped: bool = False
    """Whether it was told to end."""

    progress: Progress | None = None
    """How far it had come when it failed, was told to end, or another rank failed."""

    def fail(self, error: BaseException) -> None:
        """Keep what ended the rank, and how far it had come."""
        self.progress = take_progress(error=error)
        self.error = RankError(
            message=f"{type(error).__name__}: {_NOISE.sub('', str(error))}",
            traceback="".join(traceback.format_exception(error)),
            time_ns=time.time_ns(),
        )

    def write(self, path: Path) -> None:
        """Put the state at `path` in one step, so that a reader never sees half of it."""
        unfinished = path.with_suffix(f".{uuid.uuid4().hex}.part")
        unfinished.write_text(self.model_dump_json(indent=2))
        unfinished.replace(path)


def read_states(folder: Path) -> dict[int, RankState]:
    """The states in `folder` by rank; ranks that have not said anything yet are absent."""
    states = (RankState.model_validate_json(path.read_bytes()) for path in sorted(folder.glob("rank-*.json")))
    return {state.rank: state for state in states}


def find_silent(folder: Path, states: Mapping[int, RankState], limit_s: float) -> list[int]:
    """The ranks of `states` that run and have not shown it for `limit_s`: stopped, or stuck without Python's lock."""
    silent = []
    for rank, state in states.items():
        if state.phase == "finished" or state.error is not None or state.stopped:
            continue
        with suppress(FileNotFoundError):
            if time.time() - (folder / f"rank-{rank:05d}.json").stat().st_mtime > limit_s:
                silent.append(rank)
    return silent


def read_cause(path: Path) -> RankState | None:
    """The state of the rank that ended the run, as the ranks told each other; None: no rank did, or nobody said so."""
    return RankState.model_validate_json(path.read_bytes()) if path.exists() else None
