"""Functional collectives: plain, waited for late, coalesced, with autograd."""

import torch
import torch.distributed._functional_collectives as funcol
from digest import print_digest
from torch import distributed as dist


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    x = torch.arange(4.0) + rank
    total = funcol.all_reduce(x, "sum", group)
    gathered = funcol.all_gather_tensor(x * 2, 0, group)
    scattered = funcol.reduce_scatter_tensor(torch.ones(2 * size) * rank, "sum", 0, group)
    exchanged = funcol.all_to_all_single(torch.arange(2.0 * size) + rank, None, None, group)
    sent = funcol.broadcast(x + 1, 0, group)
    late = funcol.all_reduce(x + 5, "max", group)
    local = x.square().sum()  # while the reduction is under way
    many = funcol.all_reduce_coalesced([x + 6, x + 7], "sum", group)
    parts = funcol.all_gather_into_tensor_coalesced([x + 8, x[:2] + 9], group)

    weight = torch.full((3,), 2.0 + rank, requires_grad=True)
    whole = funcol.all_gather_tensor_autograd(weight * 3, 0, group)
    share = funcol.reduce_scatter_tensor_autograd(whole * (rank + 1), "sum", 0, group)
    swapped = funcol.all_to_all_single_autograd(share.repeat(size), [3] * size, [3] * size, group)
    (swapped.square().sum() + share.sum()).backward()
    results = [total, gathered, scattered, exchanged, sent, late, local, *many, *parts, swapped.detach()]
    print_digest(*(result + 0 for result in results), weight.grad)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
