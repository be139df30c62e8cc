"""Token batches from a source of tokens: a step's global batch is the same whatever the strategy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from truedag.model.context_parallel import positions_of_rank
from truedag.parallel.text import TokenSource
from truedag.parallel.training import TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """Which part of a global batch a rank computes."""

    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """This rank's part of one microbatch. Suffixes: B sequences, S tokens of a sequence that this rank has."""

    tokens_BS: Tensor | None
    """int64; None: not asked for."""

    labels_BS: Tensor | None
    """int64: the token after each; None: not asked for."""


class TextBatches:
    """Microbatches of a source of tokens.

    Sequence i of the run starts at token i * S of the source, taken as a ring. Microbatch k of data-parallel rank d in
    step s holds the sequences of the global microbatch (s * num_microbatches + k) * DP + d; of each, a context-parallel
    rank has the tokens at `positions_of_rank`.

    Raises:
        DataError: the source has fewer tokens than a sequence and its last label.
    """

    def __init__(
        self, source: TokenSource, training: TrainingConfig, replica: Replica, *, device: torch.device
    ) -> None:
        self._length = training.sequence_length
        source.require(self._length + 1, f"sequence_length={self._length}")
        self._source = source
        self._training = training
        self._replica = replica
        self._positions = positions_of_rank(self._length, rank=replica.cp_rank, size=replica.cp_size)
        self._device = device

    def read(self, step: int, microbatch: int, *, tokens: bool = True, labels: bool = True) -> Batch:
        """Return this rank's part of a microbatch of a step: its tokens, its labels, or both. Local."""
        return Batch(
            tokens_BS=self._read(step, microbatch, shift=0) if tokens else None,
            labels_BS=self._read(step, microbatch, shift=1) if labels else None,
        )

    def _read(self, step: int, microbatch: int, *, shift: int) -> Tensor:
        size = self._training.micro_batch_size
        num_microbatches = self._training.num_microbatches(self._replica.dp_size)
        place = (step * num_microbatches + microbatch) * self._replica.dp_size + self._replica.dp_rank
        starts = [(place * size + row) * self._length + shift for row in range(size)]
        rows = [self._source.window(start, self._length)[self._positions] for start in starts]
        return torch.from_numpy(np.stack(rows)).to(self._device)
