"""Call a recorded operator again in given memory, and hold what it gives against what it gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from truedag.tracer.record.arguments import flatten_tensors
from truedag.tracer.replay.calls import Call, Slot
from truedag.tracer.replay.memory import Bytes, Ref, StorageKey, bytes_of, tensor_in, window

Storages: TypeAlias = Mapping[StorageKey, torch.UntypedStorage]
Value: TypeAlias = dict[StorageKey, Bytes]  # what a node left in each storage that it wrote
Difference: TypeAlias = tuple[str, int]  # after (an argument) or result, and its number; kind: of results as a whole


def call_again(call: Call, storages: Storages) -> tuple[Value, set[Difference]]:
    """Call an operator; return what it left, and what of it is not bitwise what was recorded.

    Args:
        call: the recorded call.
        storages: memory for its arguments, filled; it is worked in.

    Raises:
        RuntimeError, IndexError, ValueError, TypeError: what the operator raises.
    """
    tensors = [None if ref is None else tensor_in(storages[ref.key], ref.layout, ref.offset) for ref in call.inputs]
    arguments = {name: _given(value, tensors, call) for name, value in call.arguments.items()}
    if call.random is not None and not any(isinstance(value, torch.Generator) for value in arguments.values()):
        torch.set_rng_state(torch.from_numpy(call.random.copy()))
    if torch.get_num_threads() != call.num_threads:
        torch.set_num_threads(call.num_threads)
    with torch.set_grad_enabled(call.is_grad_enabled):
        result = call.function(**arguments)
    outputs = result if isinstance(result, tuple) else (result,)
    made = list(flatten_tensors(outputs))
    value: Value = {}
    for number in sorted(call.written):
        ref = call.inputs[number]
        if ref is not None:
            value[ref.key] = bytes_of(storages[ref.key])
    for ref, tensor in zip(call.outputs, made, strict=False):
        if ref is not None and ref.key not in storages:
            value[ref.key] = bytes_of(tensor.untyped_storage())
    shapes = [tuple(tensor.shape) for tensor in made]
    if shapes != [shapes[i] if ref is None else ref.layout.sizes for i, ref in enumerate(call.outputs[: len(shapes)])]:
        return value, {("kind", 0)}
    plain = [one for one in outputs if isinstance(one, bool | int | float)]
    if len(made) != len(call.outputs) or not _are_same(plain, call.returned):
        return value, {("kind", 0)}
    return value, set(_differences(call, value))


def _differences(call: Call, value: Value) -> list[Difference]:
    found: list[Difference] = []
    for number in call.written:
        ref, elements = call.inputs[number], call.after[number]
        if ref is None or elements is None or len(elements) != ref.layout.num_bytes:
            continue  # it was resized to hold a result
        if not agrees(value[ref.key], ref, elements):
            found.append(("after", number))
    for number, (ref, elements) in enumerate(zip(call.outputs, call.results, strict=True)):
        if ref is None or elements is None or ref.key not in value or call.is_contentless:
            continue
        if not agrees(value[ref.key], ref, elements):
            found.append(("result", number))
    return found


def agrees(memory: Bytes, ref: Ref, elements: Bytes) -> bool:
    """Whether a tensor in a storage has these elements, bitwise."""
    return bool(np.array_equal(window(memory, ref.layout, ref.offset).reshape(-1), elements))


def _are_same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return [(type(one), repr(one)) for one in some] == [(type(one), repr(one)) for one in others]  # nan is nan


def _given(value: Any, tensors: Sequence[torch.Tensor | None], call: Call) -> Any:
    if isinstance(value, Slot):
        tensor = tensors[value.number]
        if value.conj:
            tensor = torch.conj(tensor)  # type: ignore[arg-type]
        return torch._neg_view(tensor) if value.neg else tensor  # type: ignore[arg-type]
    if isinstance(value, list):
        return [_given(one, tensors, call) for one in value]
    if isinstance(value, torch.Generator):
        generator = torch.Generator(value.device)
        if call.random is not None:
            generator.set_state(torch.from_numpy(call.random.copy()))
        return generator
    return value
