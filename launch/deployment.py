"""What to run, on which ranks, and what to record: a deployment file, checked before anything starts."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from truedag.launch.workload import Workload, check_workload
from truedag.model.config import ModelConfig
from truedag.model.huggingface import read_huggingface
from truedag.parallel.strategy import Strategy, parse_strategy

Recorder = Literal["native", "python", "off"]

_LONGEST_S = 1e7


def _parse_notation(value: object) -> object:
    return parse_strategy(value) if isinstance(value, str) else value


def _read_huggingface(value: object) -> object:
    """Put what a config.json says in the place of its path; what stands beside the path has the last word."""
    if not isinstance(value, Mapping) or value.get("huggingface") is None:
        return value
    own = {key: field for key, field in value.items() if key != "huggingface"}
    longest = own.get("max_sequence_length")
    return {**read_huggingface(Path(str(value["huggingface"])), max_sequence_length=longest), **own}


class Backend(BaseModel):
    """What the ranks run on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["gloo", "nccl"] = "gloo"
    """torch.distributed's backend."""

    device: Literal["cpu", "cuda"] = "cpu"
    """What the ranks compute on; unsaid, cuda with nccl and cpu with gloo. Under gloo several ranks may share a GPU."""

    threads: int = Field(default=1, ge=1)
    """Compute threads of one rank."""

    collective_timeout_s: float = Field(default=120.0, gt=0, le=_LONGEST_S)
    """A rank that waits longer in one communication fails."""

    run_timeout_s: float = Field(default=1800.0, gt=0, le=_LONGEST_S)
    """All ranks are stopped when they have not ended after this."""

    @model_validator(mode="before")
    @classmethod
    def _choose_device(cls, values: object) -> object:
        if isinstance(values, Mapping) and values.get("device") is None:
            return {**values, "device": "cuda" if values.get("name") == "nccl" else "cpu"}
        return values

    @model_validator(mode="after")
    def _check_device(self) -> Self:
        if self.name == "nccl" and self.device == "cpu":
            raise ValueError("name=nccl needs device=cuda: NCCL moves data between GPUs only (on the CPU: name=gloo)")
        return self


class Trace(BaseModel):
    """What is recorded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recorder: Recorder = "native"
    """native: the C++ observer; python: slower, needs no compiler; off: nothing is recorded and no DAG is made."""

    step: int = Field(default=1, ge=0)
    """The step that is recorded, counted from 0."""

    routing: bool = False
    """Whether to write beside the traces how many tokens the routers sent to each expert in that step, for dry runs."""


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

    model: Annotated[ModelConfig, BeforeValidator(_read_huggingface)]
    """What is computed; the key huggingface stands for what that config.json says, which other keys change."""

    weights: Path | None = None
    """A folder of safetensors files in Hugging Face's naming, of which each rank reads its shards; None: drawn from
    model.seed. Relative paths as for workload.text."""

    strategy: Annotated[Strategy, BeforeValidator(_parse_notation)]
    """Where it is computed: TP2-PP2-DP2-EP2-ETP1, EP64-TP8-PP2-DP2, or the sizes by axis (tp, pp, dp, ep, etp)."""

    workload: Workload
    """What is done with the model."""

    backend: Backend = Backend()
    """What the ranks run on."""

    trace: Trace = Trace()
    """What is recorded."""

    @model_validator(mode="after")
    def _check_fit(self) -> Self:
        check_workload(self.workload, self.strategy, self.model, world_size=self.world_size)
        if self.model.implementation == "transformer_engine" and self.backend.device == "cpu":
            raise ValueError("model.implementation=transformer_engine needs backend.device=cuda; on the CPU: truedag")
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

    run: str
    """Names this run and no other; every rank's state repeats it, so that files of two runs are never taken for one."""

    num_nodes: int
    """On how many nodes it was started."""

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
