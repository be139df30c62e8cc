"""What the graph holds as a whole because nobody saw inside: compiled graphs, CUDA graphs, kernels of no operator.

A compiled graph is one node a call with its tensors in and out; what it is made of is its own business. A CUDA graph
and a kernel that no operator launched have no tensors at all: what they write is written by nobody, as far as the data
edges know, and what reads it has an input where there should be an edge.
"""

from __future__ import annotations

from collections import Counter

from truedag.tracer.merge.columns import Assembly

# By the namespace of the node's op: what it is, and whether its tensors are known.
_OPAQUE = {"inductor": ("compiled graph", True), "cuda": ("", False)}
_OF_CUDA = {"graph": "CUDA graph"}


def tell_opaque(assembly: Assembly) -> list[dict[str, object]]:
    """Return for `meta.json`: each rank's opaque nodes, counted by op and label, and whether data edges know them."""
    counts: Counter[tuple[int, str, str]] = Counter()
    for rank, op, label in zip(assembly.rank, assembly.op, assembly.label, strict=True):
        if op.partition("::")[0] in _OPAQUE:
            counts[rank, op, label] += 1
    told: list[dict[str, object]] = []
    for (rank, op, label), count in sorted(counts.items()):
        namespace, _, name = op.partition("::")
        what, has_tensors = _OPAQUE[namespace]
        what = what or _OF_CUDA.get(name, f"{name} launched by no operator")
        told.append({"rank": rank, "what": what, "label": label, "nodes": count, "tensors_known": has_tensors})
    return told
