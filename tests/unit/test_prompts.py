"""What the prompts of an inference run say."""

from __future__ import annotations

from pathlib import Path

import pytest

from truedag.model.config import ModelConfig
from truedag.parallel.errors import DataError
from truedag.parallel.inference import InferenceConfig
from truedag.parallel.prompts import Prompts
from truedag.parallel.text import open_tokens

MODEL = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
INFERENCE = InferenceConfig(num_prompts=3, prompt_lengths=(4, 2))


def test_prompts_of_a_text_begin_a_longest_prompt_apart_in_a_ring(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"abcdefghij")
    prompts = Prompts(open_tokens(path, vocab_size=256))
    prompts.check(MODEL, INFERENCE)
    texts = [bytes(prompts.read(range(3), range(row, row + 1), INFERENCE)[0].tolist()) for row in range(3)]
    assert texts == [b"abcd", b"ef", b"ijab"]
    assert bytes(prompts.read(range(2, 3), range(1), INFERENCE)[0].tolist()) == b"ijab"


def test_prompts_of_equal_length_are_read_together() -> None:
    prompts = Prompts([[1, 2], [3, 4], [5, 6], [7, 8]])
    inference = InferenceConfig(num_prompts=4, prompt_lengths=2, micro_batch_size=2)
    prompts.check(MODEL, inference)
    assert prompts.read(range(2, 4), range(2), inference).tolist() == [[5, 6], [7, 8]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1, 2, 3, 4]], "1 prompts are given, num_prompts=3"),
        ([[1, 2, 3, 4], [1], [1, 2, 3, 4]], "prompt 1 has 1 tokens, prompt_lengths says 2"),
        ([[1, 2, 3, 4], [1, 256], [1, 2, 3, 4]], r"prompt 1 has a token outside the vocabulary \(vocab_size=256\)"),
        ([[1, 2, 3, -4], [1, 2], [1, 2, 3, 4]], "prompt 0 has a token outside the vocabulary"),
    ],
)
def test_prompts_that_are_not_those_of_the_run_are_refused(given: list[list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Prompts(given).check(MODEL, INFERENCE)


def test_a_text_shorter_than_a_prompt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"abc")
    with pytest.raises(DataError, match=r"has 3 bytes; the longest prompt \(prompt_lengths=\(4, 2\)\) needs 4"):
        Prompts(open_tokens(path, vocab_size=256)).check(MODEL, INFERENCE)
