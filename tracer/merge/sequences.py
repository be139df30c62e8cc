"""The records of one group on one rank as columns, and what can make their numbers unsure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
NEVER = np.iinfo(np.int64).max
# Why a number cannot be told.
MISSING = "ambiguous: a message of this group is missing before it on its rank"
FROM_ANYBODY = "ambiguous: a receive from any source came before"
UNKNOWN_SOURCE = "receive from any source"
UNCOUNTED = "ambiguous: how many messages came before it on its rank is unknown"
UNTOLD = "ambiguous: the messages of this group were not counted on its rank"
REPEATED = "ambiguous: the backend counted it and another as one"
FAILED = "it failed"
TWICE = "ambiguous: its rank has two different records of it"
MAY_FOLLOW_MONITORED = "ambiguous: a monitored barrier may be missing before it on its rank"

COLLECTIVE, MONITORED, MANY, SEND, RECEIVE, FROM_ANY = range(6)
KINDS = {
    "c10d::reduce_scatter_": MANY,  # gloo counts one for each rank, alike everywhere
    "c10d::monitored_barrier_": MONITORED,
    "c10d::send": SEND,
    "c10d::recv_": RECEIVE,
    "c10d::recv_any_source_": FROM_ANY,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the rank said of one group."""

    begin: Mapping[str, Any]
    end: Mapping[str, Any] | None = None
    is_one: bool = True  # no two groups were told under one key


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The records of one group on one rank, as columns in the order in which they are given, and what is found."""

    ranks: tuple[int, ...]
    backend: str
    order: Ints
    sequence: Ints
    kind: Ints
    peer: Ints  # changed where the source of a receive from any source is found
    tag: Ints
    start: Ints
    end: Ints  # of the work; NEVER: unknown
    failed: NDArray[np.bool_]
    number: Ints  # -1: unknown
    doubt: NDArray[np.object_]


def once(part: Part, places: Ints) -> tuple[Ints, tuple[Ints, Ints]]:
    """These records by their order, each once; and the others, with what they repeat."""
    places = places[np.argsort(part.order[places], kind="stable")]
    is_new = np.diff(part.order[places], prepend=-1) != 0
    if is_new.all():
        return places, (places[:0], places[:0])
    firsts, run = places[is_new], np.cumsum(is_new) - 1
    identity = (part.sequence, part.kind, part.peer, part.tag, part.failed)
    differs = np.any([column[places] != column[firsts[run]] for column in identity], axis=0)
    is_torn = np.bincount(run, differs) > 0
    part.doubt[places[is_torn[run]]] = TWICE
    again = ~is_new & ~is_torn[run]
    return firsts[~is_torn], (places[again], firsts[run][again])


def copy_twins(part: Part, twins: tuple[Ints, Ints]) -> None:
    """Give what repeats a record its number."""
    again, first = twins
    for column in (part.order, part.number, part.doubt, part.peer):
        column[again] = column[first]
