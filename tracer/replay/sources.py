"""What was there before the recording, or came from outside of it: where each source of the graph lies, and its bytes.

Theory of operation. A named tensor was kept when it was named. Of any other source the graph tells type and readers
only: it lies where the arguments of its readers lie for which nothing else is brought, and its bytes are what the first
of its readers found there. All its other readers are given the same bytes, whatever they found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from truedag.tracer.errors import ReplayError
from truedag.tracer.replay.calls import NamedValue
from truedag.tracer.replay.memory import Bytes, Mask, Ref, StorageKey, mask_of, window
from truedag.tracer.replay.supply import Edge, Need, Supply, choices, deliver, totals


class Masks:
    """Which bytes of its storage each tensor has, made once."""

    def __init__(self, storage_bytes: Mapping[StorageKey, int]) -> None:
        """`storage_bytes`: of each storage, the most that it ever had."""
        self.storage_bytes = dict(storage_bytes)
        self._known: dict[tuple[object, ...], Mask] = {}

    def of(self, ref: Ref) -> Mask:
        """Return a tensor's bytes."""
        key = (ref.key, ref.layout, ref.offset)
        mask = self._known.get(key)
        if mask is None:
            mask = self._known[key] = mask_of(ref, self.storage_bytes[ref.key])
        return mask

    def whole(self, key: StorageKey) -> Mask:
        """Return all of a storage."""
        return np.ones(self.storage_bytes[key], bool)


@dataclass(slots=True)
class Source:
    """A source: in which storage it lies, which of its bytes it has, and what is in them as far as that is known."""

    node: int
    key: StorageKey
    mask: Mask
    content: Bytes
    known: Mask

    def learn(self, ref: Ref, elements: Bytes, wanted: Mask) -> None:
        """Hear what a tensor had in it; bytes that are known already stay."""
        seen = np.zeros_like(self.content)
        found = window(seen, ref.layout, ref.offset)
        found[...] = elements.reshape(found.shape)
        fresh = wanted & ~self.known
        self.content[fresh] = seen[fresh]
        self.known |= fresh


def find_sources(
    nodes: pl.DataFrame,
    named: Sequence[NamedValue],
    readers: Sequence[tuple[Sequence[Need], Sequence[Edge]]],
    written: Callable[[int, StorageKey], Mask | None],
    masks: Masks,
) -> dict[int, Source]:
    """Return the sources that somebody reads, by node.

    Args:
        nodes: the graph's.
        named: what the program named.
        readers: of every node, what it may need and its edges.
        written: which bytes of a storage an operator wrote.
        masks: the tensors' bytes.

    Raises:
        ReplayError: where a source lies cannot be found out.
    """
    sources: dict[int, Source] = {}
    unnamed: list[int] = []
    rows = nodes.filter(pl.col("kind").is_in(["parameter", "input"])).select("node", "rank", "op", "label").rows()
    for node, rank, role, label in rows:
        entries = [
            one
            for one in named
            if (one.ref.key[0], one.role, one.name) == (rank, role, label) and not one.is_final and label
        ]
        if len(entries) == 1:
            ref = entries[0].ref
            source = sources[node] = _empty(node, ref.key, masks.of(ref))
            source.learn(ref, entries[0].elements, source.mask)
        else:
            unnamed.append(node)
    for node, key in _places(unnamed, readers, sources, written).items():
        sources[node] = _empty(node, key, masks.whole(key))
    return sources


def _empty(node: int, key: StorageKey, mask: Mask) -> Source:
    return Source(node=node, key=key, mask=mask, content=np.zeros(len(mask), np.uint8), known=np.zeros(len(mask), bool))


def _places(
    unnamed: Sequence[int],
    readers: Sequence[tuple[Sequence[Need], Sequence[Edge]]],
    sources: Mapping[int, Source],
    written: Callable[[int, StorageKey], Mask | None],
) -> dict[int, StorageKey]:
    """In which storage each source lies: where all its readers have bytes that nothing else brings."""

    def produces(node: int, key: StorageKey) -> Mask | None:
        source = sources.get(node)
        if source is None:
            return written(node, key)
        return source.mask if source.key == key else None

    wanted = set(unnamed)
    candidates: dict[int, list[StorageKey]] = {}
    rivals: dict[int, set[int]] = {node: set() for node in unnamed}
    for needs, edges in readers:
        mine = {edge.src for edge in edges if edge.src in wanted}
        for node in mine:
            rivals[node] |= mine - {node}
        for kind in {edge.type for edge in edges if edge.src in wanted}:
            for node, keys in _open_keys(needs, [edge for edge in edges if edge.type == kind], wanted, produces):
                before = candidates.get(node)
                candidates[node] = keys if before is None else [key for key in before if key in keys]
    found: dict[int, StorageKey] = {}
    while candidates:
        node = min(candidates, key=lambda one: (len(candidates[one]), one))
        keys = candidates.pop(node)
        if not keys:
            raise ReplayError(f"node {node} is an input, and none of its readers' arguments can be where it lies")
        found[node] = keys[0]
        for rival in rivals[node] & candidates.keys():
            candidates[rival] = [key for key in candidates[rival] if key != keys[0]]
    return found


def _open_keys(
    needs: Sequence[Need],
    edges: Sequence[Edge],
    wanted: set[int],
    produces: Callable[[int, StorageKey], Mask | None],
) -> Iterator[tuple[int, list[StorageKey]]]:
    """Of each wanted source among the edges of one type, the storages whose bytes no other edge brings."""
    kind = edges[0].type
    brought = totals(edges)
    known = {src: count for src, count in brought.items() if src not in wanted}
    keys: list[StorageKey] = []
    for chosen in choices([need for need in needs if need.type == kind], brought.total()):
        for part in deliver(chosen, known, produces):
            if not part.is_whole and part.need.key not in keys:
                keys.append(part.need.key)
    for src in brought.keys() & wanted:
        yield src, keys


def learn_from(
    sources: Mapping[int, Source], supplies: Sequence[Supply], found: Mapping[int, tuple[Ref, Bytes]]
) -> None:
    """Let sources hear what a reader found in its arguments (`found`, by number)."""
    for one in supplies:
        for src, mask in one.parts.items():
            if src in sources and one.need.number in found:
                sources[src].learn(*found[one.need.number], mask)
