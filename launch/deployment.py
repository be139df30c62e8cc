"""What to run, on which ranks, and what to record: a deployment file, checked before anything starts."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from truedag.model.config import ModelConfig
from truedag.parallel.strategy import Strategy, parse_strategy
from truedag.parallel.training import TrainingConfig, check_fit

Recorder = Literal["native", "python", "off"]


def _parse_notation(value: object) -> object:
    return parse_strategy(value) if isinstance(value, str) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainWorkload(TrainingConfig):
    """Training steps on the bytes of a text."""

    kind: Literal["train"] = "train"
    """What is done with the model."""

    text: Path
    """The file whose bytes are the tokens; a relative path starts at the deployment file's folder, in an
    override at the current one."""

    steps: int = 2
    """Training steps; those before the recorded one warm up."""


class Backend(BaseModel):
    """What the ranks run on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["gloo"] = "gloo"
    """torch.distributed's backend."""

    threads: int = Field(default=1, ge=1)
    """Compute threads of one rank."""

    collective_timeout_s: float = Field(default=120.0, gt=0)
    """A rank that waits longer in one communication fails."""

    run_timeout_s: float = Field(default=1800.0, gt=0)
    """All ranks are stopped when they have not ended after this."""


class Trace(BaseModel):
    """What is recorded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recorder: Recorder = "native"
    """native: the C++ observer; python: slower, needs no compiler; off: nothing is recorded and no DAG is made."""

    step: int = Field(default=1, ge=0)
    """The step that is recorded, counted from 0."""


class Deployment(BaseModel):
    """One deployment, complete and consistent: strategy, model and workload fit each other.

    Construction raises pydantic's ValidationError; `truedag.launch.deployment_file` turns it into one message.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run's folder."""

    description: str = ""
    """A sentence for `truedag deployments`."""

    ranks: int | None = Field(default=None, ge=1)
    """How many ranks there are; None: as many as the strategy needs."""

    model: ModelConfig
    """What is computed."""

    strategy: Annotated[Strategy, BeforeValidator(_parse_notation)]
    """Where it is computed: TP2-PP2-DP2-EP2-ETP1, EP64-TP8-PP2-DP2, or the sizes by axis (tp, pp, dp, ep, etp)."""

    workload: TrainWorkload
    """What is done with the model."""

    backend: Backend = Backend()
    """What the ranks run on."""

    trace: Trace = Trace()
    """What is recorded."""

    @model_validator(mode="after")
    def _check_fit(self) -> Self:
        check_fit(self.strategy, self.model, self.workload, world_size=self.world_size)
        if self.workload.steps < 1:
            raise ValueError(f"workload.steps={self.workload.steps}: there must be at least one step")
        if self.trace.step >= self.workload.steps:
            raise ValueError(
                f"trace.step={self.trace.step}: the run has steps 0 to {self.workload.steps - 1} "
                f"(workload.steps={self.workload.steps})"
            )
        return self

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.ranks if self.ranks is not None else self.strategy.world_size


class RunRecord(BaseModel):
    """run.json: what was asked for, in full, and where it ran. A rank needs nothing else to do its part."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    truedag_run: Literal[1] = 1
    """Version of this file's format; its presence makes a folder a run's folder."""

    source: Path
    """The deployment file."""

    overrides: tuple[str, ...]
    """As typed."""

    command: tuple[str, ...]
    """The command line."""

    started: str
    """Date and time, ISO 8601."""

    host: str
    """Name of the machine."""

    platform: str
    """Its operating system and processor."""

    cores: int
    """Cores of the machine."""

    launcher: int
    """Process id of `truedag run`."""

    versions: Mapping[str, str]
    """Of Python and of the packages that do the work."""

    strategy: str
    """The strategy in full."""

    deployment: Deployment
    """Every value, overrides applied, defaults filled in."""


PACKAGES = ("truedag", "torch", "megatron-core", "polars", "pygraphviz")


def installed_version(package: str) -> str:
    """Return a package's version, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
