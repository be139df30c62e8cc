"""The tokens that a model is fed: a text's bytes, a text through a tokenizer, or a file of token ids. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from truedag.parallel.errors import DataError

TokenType = Literal["uint16", "uint32"]

# Larger files are checked as they are read: nobody wants to read a terabyte before the first step.
_CHECKED_AT_ONCE = 2**26


class TokenSource:
    """Token ids in a row, taken as a ring. Made by `open_tokens`; a token file stays on disk."""

    def __init__(self, path: Path, tokens: npt.NDArray[Any], *, vocab_size: int, unit: str) -> None:
        self.path = path
        self._tokens = tokens
        self._vocab_size = vocab_size
        self._unit = unit

    @property
    def num_tokens(self) -> int:
        """Tokens before it begins again."""
        return len(self._tokens)

    def window(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Return `length` token ids from position `start` on, the first following the last.

        Raises:
            DataError: one of them is not in the model's vocabulary.
        """
        places = np.arange(start, start + length) % self.num_tokens
        window = self._tokens[places].astype(np.int64)
        self._check(window, places)
        return window

    def require(self, length: int, why: str) -> None:
        """Refuse a source with fewer than `length` tokens.

        Raises:
            DataError: says how many there are, and `why` more are needed.
        """
        if self.num_tokens < length:
            raise DataError(f"{self.path} has {self.num_tokens} {self._unit}; {why} needs {length}")

    def check_first(self) -> None:
        """Check all tokens of a source of ordinary size, and the first of a large one.

        Raises:
            DataError: one of them is not in the model's vocabulary.
        """
        first = self._tokens[:_CHECKED_AT_ONCE]
        self._check(first, np.arange(0))

    def _check(self, tokens: npt.NDArray[Any], places: npt.NDArray[np.int64]) -> None:
        if len(tokens) == 0 or (int(tokens.min()) >= 0 and int(tokens.max()) < self._vocab_size):
            return
        index = int(np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))[0])
        place = int(places[index]) if len(places) else index
        raise DataError(
            f"{self.path}: token {int(tokens[index])} at position {place} is not in the model's vocabulary "
            f"(vocab_size={self._vocab_size}); use the tokenizer that the model was made for, or a larger vocab_size"
        )


def open_tokens(
    path: Path, *, vocab_size: int, tokenizer: Path | None = None, token_dtype: TokenType | None = None
) -> TokenSource:
    """Open a file of tokens. Local.

    Args:
        path: a 1-dimensional integer array (``.npy``), raw little-endian token ids (with `token_dtype`), or a text.
        vocab_size: of the model; every id must be less.
        tokenizer: a Hugging Face ``tokenizer.json``, applied to the text; None: the text's bytes are its tokens.
        token_dtype: what a raw token file consists of; None: the file is none.

    Raises:
        DataError: a file cannot be read, is not what it is said to be, or holds an id outside the vocabulary.
    """
    try:
        tokens, unit = _read(path, tokenizer, token_dtype)
    except OSError as error:
        raise DataError(
            f"{path}: the tokens cannot be read ({error.strerror or error}); name a text or token file"
        ) from error
    source = TokenSource(path, tokens, vocab_size=vocab_size, unit=unit)
    source.require(1, "a model")
    source.check_first()
    return source


def _read(path: Path, tokenizer: Path | None, token_dtype: TokenType | None) -> tuple[npt.NDArray[Any], str]:
    is_token_file = path.suffix == ".npy" or token_dtype is not None
    if is_token_file and tokenizer is not None:
        raise DataError(f"{path} holds token ids, so tokenizer={tokenizer} has nothing to do: leave it out")
    if path.suffix == ".npy":
        if token_dtype is not None:
            raise DataError(f"{path} states its own type: leave token_dtype={token_dtype} out")
        return _read_array(path), "tokens"
    if token_dtype is not None:
        return _read_raw(path, token_dtype), "tokens"
    if path.suffix == ".bin":
        raise DataError(f"{path}: say of what it consists: token_dtype is one of {', '.join(get_args(TokenType))}")
    if tokenizer is not None:
        return _tokenize(path, tokenizer), "tokens"
    if path.stat().st_size == 0:  # which no file can be mapped with
        return np.zeros(0, np.uint8), "bytes"
    return np.memmap(path, dtype=np.uint8, mode="r"), "bytes"


def _read_array(path: Path) -> npt.NDArray[Any]:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is no array of numbers: {error}") from error
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(f"{path} is no 1-dimensional array of integers (it is {_describe(tokens)})")
    return tokens


def _describe(array: Any) -> str:
    return f"{array.ndim}-dimensional, of {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__


def _read_raw(path: Path, token_dtype: TokenType) -> npt.NDArray[Any]:
    dtype = np.dtype(token_dtype).newbyteorder("<")
    num_bytes = path.stat().st_size
    if num_bytes == 0 or num_bytes % dtype.itemsize != 0:
        raise DataError(f"{path} has {num_bytes} bytes, which is no whole number of {token_dtype} tokens")
    return np.memmap(path, dtype=dtype, mode="r")


def _tokenize(path: Path, tokenizer: Path) -> npt.NDArray[Any]:
    from tokenizers import Tokenizer

    if not tokenizer.is_file():
        raise DataError(f"{tokenizer}: there is no such tokenizer file; name a Hugging Face tokenizer.json")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is no UTF-8, which a tokenizer takes; leave tokenizer out to train on bytes"
        ) from error
    try:
        encoder = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # what the package raises has no class of its own
        raise DataError(f"{tokenizer} is no Hugging Face tokenizer.json: {error}") from error
    return np.array(encoder.encode(text, add_special_tokens=False).ids, dtype=np.int64)
