"""Switches sequence parallelism of a chunk off for decoding, and on again.

megatron-core's own switch (set_model_to_sequence_parallel) sets all modules to one value, those of experts included,
which are never sequence-parallel, and remembers a model by its address, which a later model may have.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_ATTRIBUTES = ("sequence_parallel", "reduce_scatter_embeddings")


class SequenceParallelSwitch:
    """The places in a chunk that say whether it is sequence-parallel: those that said yes when it was built. Local.

    For forward passes without gradients only: how a gradient is summed is decided at construction.
    """

    def __init__(self, chunk: nn.Module) -> None:
        configs = {id(module.config): module.config for module in chunk.modules() if hasattr(module, "config")}
        owners: list[Any] = [*chunk.modules(), *configs.values()]
        self._places = [(owner, name) for owner in owners for name in _ATTRIBUTES if getattr(owner, name, None) is True]
        self._is_on = True

    def turn(self, is_on: bool) -> None:
        """Make the next forward passes sequence-parallel, or not. Every tensor-parallel rank must do the same."""
        if is_on != self._is_on:
            for owner, name in self._places:
                setattr(owner, name, is_on)
            self._is_on = is_on
