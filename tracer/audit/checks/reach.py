"""What can be reached along a subject's edges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from truedag.tracer.audit.subject import Subject


def readers_of(subject: Subject) -> dict[int, list[int]]:
    """Return what edges lead to, by the node that they come from."""
    readers: dict[int, list[int]] = {}
    for source, target in subject.edges.select("src", "dst").iter_rows():
        readers.setdefault(source, []).append(target)
    return readers


def reach(starts: Iterable[int], readers: Mapping[int, Sequence[int]]) -> set[int]:
    """Return all that edges lead to from some nodes, and these."""
    reached = set(starts)
    frontier = list(reached)
    while frontier:
        fresh = [target for target in readers.get(frontier.pop(), ()) if target not in reached]
        reached.update(fresh)
        frontier += fresh
    return reached
