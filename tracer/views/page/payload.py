"""How tables travel inside the page: typed arrays behind each other, compressed, as text.

Layout, read by front/payload.js: a length (uint32), a JSON header of that length, then columns. The header says of each
column its table, type, length and place. Bytes of a column lie by significance (all lowest bytes first), which
compresses better; a `delta` column holds differences of uint32. Strings are codes into a list in the header. All of it
is one zlib stream in base64.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

_TYPES = {"uint8": "u1", "uint16": "u2", "uint32": "u4", "int32": "i4", "float32": "f4", "float64": "f8"}
_LEVEL = 6


class Payload:
    """Collects tables and documents."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, dict[str, Any]]] = {}
        self._documents: dict[str, Any] = {}
        self._bytes = bytearray()

    def add_document(self, name: str, document: Any) -> None:
        """Add something that is no table."""
        self._documents[name] = document

    def add(self, table: str, column: str, values: NDArray[Any], *, delta: bool = False) -> None:
        """Add a column of numbers; -1 may stand for none in whole numbers, NaN in others."""
        # Differences wrap around at 32 bits, and so does their sum.
        array = np.diff(values.astype(np.uint32), prepend=np.uint32(0)) if delta else values
        if array.dtype.kind in "iu":
            array = array.astype(_smallest(array))
        elif array.dtype != np.float64:
            array = array.astype(np.float32)
        name = _TYPES[array.dtype.name]
        self._tables.setdefault(table, {})[column] = {
            "type": name, "length": len(array), "at": len(self._bytes), "delta": delta,
        }  # fmt: skip
        width = array.dtype.itemsize
        plain = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).view(np.uint8)
        self._bytes += plain.reshape(-1, width).T.tobytes()

    def add_strings(self, table: str, column: str, values: pl.Series | Sequence[str | None]) -> None:
        """Add a column of strings; null is the empty one."""
        series = pl.Series(values, dtype=pl.String).fill_null("")
        names = series.unique(maintain_order=True)
        codes = series.replace_strict(names, pl.int_range(len(names), eager=True), return_dtype=pl.Int64)
        self.add(table, column, codes.to_numpy())
        self._tables[table][column]["names"] = names.to_list()

    def add_lists(self, table: str, column: str, lists: Sequence[Sequence[int]]) -> None:
        """Add a column of lists of rising numbers, as codes into a list of lists of runs (first, count)."""
        known: dict[tuple[int, ...], int] = {}
        codes = [known.setdefault(tuple(one), len(known)) for one in lists]
        self.add(table, column, np.array(codes, np.int64))
        self._tables[table][column]["runs"] = [_runs(one) for one in known]

    def encode(self) -> str:
        """Return it as text."""
        header = json.dumps({"tables": self._tables, "documents": self._documents}, separators=(",", ":")).encode()
        whole = len(header).to_bytes(4, "little") + header + bytes(self._bytes)
        return base64.b64encode(zlib.compress(whole, _LEVEL)).decode()


def _smallest(array: NDArray[Any]) -> str:
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    if low < 0:
        assert max(-low, high) < 1 << 31, "beyond 32 bits"
        return "int32"
    assert high < 1 << 32, "beyond 32 bits"
    return "uint8" if high < 1 << 8 else "uint16" if high < 1 << 16 else "uint32"


def _runs(numbers: Sequence[int]) -> list[int]:
    runs: list[int] = []
    for number in numbers:
        if runs and runs[-2] + runs[-1] == number:
            runs[-1] += 1
        else:
            runs += [number, 1]
    return runs
