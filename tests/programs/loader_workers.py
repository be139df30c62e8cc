"""A DataLoader with a worker process feeds a training loop under DistributedSampler."""

import torch
from digest import print_digest
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler


class Squares(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.full((4,), float(index))
        return x / 16, x.square().sum() / 1024


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    data = Squares()
    sampler = DistributedSampler(data, seed=1)
    loader = DataLoader(data, batch_size=4, sampler=sampler, num_workers=1, multiprocessing_context="fork")
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for x, y in loader:
            loss = nn.functional.mse_loss(model(x).squeeze(1), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    print_digest(*losses, *(parameter.detach() for parameter in model.parameters()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
