"""Tells the tracer what the executor's modules and tensors are, by their names in the whole model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.optimizer import DistributedOptimizer
from torch import Tensor, nn

from truedag.model.parameters import Shard, buffers, expert_name, layer_name
from truedag.tracer import annotate

_EXPERT = re.compile(r"\.local_experts\.\d+\.")


class ModelNames:
    """Names modules and tensors, and keeps the tensors: a name lasts as long as its tensor object."""

    def __init__(self) -> None:
        self._named: list[Tensor] = []

    def name_modules(self, chunk: nn.Module) -> None:
        """Say which layer and expert, by their numbers in the whole model, each module of a chunk is. Local."""
        model: Any = chunk
        for layer in model.decoder.layers:
            number = layer.layer_number - 1
            annotate.module(layer, name=layer_name(number), layer=number)
            if hasattr(layer.mlp, "experts"):  # what the MoE layer does itself is moving tokens
                annotate.module(layer.mlp, category="routing")
                annotate.module(layer.mlp.experts, category="computation")
                if (shared := getattr(layer.mlp, "shared_experts", None)) is not None:
                    annotate.module(shared, category="computation")
            experts = getattr(getattr(layer.mlp, "experts", None), "local_experts", ())
            for index, expert in enumerate(experts):
                expert_number = layer.mlp.local_expert_indices[index]
                annotate.module(expert, name=expert_name(number, expert_number), expert=expert_number)

    def name_parameters(self, shards: Sequence[Shard]) -> None:
        """Name this rank's slices of parameters. Local."""
        for shard in shards:
            self._name(shard.data, shard.name, "parameter")

    def name_buffers(self, chunk: nn.Module) -> None:
        """Name what a chunk keeps beside its parameters, such as the corrections of routing scores. Local."""
        for buffer in buffers(chunk):
            self._name(buffer.data, buffer.name, "state")

    def name_gradients(self, shards: Sequence[Shard]) -> None:
        """Name the slices' places in the gradient buffers. Local; after the buffers are made."""
        for shard in shards:
            self._name(shard.gradient, shard.name, "gradient")

    def name_optimizer_state(self, optimizer: Any, shards: Sequence[Shard]) -> bool:
        """Name the states that megatron-core's optimizer keeps of the slices; return whether it has made them. Local.

        A state that is kept of elements a to b - 1 of the flattened slice only is called ``<name>.exp_avg[a:b]``; the
        float32 copy of a parameter in another type is ``<name>.main``.
        """
        is_there = False
        for part in optimizer.chained_optimizers:
            for shard in shards:
                for holder, start in held_parts(part, shard.parameter):
                    states = dict(part.optimizer.state.get(holder, {}))
                    is_there = is_there or bool(states)
                    if holder is not shard.parameter and holder.data_ptr() != shard.parameter.data_ptr():
                        states["main"] = holder
                    for key, state in states.items():
                        if isinstance(state, Tensor) and state.shape == holder.shape:
                            self._name_part(state, start, shard, key)
                        elif isinstance(state, Tensor) and not shard.index:  # one for all experts of a parameter
                            owner = shard.name if shard.index is None else _EXPERT.sub(".", shard.name)
                            self._name(state, f"{owner}.{key}", "state")
        return is_there

    def _name_part(self, state: Tensor, start: int, shard: Shard, key: str) -> None:
        """Name what a state, which begins at element `start` of the shard's parameter, holds of the shard."""
        size = shard.data.numel()
        first = (shard.index or 0) * size
        begin, end = max(first, start), min(first + size, start + state.numel())
        if begin >= end:
            return
        is_whole = end - begin == size
        name = f"{shard.name}.{key}" + ("" if is_whole else f"[{begin - first}:{end - first}]")
        self._name(state.detach().view(-1)[begin - start : end - start], name, "state")

    def _name(self, tensor: Tensor, name: str, role: annotate.Role) -> None:
        annotate.tensor(tensor, name, role=role)
        self._named.append(tensor)


def held_parts(optimizer: Any, parameter: Any) -> Iterator[tuple[Any, int]]:
    """Yield the tensor that an optimizer updates for a parameter, and the parameter's element that it begins at."""
    if isinstance(optimizer, DistributedOptimizer):
        if parameter in optimizer.model_param_group_index_map:
            group, place = optimizer.model_param_group_index_map[parameter]
            elements = optimizer._get_model_param_range_map(parameter)["param"]
            yield optimizer.optimizer.param_groups[group]["params"][place], elements.start
        return
    holder = getattr(parameter, "main_param", parameter)
    if any(holder is updated for group in optimizer.optimizer.param_groups for updated in group["params"]):
        yield holder, 0
