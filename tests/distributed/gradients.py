"""Trains on one rank, in its own process, and joins what the ranks held to the whole model's gradients and parameters.

A slice is as large as what the rank holds of a parameter; what the rank has no valid value of is NaN there: under the
distributed optimizer, all of a gradient that is not this rank's to update.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from truedag.model.config import ModelConfig
from truedag.parallel.strategy import Strategy
from truedag.parallel.training import TrainingConfig

_FINALIZE = "megatron.core.distributed.finalize_model_grads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A training, and a fault to build into it."""

    model: ModelConfig
    strategy: Strategy
    training: TrainingConfig
    fault: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A rank's slice of a parameter, of its gradient, or a buffer of the model."""

    name: str
    place: int
    dim: int | None
    stride: int
    values: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What training came to on one rank."""

    losses: list[float]
    norms: list[float]
    gradients: list[Slice]
    parameters: list[Slice]


def train(runs: list[Run], text: Path, steps: int, slices: bool) -> list[RankReport]:
    """Do each run in turn, on this rank; the gradients are those of the last step, the parameters those after it."""
    reports = []
    for run in runs:
        with _fault(run.fault):
            reports.append(_train(run, text, steps, slices))
    return reports


def _train(run: Run, text: Path, steps: int, slices: bool) -> RankReport:
    import torch

    from truedag.model.parameters import buffers
    from truedag.parallel.train import build_trainer

    trainer = build_trainer(run.model, run.strategy, run.training, text=text, device=torch.device("cpu"))
    results = [trainer.step(index) for index in range(steps)]
    trainer.gather_parameters()
    kept = trainer.shards() if slices else []
    others = [buffer for chunk in trainer.chunks for buffer in buffers(chunk)] if slices else []
    report = RankReport(
        losses=[result.loss for result in results],
        norms=[float("nan") if result.gradient_norm is None else result.gradient_norm for result in results],
        gradients=[_cut(trainer, shard, _own_part(trainer, shard)) for shard in kept],
        parameters=[_cut(trainer, shard, shard.data.float().numpy().copy()) for shard in (*kept, *others)],
    )
    trainer.close()
    return report


def _cut(trainer: Any, shard: Any, values: Any) -> Slice:
    group = trainer.groups.expt_tp if shard.is_expert else trainer.groups.tp
    return Slice(name=shard.name, place=group.rank(), dim=shard.dim, stride=shard.stride, values=values)


def _own_part(trainer: Any, shard: Any) -> Any:
    """Return the gradient of what this rank updates, NaN elsewhere."""
    from truedag.parallel.annotation import held_parts

    whole = np.full(shard.parameter.numel(), np.nan, dtype=np.float32)
    gradient = shard.parameter.main_grad.numpy().reshape(-1)
    for optimizer in trainer._optimizer.chained_optimizers:
        for holder, start in held_parts(optimizer, shard.parameter):
            part = slice(start, start + holder.numel())
            whole[part] = gradient[part]
    whole = whole.reshape(shard.parameter.shape)
    return whole if shard.index is None else whole[shard.index]


@contextmanager
def _fault(name: str | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if name is not None:
            _FAULTS[name](patch)
        yield


def _skip_data_parallel_reduction(patch: pytest.MonkeyPatch) -> None:
    from megatron.core.distributed import DistributedDataParallel

    patch.setattr(DistributedDataParallel, "finish_grad_sync", lambda *_, **__: None)


def _skip_norms_reduction(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(importlib.import_module(_FINALIZE), "_allreduce_non_tensor_model_parallel_grads", lambda *_: None)


def _skip_tied_embeddings_reduction(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(importlib.import_module(_FINALIZE), "_allreduce_word_embedding_grads", lambda *_: None)


def _keep_own_keys_gradient(patch: pytest.MonkeyPatch) -> None:
    from torch import distributed

    def scatter(output: Any, whole: Any, group: Any = None, **_: Any) -> None:
        output.copy_(whole.chunk(group.size())[group.rank()])

    patch.setattr(distributed, "reduce_scatter_tensor", scatter)


def _let_everything_through(patch: pytest.MonkeyPatch) -> None:
    from truedag.parallel import train

    patch.setattr(train, "check_fit", lambda *_, **__: None)


def _take_turns_without_overlap(patch: pytest.MonkeyPatch) -> None:
    from truedag.parallel import train

    made = train.transformer_config

    def config(*arguments: Any) -> Any:
        config = made(*arguments)
        config.overlap_p2p_comm, config.batch_p2p_comm = False, True
        return config

    patch.setattr(train, "transformer_config", config)


_FAULTS = {
    "data-parallel gradients are not reduced": _skip_data_parallel_reduction,
    "norms' gradients are not reduced": _skip_norms_reduction,
    "tied embeddings' gradients are not reduced": _skip_tied_embeddings_reduction,
    "other ranks' gradients of keys are lost": _keep_own_keys_gradient,
    "nothing is refused": _let_everything_through,
    "interleaved, and not overlapped": _take_turns_without_overlap,
}


def whole(slices: Iterator[Slice]) -> dict[str, Any]:
    """Return every tensor of the whole model; replicas must be equal to the bit."""
    held: dict[str, dict[int, Slice]] = defaultdict(dict)
    for piece in slices:
        place = piece.place if piece.dim is not None else 0
        twin = held[piece.name].setdefault(place, piece)
        here, there = ~np.isnan(piece.values), ~np.isnan(twin.values)
        assert np.array_equal(twin.values[here & there], piece.values[here & there]), f"replicas of {piece.name} differ"
        held[piece.name][place] = replace(piece, values=np.where(there, twin.values, piece.values))
    joined = {name: _join([pieces[place] for place in sorted(pieces)]) for name, pieces in held.items()}
    for name, values in joined.items():
        assert not np.isnan(values).any(), f"no rank has all of {name}"
    return joined


def _join(pieces: list[Slice]) -> Any:
    first = pieces[0]
    if first.dim is None:
        return first.values
    blocks = zip(*(np.split(piece.values, first.stride, axis=first.dim) for piece in pieces), strict=True)
    return np.concatenate([np.concatenate(block, axis=first.dim) for block in blocks], axis=first.dim)
