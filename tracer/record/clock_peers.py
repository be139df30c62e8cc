"""Agree over the process group's store which process compares its host's clock, and with which other host's.

Theory of operation. One process of each host leads: the first there that records. Leaders are numbered in the order in
which they come, and each compares its clock with that of an earlier one, its parent: a tree in which no one has more
than `CHILDREN` to answer. A leader writes down where it answers before its number can be known, so whoever looks for a
parent finds it. Everything goes through keys of our own in a clone of the store, nothing through a process group, and
no operation waits. A leader says when its recording has ended: the next recording on its host has a leader of its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from truedag.tracer.record.clock_socket import Address

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

CHILDREN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """Where a leader answers."""

    clock: str
    """Names the clock of its host."""
    host: str
    token: str
    """In hexadecimal."""
    port: int
    addresses: tuple[str, ...]

    @property
    def places(self) -> list[Address]:
        """Where it may be reached."""
        return [(address, self.port) for address in self.addresses]


class Peers:
    """The leaders, as the store knows them. Every method may raise what a store raises that is gone."""

    def __init__(self, store: Store) -> None:
        """Use a clone of a store; the original's owner may be waiting in it."""
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        original: Any = store
        self._store: Store = PrefixStore("truedag/clocks", original.clone())

    def lead(self, clock: str) -> bool:
        """Become the leader of all that have this clock; False: there is one, whose recording goes on."""
        ended = self._store.add(f"ended/{clock}", 0)
        return self._store.add(f"claims/{clock}/{ended}", 1) == 1

    def resign(self, clock: str) -> None:
        """Lead no more."""
        self._store.add(f"ended/{clock}", 1)

    def publish(self, leader: Leader) -> int:
        """Tell where this leader answers; return its number."""
        number = self._store.add("leaders", 1) - 1
        self._store.set(f"leader/{number}", json.dumps(asdict(leader)))
        return number

    def find_parent(self, number: int, clock: str) -> Leader | None:
        """Return whom a leader compares its clock with; it has that clock itself if there is nobody else.

        None: that one has taken its number and not said yet where it answers. Ask again.
        """
        while number > 0:
            number = (number - 1) // CHILDREN
            key = f"leader/{number}"
            if not self._store.check([key]):
                return None
            told = json.loads(self._store.get(key))
            told["addresses"] = tuple(told["addresses"])
            leader = Leader(**told)
            if leader.clock != clock:
                break
        return leader
