"""Partition a DAG by keys so that what comes out is a DAG as well (DESIGN rule 8).

Theory of operation. Elements of one key become one part. Where such parts lead to each other in a circle (strongly
connected components of the quotient), each element gets a height: that of the highest that leads to it, and one more
where that one is of another key. A part is then a key at a height: edges between parts lead upwards, so there is no
circle left. In the end a part is lifted to the next one of its key, and they are one, where all that it leads to is
higher still: what depends on nothing would lie at the bottom otherwise, far from what it is for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def split_parts(keys: Ints, src: Ints, dst: Ints) -> Ints:
    """Return each element's part: equal only where keys are, and the quotient by parts is acyclic.

    Args:
        keys: [elements] from 0 on; elements are in topological order.
        src: [edges] places of elements that edges begin at.
        dst: [edges] where they end, dst > src.
    """
    num_keys = int(keys.max(initial=-1)) + 1
    outer = keys[src] != keys[dst]
    pairs = np.unique(keys[src[outer]] * np.int64(max(num_keys, 1)) + keys[dst[outer]])
    circle = find_circles(num_keys, *np.divmod(pairs, max(num_keys, 1)))
    parts = keys.copy()
    stuck = np.flatnonzero(circle[keys] >= 0)
    if len(stuck):
        inner = (circle[keys[src]] >= 0) & (circle[keys[src]] == circle[keys[dst]])
        parts[stuck] = _layer(stuck, keys, src[inner], dst[inner]) + num_keys
    return np.unique(parts, return_inverse=True)[1].astype(np.int64)


def find_circles(num_nodes: int, src: Ints, dst: Ints) -> Ints:
    """Return the strongly connected component of each node that is in a circle with others; -1 of the rest."""
    order = np.argsort(src, kind="stable")
    targets = dst[order].tolist()
    begins = np.searchsorted(src[order], np.arange(num_nodes + 1)).tolist()
    index, low, onto = [0] * num_nodes, [0] * num_nodes, [False] * num_nodes
    circle = np.full(num_nodes, -1, np.int64)
    stack: list[int] = []
    count = found = 0
    for root in range(num_nodes):
        if index[root]:
            continue
        work = [(root, begins[root])]
        while work:
            node, at = work.pop()
            if at == begins[node]:
                count += 1
                index[node] = low[node] = count
                stack.append(node)
                onto[node] = True
            elif onto[targets[at - 1]]:
                low[node] = min(low[node], low[targets[at - 1]])
            while at < begins[node + 1]:
                target = targets[at]
                at += 1
                if not index[target]:
                    work += [(node, at), (target, begins[target])]
                    break
                if onto[target]:
                    low[node] = min(low[node], index[target])
            else:
                if low[node] == index[node]:
                    members = stack[stack.index(node) :] if stack[-1] != node else [node]
                    del stack[-len(members) :]
                    for member in members:
                        onto[member] = False
                    if len(members) > 1:
                        circle[members] = found
                        found += 1
    return circle


def _layer(elements: Ints, keys: Ints, src: Ints, dst: Ints) -> Ints:
    """Return the parts of elements whose keys lie in circles; the edges are those inside one circle."""
    order = np.argsort(dst, kind="stable")
    tails, heads = src[order].tolist(), dst[order]
    begins = np.searchsorted(heads, elements, "left").tolist()
    ends = np.searchsorted(heads, elements, "right").tolist()
    own = keys.tolist()
    height: dict[int, int] = {}
    for place, element in enumerate(elements.tolist()):
        highest = 0
        for tail in tails[begins[place] : ends[place]]:
            highest = max(highest, height[tail] + (own[tail] != own[element]))
        height[element] = highest
    heights = np.array([height[element] for element in elements.tolist()], np.int64)
    stride = int(heights.max(initial=0)) + 1
    names, parts = np.unique(keys[elements] * stride + heights, return_inverse=True)
    place_of = np.zeros(len(keys), np.int64)
    place_of[elements] = parts
    pairs = np.unique(place_of[src] * np.int64(len(names)) + place_of[dst])
    return _lift(*np.divmod(names, stride), *np.divmod(pairs, len(names)))[parts]


def _lift(key: Ints, height: Ints, src: Ints, dst: Ints) -> Ints:
    """Join each part with the next one of its key above it, where nothing that it leads to is lower."""
    follows: list[set[int]] = [set() for _ in key]
    for one, other in zip(src.tolist(), dst.tolist(), strict=True):
        if one != other:
            follows[one].add(other)
    above = [part + 1 if part + 1 < len(key) and key[part + 1] == key[part] else -1 for part in range(len(key))]
    into = list(range(len(key)))

    def find(part: int) -> int:
        while into[part] != part:
            part = into[part]
        return part

    keys, heights = key.tolist(), height.tolist()
    order = np.argsort(-height, kind="stable").tolist()
    changed = True
    while changed:
        changed = False
        for part in order:
            if into[part] != part or above[part] < 0:
                continue
            target = find(above[part])
            heads = {find(head) for head in follows[part]} - {part, target}
            if all(heights[head] >= heights[target] + (keys[head] != keys[part]) for head in heads):
                into[part] = target
                follows[target] |= follows[part]
                changed = True
    return np.array([find(part) for part in range(len(key))], np.int64)
