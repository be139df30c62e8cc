"""Several Python threads, each with a group of its own, reduce and send at the same time."""

import threading

import torch
from digest import print_digest
from torch import distributed as dist

NUM_THREADS = 3


def work(group: dist.ProcessGroup, number: int, results: dict[int, torch.Tensor]) -> None:
    rank = dist.get_rank()
    x = torch.full((4,), float(rank + number))
    for _ in range(5):
        dist.all_reduce(x, group=group)
        x = x / 3 + number
        if rank == 0:
            dist.send(x, 1, group=group)
        elif rank == 1:
            received = torch.empty(4)
            dist.recv(received, 0, group=group)
            x = x + received
    results[number] = x


def main() -> None:
    dist.init_process_group("gloo")
    ranks = list(range(dist.get_world_size()))
    groups = [dist.new_group(ranks) for _ in range(NUM_THREADS)]
    results: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=work, args=(group, i, results)) for i, group in enumerate(groups)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print_digest(*(results[i] for i in range(NUM_THREADS)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
