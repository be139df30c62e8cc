"""What the graph holds as a whole because nobody saw inside: compiled graphs, CUDA graphs, kernels of no operator.

A compiled graph is one node a call with its tensors in and out; what it is made of is its own business. A CUDA graph
and a kernel that no operator launched have no tensors at all: what they write is written by nobody, as far as the data
edges know, and what reads it has an input where there should be an edge.
"""

from __future__ import annotations

from collections.abc import Sequence

# By the namespace of the node's op: what it is, and whether its tensors are known.
_OPAQUE = {"inductor": ("compiled graph", True), "cuda": ("", False)}
_OF_CUDA = {"graph": "CUDA graph"}


def is_opaque(op: str) -> bool:
    """Whether nobody saw inside an operator."""
    return op.partition("::")[0] in _OPAQUE


def tell_opaque(rank: int, counts: Sequence[tuple[str, str, int]]) -> list[dict[str, object]]:
    """Return for `meta.json`: a rank's opaque nodes, (op, label, how many) each, and whether data edges know them."""
    told: list[dict[str, object]] = []
    for op, label, count in counts:
        namespace, _, name = op.partition("::")
        what, has_tensors = _OPAQUE[namespace]
        what = what or _OF_CUDA.get(name, f"{name} launched by no operator")
        told.append({"rank": rank, "what": what, "label": label, "nodes": count, "tensors_known": has_tensors})
    return told
