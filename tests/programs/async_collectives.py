"""Collectives that are waited for later, through futures, and coalesced; every kind that gloo has."""

import torch
from digest import print_digest
from torch import distributed as dist


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    tensors = [torch.full((3,), float(rank + i)) for i in range(3)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    meanwhile = torch.arange(6.0).cumsum(0)
    for work in reversed(works):
        work.wait()
    (future,) = dist.all_reduce(tensors[0], async_op=True).get_future().wait()
    doubled = future * 2

    coalesced = [torch.full((2,), float(rank)), torch.full((4,), float(rank))]
    with dist._coalescing_manager(async_ops=True) as manager:
        for tensor in coalesced:
            dist.all_reduce(tensor)
    manager.wait()

    pieces = [torch.empty(2) for _ in range(size)]
    dist.all_gather(pieces, torch.full((2,), float(rank)))
    whole = torch.empty(2 * size)
    dist.all_gather_into_tensor(whole, torch.full((2,), 3.0 * rank))
    share = torch.empty(2)
    dist.reduce_scatter(share, [torch.full((2,), float(rank + i)) for i in range(size)])
    exchanged = torch.empty(2 * size)
    dist.all_to_all_single(exchanged, torch.arange(2.0 * size) + 10 * rank)
    uneven = torch.empty(sum(range(1, size + 1)))
    dist.all_to_all_single(uneven, torch.arange(float(size * (rank + 1))), list(range(1, size + 1)), [rank + 1] * size)
    lists = [torch.empty(3) for _ in range(size)]
    dist.all_to_all(lists, [torch.full((3,), float(rank * size + i)) for i in range(size)])
    gathered = [torch.empty(1) for _ in range(size)] if rank == 0 else None
    dist.gather(torch.tensor([float(rank)]), gathered, dst=0)
    mine = torch.empty(2)
    dist.scatter(mine, [torch.full((2,), float(i)) for i in range(size)] if rank == 1 else None, src=1)
    reduced = torch.full((2,), float(rank))
    dist.reduce(reduced, dst=1, op=dist.ReduceOp.MAX)
    announced = torch.full((2,), float(rank))
    dist.broadcast(announced, src=1)
    dist.barrier()
    print_digest(
        *tensors, meanwhile, doubled, *coalesced, *pieces, whole, share, exchanged, uneven, *lists, mine, announced,
        *([reduced] if rank == 1 else []), *(gathered or []),
    )  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
