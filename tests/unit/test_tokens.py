"""What a model is fed: bytes, a tokenizer's tokens, or a token file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from truedag.parallel.errors import DataError
from truedag.parallel.text import TokenSource, TokenType, open_tokens

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def tokens(source: TokenSource) -> list[int]:
    return source.window(0, source.num_tokens).tolist()


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    words = Tokenizer(WordLevel({"[UNK]": 0, "lamp": 1, "the": 2, "point": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    path = tmp_path / "tokenizer.json"
    words.save(str(path))
    return path


def test_without_a_tokenizer_bytes_are_tokens(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes([0, 200, 255]))
    assert tokens(open_tokens(path, vocab_size=256)) == [0, 200, 255]


def test_a_tokenizer_makes_the_tokens(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the lamp at the point", encoding="utf-8")
    assert tokens(open_tokens(path, vocab_size=4, tokenizer=tokenizer)) == [2, 1, 0, 2, 3]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_raw_token_file_is_little_endian(tmp_path: Path, dtype: TokenType) -> None:
    path = tmp_path / "tokens.bin"
    size = np.dtype(dtype).itemsize
    path.write_bytes(b"".join(number.to_bytes(size, "little") for number in IDS))
    assert tokens(open_tokens(path, vocab_size=10, token_dtype=dtype)) == IDS


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64", ">u2"])
def test_an_array_states_its_own_type(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.array(IDS, dtype=dtype))
    assert tokens(open_tokens(path, vocab_size=10)) == IDS


@given(some.lists(some.integers(0, 9), min_size=1, max_size=20), some.integers(0, 100), some.integers(0, 50))
def test_a_window_goes_round(ids: list[int], start: int, length: int) -> None:
    source = TokenSource(Path("ids"), np.array(ids), vocab_size=10, unit="tokens")
    ring = ids * (1 + (start + length) // len(ids))
    assert source.window(start, length).tolist() == ring[start : start + length]


def test_a_token_outside_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.array([*IDS, 12, 11]))
    with pytest.raises(DataError, match=r"tokens.npy: token 12 at position 8 .*vocab_size=10"):
        open_tokens(path, vocab_size=10)
    np.save(path, np.array([0, 1, -1]))
    with pytest.raises(DataError, match="token -1 at position 2"):
        open_tokens(path, vocab_size=10)
    source = TokenSource(path, np.array([0, 1, 2, 7]), vocab_size=5, unit="tokens")
    with pytest.raises(DataError, match="token 7 at position 3"):
        source.window(2, 2)


def test_a_token_file_stays_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.zeros(1000, dtype=np.uint16))
    assert isinstance(open_tokens(path, vocab_size=1)._tokens, np.memmap)


def test_files_that_are_not_what_they_are_said_to_be_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    odd, text, array, matrix = (tmp_path / name for name in ("odd.bin", "text.txt", "a.npy", "m.npy"))
    odd.write_bytes(b"123")
    text.write_bytes(b"the \xff lamp")
    array.write_text("no array")
    np.save(matrix, np.zeros((2, 2), dtype=np.int64))
    floats = tmp_path / "floats.npy"
    np.save(floats, np.zeros(2))
    empty = tmp_path / "empty"
    empty.touch()
    for path, options, says in [
        (tmp_path / "none", {}, "cannot be read"),
        (tmp_path / "none.npy", {}, "cannot be read"),
        (odd, {}, "token_dtype is one of uint16, uint32"),
        (odd, {"token_dtype": "uint16"}, "3 bytes, which is no whole number of uint16"),
        (array, {}, "is no array of numbers"),
        (matrix, {}, "2-dimensional, of int64"),
        (floats, {}, "of float64"),
        (matrix, {"token_dtype": "uint16"}, "states its own type"),
        (matrix, {"tokenizer": tokenizer}, "has nothing to do"),
        (text, {"tokenizer": tokenizer}, "byte 4 is no UTF-8"),
        (text, {"tokenizer": tmp_path / "none.json"}, "no such tokenizer file"),
        (empty, {"tokenizer": array}, "is no Hugging Face tokenizer.json"),
        (empty, {}, "has 0 bytes"),
    ]:
        with pytest.raises(DataError) as refusal:
            open_tokens(path, vocab_size=256, **options)  # type: ignore[arg-type]
        assert says in str(refusal.value)
