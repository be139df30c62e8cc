"""What lets megatron-core run on a device: chosen once, when a rank's part is built."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Protocol

import torch
from megatron.core.tensor_parallel import random
from torch import distributed

from truedag.parallel.cpu import CpuAdapter, even_parts, replace
from truedag.parallel.dry import DryAdapter
from truedag.parallel.host_messages import through_host


class DeviceAdapter(Protocol):
    """What the executors ask of a device."""

    def install(self) -> None:
        """Make megatron-core run on it. Local; before the groups are made."""

    def seed(self, seed: int) -> None:
        """Seed megatron-core's random numbers on it."""

    def building(self) -> AbstractContextManager[object]:
        """Return the context in which a model and its weights are made."""

    def remove(self) -> None:
        """Undo `install`."""


class CudaAdapter:
    """What megatron-core was written for, under NCCL; under gloo, what gloo lacks."""

    def __init__(self) -> None:
        self._installed = ExitStack()

    def install(self) -> None:
        """Under gloo, send messages through the host, and gather and scatter uneven parts one by one."""
        if distributed.get_backend() == "gloo":
            replace(self._installed, through_host())
            replace(self._installed, even_parts())

    def seed(self, seed: int) -> None:
        """Seed the generators of the tensor-parallel ranks."""
        random.model_parallel_cuda_manual_seed(seed)

    def building(self) -> AbstractContextManager[object]:
        """Return the context in which modules are made: as it is."""
        return nullcontext()

    def remove(self) -> None:
        """Undo `install`."""
        self._installed.close()


def adapter_of(device: torch.device) -> DeviceAdapter:
    """Return what lets megatron-core run on a device."""
    if device.type == "cpu":
        return CpuAdapter()
    if device.type == "meta":
        return DryAdapter(stands_for="cpu")
    return CudaAdapter()
