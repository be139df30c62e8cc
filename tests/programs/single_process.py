"""No distribution at all: a convolutional net, trained by Adam under a learning rate schedule."""

import torch
from digest import print_digest
from torch import nn


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    losses = []
    for _ in range(3):
        data, target = torch.randn(4, 1, 8, 8), torch.randint(0, 3, (4,))
        loss = nn.functional.cross_entropy(model(data), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    with torch.no_grad():
        prediction = model.eval()(torch.ones(2, 1, 8, 8)).argmax(dim=1)
    print_digest(*losses, prediction, *model.state_dict().values())


if __name__ == "__main__":
    main()
