"""Programs on one GPU: each function makes what it needs, warms up, and returns what is to be recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Program = Callable[[], Any]


class Block(nn.Module):
    """A layer of a transformer."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.queries_keys_values, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x_BSH: Tensor) -> Tensor:
        batch, sequence, hidden = x_BSH.shape
        parts = self.queries_keys_values(self.before_attention(x_BSH)).view(batch, sequence, 3, self.heads, -1)
        attended = functional.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4), is_causal=True)
        x_BSH = x_BSH + self.out(attended.transpose(1, 2).reshape(batch, sequence, hidden))
        return x_BSH + self.down(functional.gelu(self.up(self.before_mlp(x_BSH))))


def transformer(device: str, *, hidden: int = 256, layers: int = 2) -> nn.Module:
    """Return a small transformer with seeded weights."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(hidden, hidden // 64) for _ in range(layers))).to(device)


def training(model: nn.Module, *, dtype: torch.dtype = torch.bfloat16, hidden: int = 256) -> Program:
    """Return two training steps, one with a fused optimizer and one with a foreach one, that give their losses."""
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True),
    ]
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    batch_BSH = torch.randn(2, 64, hidden).pin_memory()

    def step(optimizer: torch.optim.Optimizer) -> float:
        x_BSH = batch_BSH.to("cuda", non_blocking=True)
        with torch.autocast("cuda", dtype=dtype):
            loss = model(x_BSH).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.item()

    def steps() -> list[float]:
        return [step(optimizer) for optimizer in optimizers]

    steps()
    torch.cuda.synchronize()
    return steps


def two_streams() -> Program:
    """Return work on two streams, the second waiting for an event of the first, and the host for the second."""
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    weight, other = torch.randn(512, 512, device="cuda"), torch.randn(512, 512, device="cuda")
    sent, received = torch.randn(512, 512).pin_memory(), torch.empty(512, 512).pin_memory()

    def work() -> None:
        done = torch.cuda.Event()
        with torch.cuda.stream(first):
            product = sent.to("cuda", non_blocking=True) @ weight
            done.record(first)
        with torch.cuda.stream(second):
            second.wait_event(done)
            other.relu()  # reads nothing that the first stream made: its order is the event's alone
            received.copy_(other, non_blocking=True)
        second.synchronize()
        received.neg()
        torch.cuda.current_stream().wait_stream(first)
        product.sum()

    work()
    torch.cuda.synchronize()
    return work


def reused_memory() -> Program:
    """Return operators of which the second makes its output where the first's, given back, had lain."""
    x = torch.randn(1 << 20, device="cuda")

    def work() -> bool:
        gone = x + 1
        address = gone.data_ptr()
        del gone
        again = x * 2
        again.sigmoid()
        return again.data_ptr() == address

    work()
    return work


def graph_replays() -> Program:
    """Return two replays of a CUDA graph between operators."""
    x, layer = torch.randn(64, 256, device="cuda"), nn.Linear(256, 256).cuda()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(side):
            layer(x).relu()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            result = layer(x).relu()

    def work() -> float:
        x.add_(1)
        graph.replay()
        graph.replay()
        return result.sum().item()

    work()
    return work


def compiled_training() -> Program:
    """Return a training step of a model that torch.compile has compiled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 8)).cuda()
    compiled, x = torch.compile(model), torch.randn(32, 64, device="cuda")

    def step() -> float:
        loss = compiled(x).square().mean()
        loss.backward()
        return loss.item()

    step()
    torch.cuda.synchronize()
    return step
