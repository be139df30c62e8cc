"""Messages: batched both ways between the same ranks, under tags in another order, from any source."""

import torch
from digest import print_digest
from torch import distributed as dist


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    after, before = (rank + 1) % size, (rank - 1) % size
    results: list[torch.Tensor] = []
    for step in range(3):
        ours = [torch.full((4,), float(100 * rank + 10 * step + i)) for i in range(3)]
        theirs = [torch.empty(4) for _ in range(3)]
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, ours[0], after),
                dist.P2POp(dist.irecv, theirs[0], before),
                dist.P2POp(dist.isend, ours[1], before, tag=1),
                dist.P2POp(dist.irecv, theirs[1], after, tag=1),
                dist.P2POp(dist.isend, ours[2], after),
                dist.P2POp(dist.irecv, theirs[2], before),
            ]
        )
        for work in works:
            work.wait()
        results += theirs
    if rank == 0:  # tags are received in another order than they are sent in
        tagged = [dist.isend(torch.full((2,), float(tag)), 1, tag=tag) for tag in range(5, 9)]
        for work in tagged:
            work.wait()
    elif rank == 1:
        for tag in (7, 5, 8, 6):
            received = torch.empty(2)
            dist.recv(received, 0, tag=tag)
            results.append(received)
    if rank == 0:  # whoever comes first; the sum does not depend on it
        total = torch.zeros(3)
        for _ in range(2 * (size - 1)):
            received = torch.empty(3)
            dist.recv(received, tag=20)
            total += received
        for _ in range(size - 1):
            received = torch.empty(3)
            dist.irecv(received, tag=20).wait()
            total += received
        results.append(total)
    else:
        for i in range(3):
            dist.send(torch.full((3,), float(rank * 10 + i)), 0, tag=20)
    dist.all_reduce(results[0])
    if rank == 0:
        dist.send(results[0] * 2, 1)
    elif rank == 1:
        received = torch.empty(4)
        dist.recv(received, 0)
        results.append(received)
    dist.all_reduce(results[1])
    print_digest(*results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
