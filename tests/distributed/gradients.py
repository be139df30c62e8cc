"""Trains on one rank, in its own process, and joins what the ranks held to the whole model's gradients."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from truedag.model.config import ModelConfig
from truedag.parallel.strategy import Strategy
from truedag.parallel.training import TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A rank's slice of a parameter's gradient."""

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
    slices: list[Slice]


def train(
    model: ModelConfig, strategies: list[Strategy], training: TrainingConfig, text: Path, steps: int, gradients: bool
) -> list[RankReport]:
    """Train under each strategy in turn, on this rank; gradients are those of the last step."""
    import torch

    from truedag.parallel.train import build_trainer

    reports = []
    for strategy in strategies:
        trainer = build_trainer(model, strategy, training, text=text, device=torch.device("cpu"))
        results = [trainer.step(index) for index in range(steps)]
        slices = []
        if gradients:
            tp, etp = trainer.groups.tp.rank(), trainer.groups.expt_tp.rank()
            slices = [
                Slice(
                    name=shard.name,
                    place=etp if shard.is_expert else tp,
                    dim=shard.dim,
                    stride=shard.stride,
                    values=shard.gradient.numpy().copy(),
                )
                for shard in trainer.shards()
            ]
        trainer.close()
        reports.append(
            RankReport(
                losses=[result.loss for result in results],
                norms=[result.gradient_norm for result in results],
                slices=slices,
            )
        )
    return reports


def whole_gradients(ranks: list[RankReport]) -> dict[str, Any]:
    """Return the gradient of every parameter of the whole model; replicas must be equal to the bit."""
    held: dict[str, dict[int, Slice]] = defaultdict(dict)
    for report in ranks:
        for piece in report.slices:
            twin = held[piece.name].setdefault(piece.place if piece.dim is not None else 0, piece)
            assert np.array_equal(twin.values, piece.values), f"replicas of the gradient of {piece.name} differ"
    return {name: _join([pieces[place] for place in sorted(pieces)]) for name, pieces in held.items()}


def _join(pieces: list[Slice]) -> Any:
    first = pieces[0]
    if first.dim is None:
        return first.values
    blocks = zip(*(np.split(piece.values, first.stride, axis=first.dim) for piece in pieces), strict=True)
    return np.concatenate([np.concatenate(block, axis=first.dim) for block in blocks], axis=first.dim)
