"""Which edges others imply: not what they bring, but the order that they keep.

A node that reads what another wrote comes after it; where a longer path of data edges leads from one to the other as
well, a scheduler needs the path only. The transitive reduction of a DAG is unique, and an edge is in it if and only if
no other path joins its ends. Source: Aho, Garey, Ullman, The transitive reduction of a directed graph (1972).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def find_ordered(pairs: Iterable[tuple[int, int]], edges: Sequence[tuple[int, int]]) -> set[tuple[int, int]]:
    """Return those of `pairs` between which an edge, or a path of edges, leads; the arguments are `find_implied`'s."""
    wanted = set(pairs)
    return find_implied(wanted, edges) | wanted & set(edges)


def find_implied(pairs: Iterable[tuple[int, int]], edges: Sequence[tuple[int, int]]) -> set[tuple[int, int]]:
    """Return those of `pairs` between which a path of `edges` leads, other than the edge between them itself.

    Args:
        pairs: (src, dst) each.
        edges: of a DAG whose numbers are a topological order.
    """
    wanted = set(pairs)
    after: dict[int, set[int]] = {}
    for src, dst in edges:
        after.setdefault(src, set()).add(dst)
    reached: dict[int, int] = {}  # by node, its descendants as bits, itself included
    implied = set()
    of_src: dict[int, list[int]] = {}
    for src, dst in wanted:
        of_src.setdefault(src, []).append(dst)
    for node in sorted({*after, *of_src}, reverse=True):
        beyond = 0
        for other in after.get(node, ()):
            beyond |= reached.get(other, 1 << other) & ~(1 << other)
        direct = sum(1 << other for other in after.get(node, ()))
        for dst in of_src.get(node, ()):
            if beyond >> dst & 1:
                implied.add((node, dst))
        reached[node] = beyond | direct | 1 << node
    return implied
