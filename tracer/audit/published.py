"""Sizes of models that have a name, as their makers published them (config.json of the released checkpoints)."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PUBLISHED: tuple[tuple[str, re.Pattern[str], Mapping[str, float]], ...] = tuple(
    (name, re.compile(pattern, re.I), sizes)
    for name, pattern, sizes in (
        (
            "Llama 3 70B", r"llama[\s\-_]*3(?:\.[0-3])?[\s\-_]*70b",
            {"layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "head_dim": 128, "ffn": 28672,
             "vocabulary": 128256, "parameters": 70_553_706_496},
        ),
        (
            "Llama 3 8B", r"llama[\s\-_]*3(?:\.[0-3])?[\s\-_]*8b",
            {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "ffn": 14336,
             "vocabulary": 128256, "parameters": 8_030_261_248},
        ),
        (
            "Mixtral 8x7B", r"mixtral[\s\-_]*8x7b",
            {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "expert_hidden": 14336,
             "experts": 8, "top_k": 2, "vocabulary": 32000, "parameters": 46_702_792_704},
        ),
        (
            "Qwen3 30B-A3B", r"qwen[\s\-_]*3[\s\-_]*30b",
            {"layers": 48, "hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128, "expert_hidden": 768,
             "experts": 128, "top_k": 8, "vocabulary": 151936},
        ),
    )
)  # fmt: skip


def published_sizes(model: str) -> tuple[str, Mapping[str, float]] | None:
    """Return the name and the sizes of the model that a text names; None: it names none that is known."""
    return next(((name, sizes) for name, pattern, sizes in _PUBLISHED if pattern.search(model)), None)
