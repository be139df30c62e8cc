"""Parameters by their logical names: what each is in the whole model, whatever rank holds which shard of it.

Theory of operation: a rank holds local layers, local experts and slices of weights, numbered from zero on every
stage. Here each parameter gets the name it has in the unsharded model (global layer and expert numbers), and the
rule by which this rank's slice is cut from the full tensor. Initial weights are the full tensor drawn from a
generator seeded by (seed, logical name), then cut: so the same model results whatever the strategy. One full tensor is
in memory at a time. Biases are drawn like weights: at zero, nothing would tell a bias that is lost from one that works.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from truedag.model.config import ModelConfig

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_GROUPED = re.compile(r"\.experts\.(linear_fc[12])\.weight$")
# Transformer Engine's grouped experts have a parameter each.
_NUMBERED = re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$")
SCORE_CORRECTION = ".router.expert_bias"
_TO_RESIDUAL = (".linear_proj.weight", ".linear_fc2.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """This rank's slice of one logical parameter, or its copy of a logical buffer."""

    name: str
    """In the unsharded model: ``decoder.layers.11.mlp.experts.local_experts.13.linear_fc1.weight``."""

    parameter: Tensor
    """Holds the slice: all of it, or one expert's part of a grouped parameter. A buffer has no gradient."""

    index: int | None
    """Which part of a grouped parameter; None: all of it."""

    dim: int | None
    """The dimension of the logical tensor that is split over the tensor-parallel ranks; None: replicated."""

    stride: int
    """Equal blocks along `dim`, each split by itself: 2 for a gated projection's gate and values, else 1."""

    is_expert: bool
    """Split over the expert tensor-parallel group, and held by one expert-parallel rank."""

    @property
    def data(self) -> Tensor:
        """The slice, sharing the parameter's memory."""
        return self.parameter.data if self.index is None else self.parameter.data[self.index]

    @property
    def gradient(self) -> Tensor:
        """The slice of megatron-core's accumulated gradient, sharing its memory."""
        gradient: Tensor = self.parameter.main_grad  # type: ignore[attr-defined]
        return gradient if self.index is None else gradient[self.index]

    def cut(self, full: Tensor, *, rank: int, size: int) -> Tensor:
        """Return the slice of the full tensor that rank `rank` of `size` tensor-parallel ranks holds."""
        if self.dim is None:
            return full
        blocks = full.chunk(self.stride, dim=self.dim)
        return torch.cat([block.chunk(size, dim=self.dim)[rank] for block in blocks], dim=self.dim)


def layer_name(layer: int) -> str:
    """Return the logical name of a layer, by its number in the whole model."""
    return f"decoder.layers.{layer}"


def expert_name(layer: int, expert: int) -> str:
    """Return the logical name of an expert, by its layer's and its own number in the whole model."""
    return f"{layer_name(layer)}.mlp.experts.local_experts.{expert}"


def shards(chunk: nn.Module, config: ModelConfig) -> Iterator[Shard]:
    """Yield this rank's slice of every logical parameter of a model chunk, in the chunk's order. Local."""
    parameter: Any
    for local_name, parameter in chunk.named_parameters():
        name, first_expert = _whole_name(chunk, local_name)
        if config.tied_embeddings and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        dim: int | None = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        stride = _stride(name, config)
        if match := _GROUPED.search(name):
            assert dim is not None
            prefix, linear = name[: match.start()], match.group(1)
            for index in range(parameter.shape[0]):
                yield Shard(
                    name=f"{prefix}.experts.local_experts.{first_expert + index}.{linear}.weight",
                    parameter=parameter,
                    index=index,
                    dim=dim - 1,
                    stride=stride,
                    is_expert=True,
                )
            continue
        is_expert = True
        if match := _EXPERT.search(name):
            expert = first_expert + int(match.group(1))
            name = f"{name[: match.start()]}.local_experts.{expert}.{name[match.end() :]}"
        elif match := _NUMBERED.search(name):
            expert = first_expert + int(match.group(2))
            name = f"{name[: match.start()]}.experts.local_experts.{expert}.{match.group(1)}.weight"
        else:
            is_expert = False
        yield Shard(name=name, parameter=parameter, index=None, dim=dim, stride=stride, is_expert=is_expert)


def buffers(chunk: nn.Module) -> Iterator[Shard]:
    """Yield a chunk's copies of the logical buffers that are part of the model: the score corrections. Local."""
    for local_name, buffer in chunk.named_buffers():
        if local_name.endswith(SCORE_CORRECTION):
            name, _ = _whole_name(chunk, local_name)
            yield Shard(name=name, parameter=buffer, index=None, dim=None, stride=1, is_expert=False)


def _whole_name(chunk: nn.Module, local_name: str) -> tuple[str, int]:
    """Return a name with its layer's number in the whole model, and the number of that layer's first expert here."""
    match = _LAYER.match(local_name)
    if match is None:
        return local_name, 0
    model: Any = chunk
    layer = model.decoder.layers[int(match.group(1))]
    experts = getattr(layer.mlp, "local_expert_indices", (0,))
    return f"{layer_name(layer.layer_number - 1)}.{local_name[match.end() :]}", experts[0]


def initialize(chunk: nn.Module, config: ModelConfig, *, tp: tuple[int, int], etp: tuple[int, int]) -> None:
    """Fill parameters and buffers of a chunk with this rank's slices of the seeded full tensors. Does not synchronise.

    Args:
        chunk: a GPTModel chunk.
        config: its model.
        tp: this rank and size in its tensor-parallel group.
        etp: the same for the expert tensor-parallel group.
    """
    with torch.no_grad():
        for shard in itertools.chain(shards(chunk, config), buffers(chunk)):
            rank, size = etp if shard.is_expert else tp
            if shard.name.endswith("norm.weight"):
                shard.data.fill_(1.0)
                continue
            shape = list(shard.data.shape)
            if shard.dim is not None:
                shape[shard.dim] *= size
            shard.data.copy_(shard.cut(_draw(shard.name, shape, config), rank=rank, size=size))


def _draw(name: str, shape: list[int], config: ModelConfig) -> Tensor:
    """Return the full initial tensor of a logical parameter: always drawn on the CPU in float32."""
    digest = hashlib.blake2b(f"{config.seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    std = config.init_std
    if name.endswith(_TO_RESIDUAL):
        std /= math.sqrt(2 * config.num_layers)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _stride(name: str, config: ModelConfig) -> int:
    return 2 if config.gated and ".linear_fc1." in name else 1
