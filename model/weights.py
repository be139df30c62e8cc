"""Fills a chunk of a model from a checkpoint: each rank reads its slices, and nothing else."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from truedag.model.checkpoint import Checkpoint, Piece
from truedag.model.parameters import Shard, buffers, shards


def load(chunk: nn.Module, checkpoint: Checkpoint, *, tp: tuple[int, int], etp: tuple[int, int]) -> int:
    """Fill a chunk's parameters and buffers with this rank's slices. Local; does not synchronise.

    Values are converted to the type of the parameter. One parameter's slice is in memory at a time.

    Args:
        chunk: a GPTModel chunk of the checkpoint's model.
        checkpoint: what to read.
        tp: this rank and size in its tensor-parallel group.
        etp: the same for the expert tensor-parallel group.

    Returns:
        How many bytes were read.
    """
    num_bytes = 0
    with ExitStack() as opened, torch.no_grad():
        files: dict[Path, Any] = {}
        for shard in itertools.chain(shards(chunk, checkpoint.config), buffers(chunk)):
            recipe = checkpoint.recipe(shard.name)
            rank, size = etp if shard.is_expert else tp
            parts = []
            for piece in recipe.pieces:
                path = checkpoint.file(piece.tensor)
                if path not in files:
                    files[path] = opened.enter_context(safe_open(path, framework="pt"))
                parts.append(_read(files[path].get_slice(piece.tensor), piece, shard, rank, size))
            num_bytes += sum(part.nbytes for part in parts)
            shard.data.copy_(_interleave(parts, max(1, recipe.groups // size)))
    return num_bytes


def _read(tensor: Any, piece: Piece, shard: Shard, rank: int, size: int) -> Tensor:
    """Return what a rank of `size` tensor-parallel ranks holds of a piece."""
    ranges = [(0, length) for length in piece.shape]
    first = 0
    if piece.expert is not None:
        ranges[0] = (piece.expert, piece.expert + 1)
        first = 1
    if piece.half is not None:
        length = piece.shape[first] // 2
        ranges[first] = (piece.half * length, (piece.half + 1) * length)
    if shard.dim is not None:
        start, stop = ranges[first + shard.dim]
        length = (stop - start) // size
        ranges[first + shard.dim] = (start + rank * length, start + (rank + 1) * length)
    part: Tensor = tensor[tuple(slice(start, stop) for start, stop in ranges)]
    return part if piece.expert is None else part[0]


def _interleave(parts: list[Tensor], groups: int) -> Tensor:
    """Return the rows of all parts: the first of `groups` equal parts of each, the second of each, ..."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 1)
