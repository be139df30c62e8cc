"""Numbers as people type them after an option, for argparse."""

from __future__ import annotations

from argparse import ArgumentTypeError


def positive(text: str) -> int:
    """Read a whole number from 1 on.

    Raises:
        ArgumentTypeError: it is none.
    """
    return _read(text, least=1)


def natural(text: str) -> int:
    """Read a whole number from 0 on.

    Raises:
        ArgumentTypeError: it is none.
    """
    return _read(text, least=0)


def _read(text: str, *, least: int) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise ArgumentTypeError(f"{text!r} is no whole number from {least} on")
    return int(text)
