"""DTensor tensor parallelism with sequence parallelism, and redistribution by hand."""

import torch
from digest import print_digest
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    model = parallelize_module(
        Block(),
        mesh,
        {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Replicate()),
        },
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    losses = []
    for step in range(2):
        torch.manual_seed(step)
        loss = model(torch.randn(2, 4, 16)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    rows = distribute_tensor(torch.arange(32.0).reshape(8, 4), mesh, [Shard(0)])
    columns = (rows * 2).redistribute(mesh, [Shard(1)])
    whole = (columns + 1).full_tensor()
    print_digest(*losses, columns.to_local(), whole, *(p.detach().full_tensor() for p in model.parameters()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
