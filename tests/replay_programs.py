"""Programs that are recorded with their arguments and executed again: a training step, and decoding with a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from truedag.tracer import annotate
from truedag.tracer.graph import Graph
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.record.recording import record

Program = Callable[[], None]


def record_with_arguments(folder: Path, program: Program) -> tuple[Graph, Path]:
    """Record a program into a folder; return its graph, and where its traces are."""
    traces = folder / "traces"
    traces.mkdir(parents=True)
    with record(traces / "rank-00000.trace", recorder="python", arguments=True, synchronize=False) as recording:
        program()
    assert recording.switched_off == ""
    merge_traces(traces, folder / "dag")
    return Graph.open(folder / "dag"), traces


def name_output(tensor: torch.Tensor, name: str) -> torch.Tensor:
    annotate.tensor(tensor, name, role="output")
    return tensor


class Training:
    """Two steps of a transformer: dropout, forward, backward, clipped gradients, foreach AdamW."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.model = nn.Sequential(block, nn.Linear(16, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05, foreach=True)
        for name, parameter in self.model.named_parameters():
            annotate.tensor(parameter, name, role="parameter")
        self.data = torch.randn(2, 5, 16)
        self.target = torch.randint(0, 4, (10,))
        self.losses: list[torch.Tensor] = []

    def __call__(self) -> None:
        for _ in range(2):
            scores = self.model(self.data).reshape(-1, 4)
            loss = nn.functional.cross_entropy(scores, self.target)
            self.losses.append(name_output(loss, "loss"))
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5, foreach=True)
            self.optimizer.step()
            self.optimizer.zero_grad()


class Decoding:
    """A prompt and five more tokens of a small transformer; keys and values lie in one cache, written slot by slot."""

    LAYERS, HEADS, SIZE, VOCABULARY, LENGTH = 2, 2, 8, 11, 12

    def __init__(self) -> None:
        torch.manual_seed(2)
        width = self.HEADS * self.SIZE
        self.embedding = nn.Embedding(self.VOCABULARY, width)
        self.qkv = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(self.LAYERS)])
        self.projections = nn.ModuleList([nn.Linear(width, width) for _ in range(self.LAYERS)])
        self.head = nn.Linear(width, self.VOCABULARY)
        self.cache = torch.zeros(self.LAYERS, 2, 1, self.HEADS, self.LENGTH, self.SIZE)
        self.prompt = torch.tensor([[1, 2, 3, 4]])
        annotate.tensor(self.prompt, "prompt", role="input")
        annotate.tensor(self.cache, "cache", role="state")
        self.kept: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self) -> None:
        tokens, written, position = self.prompt, torch.zeros(1, 6, dtype=torch.int64), 0
        for step in range(6):
            logits = self.forward(tokens, position)
            position += tokens.shape[1]
            tokens = logits.argmax(-1, keepdim=True)
            written[:, step : step + 1] = tokens
            self.kept.append(name_output(logits, "logits"))
        self.kept.append(name_output(written, "tokens"))

    def forward(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        count = tokens.shape[1]
        here, seen = slice(position, position + count), slice(position + count)
        hidden = self.embedding(tokens)
        for qkv, projection, (keys, values) in zip(self.qkv, self.projections, self.cache, strict=True):
            query, key, value = qkv(hidden).view(1, count, 3, self.HEADS, self.SIZE).permute(2, 0, 3, 1, 4)
            keys[:, :, here].copy_(key)
            values[:, :, here] = value
            mixed = nn.functional.scaled_dot_product_attention(
                query, keys[:, :, seen], values[:, :, seen], is_causal=count > 1
            )
            hidden = hidden + projection(mixed.transpose(1, 2).reshape(1, count, -1))
        logits: torch.Tensor = self.head(hidden[:, -1])
        return logits
