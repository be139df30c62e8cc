"""A program that starts its ranks itself, without torchrun."""

import tempfile
from pathlib import Path

import torch
from digest import print_digest
from torch import distributed as dist
from torch import multiprocessing

WORLD_SIZE = 2


def run(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE)
    x = torch.full((4,), float(rank + 1))
    for _ in range(3):
        dist.all_reduce(x)
        x = x.sin()
    if rank == 0:
        print_digest(x)
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run, (str(Path(folder) / "rendezvous"),), WORLD_SIZE)


if __name__ == "__main__":
    main()
