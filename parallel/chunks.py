"""This rank's chunks of a model: one, or as many as the strategy has on each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from truedag.model.build import Sharding, build_chunk
from truedag.model.config import ModelConfig
from truedag.parallel.groups import is_first_stage, is_last_stage
from truedag.parallel.strategy import Strategy
from truedag.parallel.training import Recompute


def sharding(strategy: Strategy, *, sequence_parallel: bool, recompute: Recompute = "none") -> Sharding:
    """Return what the model's modules have to know of a strategy; sequence parallelism has no effect at TP1."""
    return Sharding(
        tp=strategy.tp,
        cp=strategy.cp,
        pp=strategy.pp,
        vpp=strategy.vpp,
        ep=strategy.ep,
        etp=strategy.etp,
        sequence_parallel=sequence_parallel and strategy.tp > 1,
        recompute=recompute,
    )


def build_chunks(
    model: ModelConfig,
    transformer: Any,
    strategy: Strategy,
    groups: Any,
    *,
    device: torch.device,
    weights: Path | None = None,
) -> list[nn.Module]:
    """Build this rank's chunks, from the first layers to the last. Every rank of the pipeline group must call it.

    Args:
        model: what is built.
        transformer: from `truedag.model.build.transformer_config`, for the same model and strategy.
        strategy: how many chunks a stage has.
        groups: from `init_groups`.
        device: where the chunks go.
        weights: a folder of Hugging Face safetensors; None: seeded weights.
    """
    return [
        build_chunk(
            model,
            transformer,
            pre_process=is_first_stage(groups) and chunk == 0,
            post_process=is_last_stage(groups) and chunk == strategy.vpp - 1,
            pg_collection=groups,
            device=device,
            vp_stage=chunk,
            weights=weights,
        )
        for chunk in range(strategy.vpp)
    ]


def name_chunks(chunks: list[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Return chunks with the names that they have in a recording."""
    if len(chunks) == 1:
        return [("model", chunks[0])]
    return [(f"model.chunks.{number}", chunk) for number, chunk in enumerate(chunks)]
