"""ZeroRedundancyOptimizer: each rank steps its share of the parameters and sends it to the others."""

import torch
from digest import print_digest
from torch import distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.Adam, lr=0.01)
    torch.manual_seed(dist.get_rank())
    for _ in range(3):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.consolidate_state_dict(to=0)
    print_digest(*(parameter.detach() for parameter in model.parameters()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
