"""What a rank does with its model, by kind of workload: built once, run iteration by iteration."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from truedag.launch.deployment import Deployment
from truedag.launch.rank_state import RankState
from truedag.launch.results import GenerationResult, StepResult
from truedag.launch.workload import InferWorkload, TrainWorkload, open_source
from truedag.parallel.routing import write_routing

if TYPE_CHECKING:
    import torch
    from torch import nn

    from truedag.parallel import train as training
    from truedag.parallel.generation import Generation
    from truedag.parallel.injection import RouterWatch


class Runner(Protocol):
    """One rank's part of a workload. Every rank calls the same methods in the same order; they synchronise."""

    @property
    def model_chunks(self) -> list[tuple[str, nn.Module]]:
        """This rank's chunks of the model, by name: the modules that a recording watches."""

    def run(self, index: int) -> None:
        """Run one iteration."""

    def report(self, index: int, *, recorded: bool, state: RankState) -> None:
        """Add what came of the last iteration to the state; it may communicate, so it must not be recorded."""

    def write_routing(self, path: Path) -> None:
        """Write how many tokens this rank's routers sent to each expert in the last iteration. Local."""

    def close(self) -> None:
        """Take process groups and adapters away; the default group stays."""


def build_runner(deployment: Deployment, *, device: torch.device, timeout: timedelta) -> Runner:
    """Build this rank's part of the deployment. The default process group must exist. Every rank must call it."""
    workload = deployment.workload
    if isinstance(workload, TrainWorkload):
        return _TrainRunner(deployment, workload, device=device, timeout=timeout)
    return _InferRunner(deployment, workload, device=device, timeout=timeout)


class _TrainRunner:
    """Training steps."""

    def __init__(
        self, deployment: Deployment, workload: TrainWorkload, *, device: torch.device, timeout: timedelta
    ) -> None:
        from truedag.parallel.train import build_trainer

        self._trainer = build_trainer(
            deployment.model,
            deployment.strategy,
            workload,
            text=workload.text,
            tokenizer=workload.tokenizer,
            token_dtype=workload.token_dtype,
            device=device,
            timeout=timeout,
            weights=deployment.weights,
            watch_routing=deployment.trace.routing,
        )
        self._result: training.StepResult | None = None

    @property
    def model_chunks(self) -> list[tuple[str, nn.Module]]:
        return self._trainer.model_chunks

    def run(self, index: int) -> None:
        self._result = self._trainer.step(index)

    def report(self, index: int, *, recorded: bool, state: RankState) -> None:
        assert self._result is not None
        state.steps.append(
            StepResult(
                step=index,
                recorded=recorded,
                wall_ns=self._result.wall_ns,
                loss=self._result.loss,
                gradient_norm=self._result.gradient_norm,
            )
        )

    def write_routing(self, path: Path) -> None:
        _write_routing(self._trainer.routers, path)

    def close(self) -> None:
        self._trainer.close()


class _InferRunner:
    """Tokens for prompts."""

    def __init__(
        self, deployment: Deployment, workload: InferWorkload, *, device: torch.device, timeout: timedelta
    ) -> None:
        from truedag.parallel.generate import build_generator
        from truedag.parallel.prompts import Prompts

        self._generator = build_generator(
            deployment.model,
            deployment.strategy,
            workload,
            prompts=Prompts(open_source(workload, deployment.model)),
            device=device,
            timeout=timeout,
            weights=deployment.weights,
            watch_routing=deployment.trace.routing,
        )
        self._generation: Generation | None = None

    @property
    def model_chunks(self) -> list[tuple[str, nn.Module]]:
        return self._generator.model_chunks

    def run(self, index: int) -> None:
        self._generation = self._generator.run(index)

    def report(self, index: int, *, recorded: bool, state: RankState) -> None:
        assert self._generation is not None
        result = self._generator.summarize(self._generation)
        state.generations.append(
            GenerationResult(
                step=index,
                recorded=recorded,
                wall_ns=result.wall_ns,
                prefill_ns=result.prefill_ns,
                tokens=result.tokens,
                time_to_first_token_ns=result.time_to_first_token_ns,
                time_per_output_token_ns=result.time_per_output_token_ns,
                decode_step_ns=result.decode_step_ns,
                prefill_tokens_per_s_per_rank=result.prefill_tokens_per_s_per_rank,
                decode_tokens_per_s_per_rank=result.decode_tokens_per_s_per_rank,
                generated_tokens_per_s_per_rank=result.generated_tokens_per_s_per_rank,
                num_not_finite=result.num_not_finite,
            )
        )

    def write_routing(self, path: Path) -> None:
        _write_routing(self._generator.routers, path)

    def close(self) -> None:
        self._generator.close()


def _write_routing(routers: RouterWatch | None, path: Path) -> None:
    assert routers is not None, "the routers were not watched"
    path.parent.mkdir(exist_ok=True)
    write_routing(path, routers.tokens())
