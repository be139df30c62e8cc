"""torch.distributed.pipelining: GPipe and 1F1B over as many stages as there are ranks."""

import torch
from digest import print_digest
from torch import distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe


def main() -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    results: list[object] = []
    for kind in (ScheduleGPipe, Schedule1F1B):
        torch.manual_seed(10 + rank)
        module = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        stage = PipelineStage(module, rank, world_size, device)
        schedule = kind(stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for step in range(2):
            torch.manual_seed(step)
            data, target = torch.randn(8, 8), torch.randn(8, 8)
            losses: list[torch.Tensor] = []
            if rank == 0:
                schedule.step(data)
            elif rank == world_size - 1:
                schedule.step(target=target, losses=losses)
            else:
                schedule.step()
            optimizer.step()
            optimizer.zero_grad()
            results.extend(loss.detach() for loss in losses)
        results.extend(parameter.detach() for parameter in module.parameters())
    print_digest(*results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
