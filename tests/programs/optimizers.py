"""Random numbers, writes in place, and the foreach and fused kinds of optimizers."""

import torch
from digest import print_digest
from torch import nn


def main() -> None:
    results: list[torch.Tensor] = []
    kinds = [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"foreach": True, "amsgrad": True}),
        (torch.optim.SGD, {"fused": True, "momentum": 0.9}),
        (torch.optim.SGD, {"foreach": True, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.Adagrad, {"fused": True}),
        (torch.optim.RMSprop, {"foreach": True, "centered": True}),
    ]
    for kind, options in kinds:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        optimizer = kind(model.parameters(), lr=0.01, **options)
        for _ in range(2):
            model(torch.randn(4, 8)).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=kind is torch.optim.SGD)
        results += [parameter.detach() for parameter in model.parameters()]
    generator = torch.Generator().manual_seed(7)
    noise = torch.empty(5).normal_(generator=generator)
    noise[1:3].uniform_(generator=generator).mul_(2)
    noise[torch.randperm(5, generator=generator)[:2]] = 0
    noise.clamp_(-1).unsqueeze_(0)
    results += [
        noise,
        torch.rand_like(noise),
        torch.bernoulli(torch.full((4,), 0.5)),
        torch.multinomial(torch.ones(6), 3),
    ]
    print_digest(*results)


if __name__ == "__main__":
    main()
