"""Messages of tensors on a GPU over gloo, which can send and receive host memory alone: they go through the host.

gloo's collectives take tensors of a GPU and copy them themselves; its `send` and `recv` would hand the GPU's address to
the network. Source: torch/csrc/distributed/c10d/ProcessGroupGloo.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d


def on_gpu(tensor: Tensor) -> bool:
    """Return whether gloo cannot send this tensor as it is."""
    return tensor.is_cuda


class _Sent:
    """A message on its way, and the host memory that it is read from."""

    def __init__(self, work: Any, host: Tensor) -> None:
        self._work = work
        self._host = host

    def wait(self, *timeout: Any) -> bool:
        """Wait until it has been sent."""
        done: bool = self._work.wait(*timeout)
        return done

    def is_completed(self) -> bool:
        """Return whether it has been sent."""
        done: bool = self._work.is_completed()
        return done


class _Received:
    """A message that is expected: it is where it belongs once it has been waited for."""

    def __init__(self, work: Any, host: Tensor, tensor: Tensor) -> None:
        self._work = work
        self._host = host
        self._tensor: Tensor | None = tensor

    def wait(self, *timeout: Any) -> bool:
        """Wait until it has arrived, and take it to its place; the current stream waits for that."""
        done: bool = self._work.wait(*timeout)
        if self._tensor is not None:
            self._tensor.detach().copy_(self._host)  # a stage's input wants a gradient
            self._tensor = None
        return done

    def is_completed(self) -> bool:
        """Return whether it is where it belongs."""
        return self._tensor is None

    def _source_rank(self) -> int:
        source: int = self._work._source_rank()
        return source


def through_host(is_staged: Callable[[Tensor], bool] = on_gpu) -> list[tuple[Any, str, Any]]:
    """Return what sends and receives tensors through the host, for `parallel.cpu.replace`.

    `distributed.send`, `recv` and `batch_isend_irecv` call what stands in the module in the place of `isend` and
    `irecv`, as `P2POp` compares with it.

    Args:
        is_staged: which tensors go through the host.
    """
    begin_send, begin_receive = distributed_c10d.isend, distributed_c10d.irecv

    def isend(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not is_staged(tensor):
            return begin_send(tensor, *args, **kwargs)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())
        work = begin_send(host, *args, **kwargs)
        return None if work is None else _Sent(work, host)

    def irecv(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not is_staged(tensor):
            return begin_receive(tensor, *args, **kwargs)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        work = begin_receive(host, *args, **kwargs)
        return None if work is None else _Received(work, host, tensor)

    modules = (distributed, distributed_c10d)
    return [(module, name, staged) for name, staged in (("isend", isend), ("irecv", irecv)) for module in modules]
