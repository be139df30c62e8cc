"""What each rank tells the launcher while it runs, in a file of its own that is always whole."""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Phase = Literal["starting", "building", "warm-up step", "recorded step", "later step", "finished"]


class StepResult(BaseModel):
    """One training step as this rank saw it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    recorded: bool
    wall_ns: int
    loss: float
    """Mean over the tokens of the global batch, in nats; the same on every rank."""
    gradient_norm: float
    """L2 norm of the whole model's gradient, before clipping; the same on every rank."""


class RankError(BaseModel):
    """What ended this rank."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    message: str
    traceback: str
    time_ns: int


class RankState(BaseModel):
    """Where a rank is, and what came of it."""

    model_config = ConfigDict(extra="forbid")

    rank: int
    pid: int
    phase: Phase = "starting"
    coordinates: dict[str, int] = Field(default_factory=dict)
    steps: list[StepResult] = Field(default_factory=list)
    error: RankError | None = None

    def fail(self, error: BaseException) -> None:
        """Keep what ended the rank."""
        self.error = RankError(
            message=f"{type(error).__name__}: {error}",
            traceback="".join(traceback.format_exception(error)),
            time_ns=time.time_ns(),
        )

    def write(self, path: Path) -> None:
        """Put the state at `path` in one step, so that a reader never sees half of it."""
        unfinished = path.with_suffix(".part")
        unfinished.write_text(self.model_dump_json(indent=2))
        unfinished.replace(path)


def read_states(folder: Path) -> dict[int, RankState]:
    """The states in `folder` by rank; ranks that have not said anything yet are absent."""
    states = (RankState.model_validate_json(path.read_bytes()) for path in sorted(folder.glob("rank-*.json")))
    return {state.rank: state for state in states}
