"""What the prompts of an inference run say: stretches of a source of tokens, or given token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from truedag.model.config import ModelConfig
from truedag.parallel.errors import DataError
from truedag.parallel.inference import InferenceConfig
from truedag.parallel.text import TokenSource


class Prompts:
    """Prompt i begins at token i * (longest prompt) of the source, taken as a ring; or it is the i-th that is given."""

    def __init__(self, source: TokenSource | Sequence[Sequence[int]]) -> None:
        self._source = source

    def check(self, model: ModelConfig, inference: InferenceConfig) -> None:
        """Refuse prompts that are not those of the run. Local.

        Raises:
            DataError: they are not as many or as long as they should be, or have tokens that the model has not.
        """
        if isinstance(self._source, TokenSource):
            self._source.require(inference.longest, f"the longest prompt (prompt_lengths={inference.prompt_lengths})")
            return
        if len(self._source) != inference.num_prompts:
            raise DataError(f"{len(self._source)} prompts are given, num_prompts={inference.num_prompts}")
        for number, prompt in enumerate(self._source):
            if len(prompt) != inference.length_of(number):
                raise DataError(
                    f"prompt {number} has {len(prompt)} tokens, prompt_lengths says {inference.length_of(number)}"
                )
            if min(prompt) < 0 or max(prompt) >= model.vocab_size:
                raise DataError(f"prompt {number} has a token outside the vocabulary (vocab_size={model.vocab_size})")

    def read(self, prompts: range, rows: range, inference: InferenceConfig) -> Tensor:
        """Return some rows of a data-parallel rank's prompts, int64 [rows, tokens]; they are equally long. Local."""
        return torch.from_numpy(np.stack([self._read(prompts[row], inference) for row in rows]))

    def _read(self, prompt: int, inference: InferenceConfig) -> np.typing.NDArray[np.int64]:
        if isinstance(self._source, TokenSource):
            return self._source.window(prompt * inference.longest, inference.length_of(prompt))
        return np.array(self._source[prompt], dtype=np.int64)
