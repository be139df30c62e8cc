"""DistributedDataParallel: several buckets, gradients as views of them, unused parameters, a static graph, no_sync."""

import torch
from digest import print_digest
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.heads = nn.ModuleList([nn.Linear(16, 4, bias=False) for _ in range(2)])

    def forward(self, x: torch.Tensor, head: int) -> torch.Tensor:
        return self.heads[head](self.body(x))


def train(**options: bool) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model = DistributedDataParallel(TwoHeads(), bucket_cap_mb=0.001, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(100 + dist.get_rank())
    for step in range(2):
        head = step % 2 if options.get("find_unused_parameters") else 0
        if options.get("static_graph") is None:
            with model.no_sync():
                model(torch.randn(4, 16), head).square().mean().backward()
        model(torch.randn(4, 16), head).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def main() -> None:
    dist.init_process_group("gloo")
    results = train(gradient_as_bucket_view=True, find_unused_parameters=True)
    results += train(find_unused_parameters=True)
    results += train(static_graph=True, gradient_as_bucket_view=True)
    print_digest(*results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
