"""The types of tensors as nodes tell them in `inputs` and `outputs`: float32[2,4] int64[]."""

from __future__ import annotations

import re

_TENSOR = re.compile(r"(\w+)\[([\d,]*)\]")


def read_tensors(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return dtype and sizes of each tensor."""
    return [(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in _TENSOR.findall(text)]
