"""Token batches from a text: bytes are the tokens, and a step's global batch is the same whatever the strategy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from truedag.parallel.text import read_text
from truedag.parallel.training import TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One microbatch. Suffixes: B sequences, S tokens."""

    tokens_BS: Tensor
    """int64."""

    labels_BS: Tensor
    """int64: the token after each."""


class TextBatches:
    """Microbatches of a text file.

    Sequence i of the run starts at byte i * S of the text, taken as a ring. Microbatch k of data-parallel rank d in
    step s holds the sequences of the global microbatch (s * num_microbatches + k) * DP + d.

    Raises:
        DataError: there is no such file, or it has fewer bytes than a sequence and its last label.
    """

    def __init__(
        self, path: Path, training: TrainingConfig, *, dp_rank: int, dp_size: int, device: torch.device
    ) -> None:
        self._length = training.sequence_length
        text = read_text(path, sequence_length=self._length)
        ring = text + text[: self._length + 1]
        self._ring = torch.frombuffer(bytearray(ring), dtype=torch.uint8).to(torch.int64)
        self._num_bytes = len(text)
        self._training = training
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._device = device

    def microbatches(self, step: int) -> Iterator[Batch]:
        """Yield this data-parallel rank's microbatches of a step, in order. Local."""
        size = self._training.micro_batch_size
        num_microbatches = self._training.num_microbatches(self._dp_size)
        for microbatch in range(num_microbatches):
            place = (step * num_microbatches + microbatch) * self._dp_size + self._dp_rank
            starts = [(place * size + row) * self._length % self._num_bytes for row in range(size)]
            window = torch.stack([self._ring[start : start + self._length + 1] for start in starts]).to(self._device)
            yield Batch(tokens_BS=window[:, :-1].contiguous(), labels_BS=window[:, 1:].contiguous())
