"""Lets megatron-core, which takes CUDA for granted, run on the CPU with gloo.

Theory of operation: each way in which it does so is turned round here, for as long as the adapter is installed.

- `torch.cuda.current_device()`, streams and `synchronize` are functions of torch.cuda, and are replaced.
- `device="cuda"` literals, `.cuda()`, pinned memory and comparisons with `torch.cuda.FloatTensor` are caught by a
  TorchFunctionMode.
- The token dispatcher takes a tensor on the CPU for a list already on the host: it is given one. Its side stream is a
  class variable.
- gloo gathers and scatters even parts only: uneven ones (experts that are tensor-parallel) go part by part.
- Random number trackers keep states of CUDA generators, and are replaced by one that keeps none: nothing here draws
  random numbers, as there is no dropout and weights are drawn by name.

A process that computes on CUDA never installs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor, distributed
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _NullEvent:
    """An event of a stream that has nothing in flight."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class _NullStream:
    """The only stream there is: the program's order."""

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def record_event(self) -> _NullEvent:
        """Return an event that has happened."""
        return _NullEvent()


class _NoStates:
    """A random number tracker without states."""

    @contextmanager
    def fork(self, name: str = "") -> Iterator[None]:
        """Draw from the generator that is."""
        del name
        yield

    def get_states(self) -> dict[str, Tensor]:
        """Return no state."""
        return {}

    def set_states(self, states: dict[str, Tensor]) -> None:
        """Nothing to set."""


class CudaMeans(TorchFunctionMode):
    """Turns CUDA named in a call of torch into another device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cuda:
            return args[0] if args[0].device == self.device else args[0].to(self.device)
        if kwargs and "device" in kwargs and is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": self.device}
        if kwargs and kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        result = func(*args, **(kwargs or {}))
        if func is Tensor.type and isinstance(result, str) and args[0].device == self.device:
            return f"torch.cuda.{result.rpartition('.')[2]}"
        return result


def is_cuda(device: object) -> bool:
    """Return whether a device is named that is CUDA's."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _as_host_value(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    del record_stream
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def _gather_parts(gather: Callable[..., Any]) -> Callable[..., Any]:
    """Return `all_gather` that also takes parts of different sizes: each is broadcast by its owner."""

    def all_gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({part.shape for part in tensor_list}) == 1:
            return gather(tensor_list, tensor, group=group, async_op=async_op)
        for owner, part in enumerate(tensor_list):
            if owner == distributed.get_rank(group):
                part.copy_(tensor)
            distributed.broadcast(part, group=group, group_src=owner)
        return None

    return all_gather


def _scatter_parts(scatter: Callable[..., Any]) -> Callable[..., Any]:
    """Return `reduce_scatter` that also takes parts of different sizes: each is reduced to its owner."""

    def reduce_scatter(
        output: Tensor, input_list: list[Tensor], op: Any = distributed.ReduceOp.SUM, group: Any = None
    ) -> Any:
        if len({part.shape for part in input_list}) == 1:
            return scatter(output, input_list, op=op, group=group)
        for owner, part in enumerate(input_list):
            sum_of_parts = part.clone()
            distributed.reduce(sum_of_parts, op=op, group=group, group_dst=owner)
            if owner == distributed.get_rank(group):
                output.copy_(sum_of_parts)
        return None

    return reduce_scatter


class CpuAdapter:
    """Installs the adapter in this process, and takes it away again. Local; install before the groups are made."""

    def __init__(self) -> None:
        self._installed = ExitStack()

    def install(self) -> None:
        """Turn megatron-core's CUDA into the CPU."""
        replace(self._installed, instead_of_cuda(CPU))
        replace(self._installed, even_parts())
        self._installed.enter_context(CudaMeans(CPU))

    def seed(self, seed: int) -> None:
        """Nothing to seed: nothing here draws random numbers."""

    def building(self) -> AbstractContextManager[object]:
        """Return the context in which modules are made: as it is."""
        return nullcontext()

    def remove(self) -> None:
        """Undo `install`; does nothing where it is not installed."""
        self._installed.close()


Replacement: TypeAlias = tuple[Any, str, Any]  # an object, the name of an attribute, what is to stand there


def replace(until: ExitStack, replacements: list[Replacement]) -> None:
    """Put replacements in their places, until the stack is closed."""
    for owner, name, replacement in replacements:
        until.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, replacement)


def even_parts() -> list[Replacement]:
    """Return what gathers and scatters uneven parts by operations that gloo has."""
    return [
        (distributed, "all_gather", _gather_parts(distributed.all_gather)),
        (distributed, "reduce_scatter", _scatter_parts(distributed.reduce_scatter)),
    ]


def instead_of_cuda(device: torch.device) -> list[Replacement]:
    """Return what stands in the place of CUDA's functions in a process that computes on `device`, in program order."""
    stream = _NullStream()
    return [
        (torch.cuda, "current_device", lambda: device),
        (torch.cuda, "current_stream", lambda *_: stream),
        (torch.cuda, "Stream", lambda *_, **__: stream),
        (torch.cuda, "stream", lambda *_: nullcontext()),
        (torch.cuda, "synchronize", lambda *_: None),
        (random, "_CUDA_RNG_STATE_TRACKER", _NoStates()),
        (random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True),
        (random, "_get_cuda_rng_state", lambda *_, **__: None),
        (random, "_set_cuda_rng_state", lambda *_, **__: None),
        (token_dispatcher, "maybe_move_tensor_to_cpu", _as_host_value),
        (token_dispatcher.MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", stream),
    ]
