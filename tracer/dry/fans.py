"""Edges from one node to another that carry several tensors, as into what puts parts of one tensor in another order.

Theory of operation. Parallel edges are in the order of their bytes, so which comes first differs from rank to rank.
Each carries a tensor that goes into the node, whole; the node has these in the order of its program. So a fan is told
by which of the node's tensors it carries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from truedag.tracer.dry.forms import Bools
from truedag.tracer.dry.tensor_texts import TensorText, item_bytes
from truedag.tracer.dry.world import Ints
from truedag.tracer.merge.part import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What goes in, or comes out, of nodes of a shape."""

    text: TensorText
    seen: Ints  # [dimensions, samples]
    dimensions: Ints  # their numbers, wherever they are evaluated
    num_bytes: Ints  # [samples]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fan:
    """Parallel edges that differ from rank to rank."""

    edges: slice
    tensors: list[tuple[str, Ints]]
    """Dtype, and the numbers of the dimensions."""


def find_fans(parts: Sequence[Part], inputs_of: Callable[[int], Side]) -> tuple[list[Fan], Ints]:
    """Return the fans of ranks of one program, and all edges that are in none.

    Args:
        parts: of the ranks.
        inputs_of: says what goes into a node.

    Raises:
        ValueError: edges do not carry tensors that go into their node.
    """
    first = parts[0].edges
    is_next = np.ones(max(len(first["src"]) - 1, 0), bool)
    for name in ("src", "dst", "kind"):
        is_next &= first[name][1:] == first[name][:-1]
    begins = np.flatnonzero(np.append(True, ~is_next))
    lengths = np.diff(begins, append=len(first["src"]))
    said = np.stack([one.edges["bytes"] for one in parts], axis=1)
    known = [{number: (dtype, *sizes) for number, dtype, sizes in one.told["layouts"]} for one in parts]
    is_alone = np.ones(len(first["src"]), bool)
    fans = []
    for begin, length in zip(begins[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
        edges = slice(begin, begin + length)
        if (said[edges] == said[edges, :1]).all():
            continue
        is_alone[edges] = False
        carried = [
            Counter(own.get(at, ("",)) for at in part.edges["layout"][edges].tolist())
            for own, part in zip(known, parts, strict=True)
        ]
        side = inputs_of(int(first["dst"][begin]))
        fans.append(Fan(edges=edges, tensors=_match(carried, said[edges], side)))
    return fans, np.flatnonzero(is_alone)


def _match(carried: Sequence[Counter[tuple[str, ...]]], num_bytes: Ints, side: Side) -> list[tuple[str, Ints]]:
    """Return which of a node's tensors edges carry, on each sample."""
    chosen = [
        (dtype, slots)
        for dtype, slots in side.text.tensors()
        if all((dtype, *sizes) in own for own, sizes in zip(carried, side.seen[slots].T.tolist(), strict=True))
    ]
    weights = [item_bytes(dtype) * side.seen[slots].prod(axis=0) for dtype, slots in chosen]
    is_whole = len(chosen) == len(num_bytes) and (np.sort(weights, axis=0) == np.sort(num_bytes, axis=0)).all()
    if not is_whole:
        raise ValueError(f"edges carry {[dict(own) for own in carried]} into {side.text.pieces}")
    return [(dtype, side.dimensions[slots]) for dtype, slots in chosen]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What a fan carries on ranks that were told other numbers."""

    edges: slice
    dtypes: list[str]
    sizes: list[Ints]
    """Of each tensor: [dimensions, asked]"""

    def is_clear(self) -> Bools:
        """Whether all carry something, and those that carry as much are of equal sizes, [asked]."""
        ranks = [self.tell(asked) for asked in range(self.sizes[0].shape[1])]
        return np.array(
            [told[0][0] > 0 and len(set(told)) == len({num_bytes for num_bytes, _, _ in told}) for told in ranks], bool
        )

    def tell(self, asked: int) -> list[tuple[int, str, tuple[int, ...]]]:
        """Return the bytes, dtype and sizes on each edge of one of the ranks."""
        found = []
        for dtype, sizes in zip(self.dtypes, self.sizes, strict=True):
            own = tuple(sizes[:, asked].tolist())
            found.append((int(np.prod(own, dtype=np.int64)) * item_bytes(dtype), dtype, own))
        return sorted(found)
