"""Groups made late, destroyed and made again (the default one too), of one description; kinds of barriers."""

from datetime import timedelta

import torch
from digest import print_digest
from torch import distributed as dist


def reduce_in(group: dist.ProcessGroup | None, value: float) -> torch.Tensor:
    tensor = torch.full((2,), value)
    dist.all_reduce(tensor, group=group)
    return tensor


def main() -> None:
    results: list[torch.Tensor] = []
    store, rank, size = next(dist.rendezvous("env://"))
    for life in range(2):
        dist.init_process_group("gloo", store=dist.PrefixStore(f"life {life}", store), rank=rank, world_size=size)
        results.append(reduce_in(None, rank + 1.0))
        for again in range(2):
            late = dist.new_group(list(range(size)), group_desc="late")
            alike = dist.new_group(list(range(size)), group_desc="late")
            results.append(reduce_in(late, rank + 10.0 * again + life))
            if rank == 0:
                dist.send(torch.full((3,), 5.0), 1, group=late)
            elif rank == 1:
                received = torch.empty(3)
                dist.recv(received, 0, group=late)
                results.append(received)
            results.append(reduce_in(alike, rank + 20.0 * again))
            results.append(reduce_in(late, rank + 30.0))
            dist.destroy_process_group(late)
            results.append(reduce_in(alike, rank + 40.0))
            dist.destroy_process_group(alike)
        alone = [dist.new_group([member]) for member in range(size)]
        results.append(reduce_in(alone[rank], 3.0))
        hashed = dist.new_group(list(range(size)), use_local_synchronization=True)
        results.append(reduce_in(hashed, rank + 50.0))
        dist.monitored_barrier(timeout=timedelta(seconds=60))
        dist.barrier()
        results.append(reduce_in(None, rank + 2.0))
        dist.destroy_process_group()
    print_digest(*results)


if __name__ == "__main__":
    main()
