"""Parameters by their logical names: what each is in the whole model, whatever rank holds which shard of it.

Theory of operation: a rank holds local layers, local experts and slices of weights, numbered from zero on every
stage. Here each parameter gets the name it has in the unsharded model (global layer and expert numbers), and the
rule by which this rank's slice is cut from the full tensor. Initial weights are the full tensor drawn from a
generator seeded by (seed, logical name), then cut: so the same model results whatever the strategy.
"""

from __future__ import annotations

import hashlib
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
_TO_RESIDUAL = (".linear_proj.weight", ".linear_fc2.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """This rank's slice of one logical parameter."""

    name: str
    """In the unsharded model: ``decoder.layers.11.mlp.experts.local_experts.13.linear_fc1.weight``."""

    parameter: nn.Parameter
    """Holds the slice: all of it, or one expert's part of a grouped parameter."""

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
    model: Any = chunk
    layers = {str(index): layer for index, layer in enumerate(model.decoder.layers)}
    for local_name, parameter in model.named_parameters():
        name = local_name
        first_expert = 0
        if match := _LAYER.match(name):
            layer = layers[match.group(1)]
            name = f"{layer_name(layer.layer_number - 1)}.{name[match.end() :]}"
            first_expert = layer.mlp.local_expert_indices[0] if config.num_experts is not None else 0
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
        match = _EXPERT.search(name)
        if match:
            expert = first_expert + int(match.group(1))
            name = f"{name[: match.start()]}.local_experts.{expert}.{name[match.end() :]}"
        yield Shard(name=name, parameter=parameter, index=None, dim=dim, stride=stride, is_expert=match is not None)


def initialize(chunk: nn.Module, config: ModelConfig, *, tp: tuple[int, int], etp: tuple[int, int]) -> None:
    """Fill a chunk's parameters with this rank's slices of the seeded full tensors. Local; does not synchronise.

    Args:
        chunk: a GPTModel chunk.
        config: its model.
        tp: this rank and size in its tensor-parallel group.
        etp: the same for the expert tensor-parallel group.
    """
    with torch.no_grad():
        for shard in shards(chunk, config):
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
    return 2 if config.gated and name.endswith("linear_fc1.weight") else 1
