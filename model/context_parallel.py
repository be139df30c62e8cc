"""Context parallelism: each rank has two parts of every sequence, and attends to the keys of all ranks before them.

Theory of operation: a sequence is cut into 2 CP equal parts. Rank r has part r and part 2 CP - 1 - r, in this order, so
that under a causal mask all ranks have as much to compute. Keys and values are gathered over the ranks, in the order of
the sequence; each of the two parts of the queries attends to the keys up to its own last position. In the backward
pass the gradients of keys and values are summed over the ranks and go back where they belong.

Source: the cut is megatron-core's (get_pos_emb_on_this_cp_rank in rope_utils.py), which rotates queries and keys by it.

Shape suffixes: S tokens of this rank, K tokens of the whole sequence, and those of attention.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed


def positions_of_rank(length: int, *, rank: int, size: int) -> npt.NDArray[np.int64]:
    """Return the positions, in a sequence of `length`, of the tokens that a rank of `size` has, in its order.

    `length` must be a multiple of 2 `size`; with one rank, of nothing.
    """
    if size == 1:
        return np.arange(length)
    parts = np.arange(length).reshape(2 * size, -1)
    return np.concatenate([parts[rank], parts[2 * size - 1 - rank]])


def attend_in_parallel(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query_BNSD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    group: Any,
) -> Tensor:
    """Attend with this rank's queries to the keys of all ranks. Every rank of `group` must call it; it synchronises.

    Args:
        attend: causal attention whose last query is at the last key, [B, N, S, D].
        query_BNSD: this rank's.
        key_BGSD: this rank's.
        value_BGSD: this rank's.
        group: the context-parallel process group.

    Returns:
        The context of this rank's queries, [B, N, S, D].
    """
    rank, size = group.rank(), group.size()
    key_BGKD, value_BGKD = _gather(key_BGSD, group), _gather(value_BGSD, group)
    part = query_BNSD.shape[2] // 2
    contexts = []
    for number, query in zip((rank, 2 * size - 1 - rank), query_BNSD.chunk(2, dim=2), strict=True):
        num_keys = (number + 1) * part
        contexts.append(attend(query, key_BGKD[:, :, :num_keys], value_BGKD[:, :, :num_keys]))
    return torch.cat(contexts, dim=2)


def _gather(local_BGSD: Tensor, group: Any) -> Tensor:
    """Return the whole sequence, [B, G, K, D], in its order."""
    size = group.size()
    gathered: Tensor = _AllGather.apply(local_BGSD.movedim(2, 0).contiguous(), group)  # type: ignore[no-untyped-call]
    parts = gathered.chunk(2 * size)
    early = [parts[2 * rank] for rank in range(size)]
    late = [parts[2 * rank + 1] for rank in reversed(range(size))]
    return torch.cat(early + late).movedim(0, 2)


class _AllGather(torch.autograd.Function):
    """Gathers along the first dimension; backward, sums over the ranks and scatters."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Any) -> Tensor:
        ctx.group = group
        gathered = local.new_empty(local.shape[0] * group.size(), *local.shape[1:])
        distributed.all_gather_into_tensor(gathered, local, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        local = gradient.new_empty(gradient.shape[0] // ctx.group.size(), *gradient.shape[1:])
        distributed.reduce_scatter_tensor(local, gradient.contiguous(), group=ctx.group)
        return local, None
