"""Lets megatron-core run as one rank of any world in one process, on tensors without memory: the dry run.

Theory of operation: tensors are on device meta, where operators find out shapes and nothing else, so the same code runs
through the same operators; and the process groups have torch's `fake` backend, whose communications end at once. What
a program reads of a tensor's content it cannot have; each such place is met here:

- What tells how tokens are split over ranks and experts is known from the routing: the dispatcher finds it out by the
  same operators as ever, and is then told the numbers (`tell`), which `tolist` gives back.
- A single number (a loss, a norm) is 0, so nothing overflows and no gradient is clipped; generated tokens are 0.
- `masked_select` selects what the router has chosen.

Where torch does on device meta what it does not do on the device that the run stands for, it is turned round:

- Batches, prompts and what torch.tensor makes come from outside of the program's operators, as on the CPU, where
  nothing is copied.
- Fused attention and grouped products are one operator, whatever types device meta knows.
- Each storage has an address of its own, where torch says 0 of all.

Nothing is ever written to memory, so a rank of the largest model takes no more room than its objects.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal, cast

import numpy as np
import torch
from megatron.core.transformer.moe import token_dispatcher
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch._C._distributed_c10d import FakeProcessGroup
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from truedag.parallel.cpu import CPU, CudaMeans, even_parts, instead_of_cuda, is_cuda, replace
from truedag.parallel.errors import RoutingError

META = torch.device("meta")

_BACKEND = "dry"
_DTYPES = (torch.int64, torch.int32, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.uint8)
_NUM_STORAGES = 4096  # batches and prompts that come from outside


def init_dry_world(rank: int, world_size: int) -> None:
    """Make the default process group of a world that this process is one rank of, alone. Local.

    The environment says what torchrun's would if all ranks were on this host: there is one clock.
    """
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    if not hasattr(distributed.Backend, _BACKEND.upper()):
        # torch's own name for it leaves device meta out.
        distributed.Backend.register_backend(_BACKEND, _fake_group, extended_api=True, devices=["cpu", "meta"])
    distributed.init_process_group(_BACKEND, rank=rank, world_size=world_size, store=FakeStore())


def _fake_group(common: Any, options: Any) -> Any:
    del options
    fake: Any = FakeProcessGroup
    own = fake.Options()
    own.global_ranks_in_group = common.global_ranks_in_group
    return fake._create_internal(common.group_rank, common.group_size, own)


def tell(tensor: Tensor, values: NDArray[np.int64]) -> None:
    """Say what a tensor without memory would hold; `tolist` of it, and of its transposed and flat views, knows it."""
    assert tuple(tensor.shape) == values.shape, f"{tuple(tensor.shape)} is told {values.shape}"
    tensor.told = values  # type: ignore[attr-defined]


def _told(tensor: Tensor) -> NDArray[np.int64] | None:
    told: NDArray[np.int64] | None = getattr(tensor, "told", None)
    return told


class _NoMemory(CudaMeans):
    """Turns CUDA named in a call of torch into device meta, and answers what needs memory."""

    def __init__(self) -> None:
        super().__init__(META)
        # Made before anything is recorded; memory of their own, so that nothing else was ever at their addresses.
        self._storages = [_storage() for _ in range(_NUM_STORAGES)]
        self._empty = {dtype: torch.empty(0, dtype=dtype, device=META) for dtype in _DTYPES}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if isinstance(first, Tensor):
            if first.device == META:
                answer = _ANSWERS.get(func)
                if answer is not None:
                    return answer(*args, **(kwargs or {}))
                view = _VIEWS.get(func)
                if view is not None and (told := _told(first)) is not None:
                    result = func(*args, **(kwargs or {}))
                    tell(result, view(told))
                    return result
            elif func is Tensor.to and args[1:] == (META,) and not kwargs and first.dtype in self._empty:
                return self._come_from_outside(first)
        if func is torch.tensor and kwargs and self._is_here(kwargs.get("device")):
            made = func(*args, **{**kwargs, "device": CPU})
            here = self._come_from_outside(made) if made.dtype in self._empty else made.to(META)
            return here.requires_grad_(made.requires_grad)
        return super().__torch_function__(func, types, args, kwargs)

    def _is_here(self, device: object) -> bool:
        """Whether a named device is the one that stands for CUDA."""
        return is_cuda(device) or device in (META, META.type)

    def _come_from_outside(self, tensor: Tensor) -> Tensor:
        """Return a tensor without memory that no operator has made, as torch.from_numpy does with memory."""
        storage = self._storages.pop() if self._storages else _storage()
        storage.resize_(tensor.nbytes)
        fresh: Any = self._empty[tensor.dtype].data  # a view would share the count of changes
        return cast("Tensor", torch.ops.aten.lift_fresh(fresh.set_(storage, 0, tensor.shape, tensor.stride())))


def _storage() -> Any:
    return torch.UntypedStorage(0, device=META)  # type: ignore[no-untyped-call]


def _inside(mode: _NoMemory, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        with mode:
            return function(*arguments, **options)

    return run


def _to_list(tensor: Tensor) -> Any:
    told = _told(tensor)
    return (np.zeros(tensor.shape, np.int64) if told is None else told).tolist()


def _address(tensor: Tensor) -> int:
    begin: int = tensor.untyped_storage()._cdata
    return begin + int(tensor.storage_offset()) * tensor.element_size()


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Fused attention by the operators that run on the CPU.

    Source: scaled_dot_product_attention in torch's aten/src/ATen/native/transformers/attention.cpp, and
    use_flash_attention_cpp in sdp_utils_cpp.cpp.
    """
    is_flash = dropout_p == 0 and all(
        tensor.dim() == 4 and tensor.stride(-1) == 1 and tensor.shape[-1] == query.shape[-1] and tensor.shape[-2] > 0
        for tensor in (query, key, value)
    )
    if not is_flash:
        return torch._C._nn.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = torch.full((), float("-inf"), dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask, torch.zeros_like(hidden), hidden)
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return output


_ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.tolist: _to_list,
    Tensor.data_ptr: _address,
    functional.scaled_dot_product_attention: _attend,
}
_VIEWS: dict[Any, Callable[[NDArray[np.int64]], NDArray[np.int64]]] = {
    Tensor.ravel: np.ravel,
    Tensor.T.__get__: np.transpose,  # type: ignore[attr-defined]
}


def _as_told(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What stands for a copy to the host: an array where one is asked for, else the tensor, which knows its values."""
    del record_stream
    if not (as_numpy and isinstance(tensor, Tensor)):
        return tensor
    told = _told(tensor)
    return tensor.numpy() if told is None else told


class DryAdapter:
    """Installs the adapter in this process, and takes it away again. Local; install before the groups are made.

    Args:
        stands_for: the device whose communications are made: on the CPU, gloo's, which gathers uneven parts one by one.
    """

    def __init__(self, *, stands_for: Literal["cpu", "cuda"]) -> None:
        self._stands_for = stands_for
        self._installed = ExitStack()
        self._num_selected: int | None = None

    def install(self) -> None:
        """Turn megatron-core's CUDA into device meta."""
        until, dispatcher = self._installed, token_dispatcher.MoEAlltoAllTokenDispatcher
        replace(until, instead_of_cuda(META))
        if self._stands_for == "cpu":
            replace(until, even_parts())
        replace(
            until,
            [
                (token_dispatcher, "maybe_move_tensor_to_cpu", _as_told),
                (dispatcher, "preprocess", self._tell_splits(dispatcher.preprocess)),
            ],
        )
        kernels: dict[str, dict[str, Callable[..., Any]]] = {
            "aten": {
                "_local_scalar_dense": _zero,
                "masked_select": self._select,
                "_grouped_mm": _multiply_groups,
            },
            "c10d": dict.fromkeys(_COALESCED, _communicate),
        }
        for namespace, named in kernels.items():
            library: Any = torch.library.Library(namespace, "IMPL")  # type: ignore[no-untyped-call]
            until.callback(library._destroy)
            for name, kernel in named.items():
                library.impl(name, kernel, "Meta", allow_override=True)
        mode = _NoMemory()
        # torch leaves the mode before it runs the backward pass, and with it what is computed again there.
        autograd: Any = torch.autograd
        replace(until, [(autograd, "_engine_run_backward", _inside(mode, autograd._engine_run_backward))])
        until.enter_context(mode)

    def seed(self, seed: int) -> None:
        """Nothing to seed: nothing is drawn."""

    def building(self) -> AbstractContextManager[object]:
        """Return the context in which modules are made: what they take without saying where is on device meta."""
        return META

    def remove(self) -> None:
        """Undo `install`; does nothing where it is not installed."""
        self._installed.close()

    def _tell_splits(self, preprocess: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the dispatcher's `preprocess` that is told what its operators would have found out.

        Source: preprocess of megatron-core's MoEAlltoAllTokenDispatcher.
        """

        @functools.wraps(preprocess)
        def told_preprocess(dispatcher: Any, routing_map: Tensor) -> Tensor:
            result = preprocess(dispatcher, routing_map)
            if routing_map.device != META:
                return result
            ranks = distributed.get_process_group_ranks(dispatcher.tp_ep_group)
            ep, tp, num_local = dispatcher.ep_size, dispatcher.tp_size, dispatcher.num_local_experts
            counts = [dispatcher.routed.counts_of(rank) for rank in ranks]
            own = counts[ranks.index(distributed.get_rank())]
            first = dispatcher.local_expert_indices[0]
            local = np.stack(counts).reshape(ep, tp, -1)[:, :, first : first + num_local].transpose(1, 0, 2)
            per_rank = local.sum(axis=2)
            self._num_selected = int(own.sum())
            if isinstance(dispatcher.num_out_tokens, Tensor):
                tell(dispatcher.num_out_tokens, np.array(self._num_selected))
            if dispatcher.input_splits is not None:
                tell(dispatcher.input_splits, own.reshape(ep, num_local).sum(axis=1))
                tell(dispatcher.output_splits, per_rank[dispatcher.tp_rank])
                tell(dispatcher.output_splits_tp, per_rank.sum(axis=1))
            if num_local > 1:
                by_expert = dispatcher.num_global_tokens_per_local_expert
                tell(by_expert, np.ascontiguousarray(local).reshape(by_expert.shape))
            tell(result, local.sum(axis=(0, 1)))
            return result

        return told_preprocess

    def _select(self, tensor: Tensor, mask: Tensor) -> Tensor:
        """Kernel of `masked_select` on device meta: the mask is the routing's."""
        del mask
        if self._num_selected is None:
            raise RoutingError("masked_select of a tensor without memory: only the router's choice is known")
        return tensor.new_empty(self._num_selected)


# Collectives of several tensors at once, which have no kernel on device meta.
_COALESCED = (
    "allreduce_coalesced_",
    "allgather_coalesced_",
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_tensor_coalesced_",
)


def _communicate(tensors: Any, *arguments: Any, **options: Any) -> Any:
    """Kernel of a collective on device meta: return work that is done, which a barrier of the same group lends."""
    del options
    group = next(argument for argument in arguments if isinstance(argument, torch.ScriptObject))
    tensor = tensors[0][0] if isinstance(tensors[0], list) else tensors[0]
    return torch.ops.c10d.barrier(tensor, group, [], True, -1)


def _zero(tensor: Tensor) -> float | int | bool:
    """Kernel of `item` on device meta."""
    if tensor.dtype == torch.bool:
        return False
    return 0.0 if tensor.dtype.is_floating_point else 0


def _multiply_groups(
    left: Tensor,
    right: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Kernel of a grouped product on device meta, of any dtype: rows by groups, or groups of inner products."""
    del bias
    dtype = out_dtype or left.dtype
    if left.dim() == 2 and right.dim() == 2:
        assert offs is not None
        return left.new_empty(len(offs), left.shape[0], right.shape[1], dtype=dtype)
    if left.dim() == 3 and right.dim() == 2:
        return left.new_empty(left.shape[1], right.shape[1], dtype=dtype)
    return left.new_empty(*left.shape[:-1], right.shape[-1], dtype=dtype)
