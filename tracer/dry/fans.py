"""Edges from one node to another that carry several tensors, as into what puts parts of one tensor in another order.

Theory of operation. Parallel edges are in the order of their bytes and sizes, so which comes first differs from rank to
rank. They carry tensors of the node that they lead to, whole, or nothing of them: memory into which the node writes.
The node has its tensors in the order of its program. So a fan is told by which of them it carries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from truedag.tracer.dry.forms import Bools
from truedag.tracer.dry.tensor_texts import TensorText, item_bytes
from truedag.tracer.dry.world import Ints
from truedag.tracer.merge.part import Part

Tensor: TypeAlias = tuple[Any, ...]  # dtype and sizes


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
    carries: bool
    """Whether it carries them; else nothing of them."""


def find_fans(parts: Sequence[Part], sides_of: Callable[[int], Sequence[Side]]) -> tuple[list[Fan], Ints]:
    """Return the fans of ranks of one program, and all edges that are in none.

    Args:
        parts: of the ranks.
        sides_of: says what goes into a node, and what comes out.

    Raises:
        ValueError: edges do not carry tensors of their node.
    """
    first = parts[0].edges
    is_next = np.ones(max(len(first["src"]) - 1, 0), bool)
    for name in ("src", "dst", "kind"):
        is_next &= first[name][1:] == first[name][:-1]
    begins = np.flatnonzero(np.append(True, ~is_next))
    lengths = np.diff(begins, append=len(first["src"]))
    num_bytes = np.stack([one.edges["bytes"] for one in parts], axis=1)
    known = [{number: (dtype, *sizes) for number, dtype, sizes in one.told["layouts"]} for one in parts]
    is_alone = np.ones(len(first["src"]), bool)
    fans = []
    for begin, length in zip(begins[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
        edges = slice(begin, begin + length)
        carried = [
            [own.get(at, ("",)) for at in part.edges["layout"][edges].tolist()]
            for own, part in zip(known, parts, strict=True)
        ]
        if any(one != carried[0] for one in carried) or (num_bytes[edges] != num_bytes[edges, :1]).any():
            is_alone[edges] = False
            fans.append(_match(edges, carried, num_bytes[edges], sides_of(int(first["dst"][begin]))))
    return fans, np.flatnonzero(is_alone)


def _match(edges: slice, carried: Sequence[Sequence[Tensor]], num_bytes: Ints, sides: Sequence[Side]) -> Fan:
    """Find which of a node's tensors edges carry, on each sample."""
    counts = [Counter(own) for own in carried]
    for some in (sides[:1], sides[1:], sides):
        chosen = [
            (dtype, side.dimensions[slots], [(dtype, *sizes) for sizes in side.seen[slots].T.tolist()])
            for side in some
            for dtype, slots in side.text.tensors()
        ]
        chosen = [one for one in chosen if all(tensor in own for own, tensor in zip(counts, one[2], strict=True))]
        found: list[Counter[Tensor]] = [
            Counter(tensors) for tensors in zip(*(tensors for _, _, tensors in chosen), strict=True)
        ]
        if found != counts:
            continue
        weights = np.array([[_weigh(dtype, sizes) for dtype, *sizes in own] for own in carried]).T
        if not num_bytes.any() or (weights == num_bytes).all():
            tensors = [(dtype, dimensions) for dtype, dimensions, _ in chosen]
            return Fan(edges=edges, tensors=tensors, carries=bool(num_bytes.any()))
    raise ValueError(f"edges carry {carried} into {[str(side.text) for side in sides]}")


def _weigh(dtype: str, sizes: Sequence[int]) -> int:
    return math.prod(sizes) * item_bytes(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What a fan carries on ranks that were told other numbers."""

    edges: slice
    carries: bool
    dtypes: list[str]
    sizes: list[Ints]
    """Of each tensor: [dimensions, asked]"""

    def is_full(self) -> Bools:
        """Whether all that carry anything carry something, [asked]."""
        empty = [(sizes == 0).any(axis=0) for sizes in self.sizes]
        found: Bools = ~np.any(empty, axis=0) if self.carries else np.ones(self.sizes[0].shape[1], bool)
        return found

    def tell(self, asked: int) -> list[tuple[int, str, list[int]]]:
        """Return the bytes, dtype and sizes on each edge of one of the ranks."""
        found = []
        for dtype, sizes in zip(self.dtypes, self.sizes, strict=True):
            own = sizes[:, asked].tolist()
            found.append((_weigh(dtype, own) if self.carries else 0, dtype, own))
        return sorted(found)
