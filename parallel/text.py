"""Reads the text that a model is trained on. No torch."""

from __future__ import annotations

from pathlib import Path

from truedag.parallel.errors import DataError


def read_text(path: Path, *, sequence_length: int) -> bytes:
    """Return a text file's bytes.

    Raises:
        DataError: there is no such file, or it has fewer bytes than a sequence and its last label.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the training text cannot be read ({error.strerror}); name a text file") from error
    if len(text) <= sequence_length:
        raise DataError(f"{path} has {len(text)} bytes; sequence_length={sequence_length} needs {sequence_length + 1}")
    return text
