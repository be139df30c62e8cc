"""Collectives and messages of Python objects."""

from digest import print_digest
from torch import distributed as dist


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    everyone: list[object] = [None] * size
    dist.all_gather_object(everyone, {"rank": rank, "text": "x" * (rank + 1)})
    told: list[object] = [["a", 1], {"b": 2}] if rank == 0 else [None, None]
    dist.broadcast_object_list(told, src=0)
    mine: list[object] = [None]
    dist.scatter_object_list(mine, [f"for {i}" for i in range(size)] if rank == 0 else None, src=0)
    at_last: list[object] | None = [None] * size if rank == size - 1 else None
    dist.gather_object((rank, rank * rank), at_last, dst=size - 1)
    passed: list[object] = [("from", 0)] if rank == 0 else [None]
    if rank == 0:
        dist.send_object_list(passed, dst=1)
    elif rank == 1:
        dist.recv_object_list(passed, src=0)
    print_digest(everyone, told, mine, at_last, passed)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
