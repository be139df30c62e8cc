"""How many tokens the routing gives a rank, as its program hears of them, and which ranks have the same. No torch.

Theory of operation. A program cannot see the routing. What it knows of it are a few numbers for each pass of a layer,
which its token dispatcher counts: those that the rank keeps of its own, that each rank of its expert-tensor group holds
for its experts, that each of its experts gets, and, where it has several, that each expert gets of each rank. Every
size that differs between ranks of a program comes from these numbers; how many it sends to whom is told to the
all-to-all alone, and no tensor has that size.

The ranks of an exchange, those of one expert group and their expert-tensor groups, have numbers in a row; so what all
of them send is one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from truedag.parallel.routing import Counts

ROLES = ("kept", "own", "part", "expert", "all", "chunk")
_MOST_NUMBERS = 1 << 27  # of a class's ranks together; more are not kept


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenNumbers:
    """What ranks hear of the routing, one row for each choice of sizes, by their first ranks."""

    values: NDArray[np.int32]
    """[choices, numbers]"""

    roles: NDArray[np.int8]
    """[numbers] Which of ROLES each is."""

    branches: list[str]
    """[choices] By what else a program goes: where parts of an expert-tensor group are moved one by one, the rank's
    place among them, and where they are of equal sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """What the ranks of an exchange send in one pass of one layer."""

    counts: Counts
    """[ep * etp, experts] by rank, that of etp the faster."""

    ep: int
    etp: int

    def digest(self, at: NDArray[np.int64]) -> list[bytes]:
        """Say of some ranks what each sends to the experts, and its own experts get from all."""
        table = self._table()
        got = [sha256(np.ascontiguousarray(table[:, :, ep]).tobytes()).digest() for ep in range(self.ep)]
        return [sha256(self.counts[one].tobytes()).digest() + got[one // self.etp] for one in at.tolist()]

    def numbers(self, at: NDArray[np.int64]) -> tuple[Counts, list[int]]:
        """Return [ranks, numbers] what some ranks hear, and the role of each number."""
        table = self._table()
        parts, experts = table.sum(axis=(0, 3)), table.sum(axis=(0, 1))  # [etp, ep], [ep, own experts]
        ep, etp = at // self.etp, at % self.etp
        columns = [
            self.counts[at].sum(axis=1)[:, None],
            parts[etp, ep][:, None],
            parts.T[ep],
            experts[ep],
            parts.sum(axis=0)[ep][:, None],
        ]
        if table.shape[3] > 1:
            columns.append(table.transpose(2, 1, 0, 3).reshape(self.ep, -1)[ep])
        roles = [role for role, column in enumerate(columns) for _ in range(column.shape[1])]
        return np.concatenate(columns, axis=1), roles

    def branches(self, at: NDArray[np.int64]) -> list[str]:
        """Return by what the moving of parts one by one goes."""
        parts = self._table().sum(axis=(0, 3))
        is_even = (parts == parts[:1]).all(axis=0)
        return ["even" if is_even[one // self.etp] else f"place {one % self.etp}" for one in at.tolist()]

    def _table(self) -> Counts:
        """Return the counts by ep, etp, ep of the experts, and their number there."""
        return self.counts.reshape(self.ep, self.etp, self.ep, -1)


class NumbersOfRanks:
    """Gathers what some ranks hear in an iteration."""

    def __init__(self, ranks: Sequence[int], *, moves_part_by_part: bool) -> None:
        """Say which ranks, ascending, and whether uneven parts are moved one by one."""
        self.ranks = np.array(ranks, np.int64)
        self._moves_part_by_part = moves_part_by_part
        self._said = [sha256() for _ in ranks]
        self._numbers: list[NDArray[np.int32]] = []  # of each pass: [ranks, numbers]
        self._branches: list[list[str]] = [[] for _ in ranks]
        self._roles: list[int] = []
        self._is_new = False

    def begin_pass(self) -> None:
        """Say that what is heard next is of another pass."""
        self._is_new = True

    def hear(self, exchange: Exchange, first: int, places: NDArray[np.int64]) -> None:
        """Add what those at some places among the ranks hear.

        Args:
            exchange: that they are in.
            first: its first rank.
            places: of those in `ranks`.
        """
        at = self.ranks[places] - first
        numbers, roles = exchange.numbers(at)
        if self._is_new:
            self._roles += roles
            self._numbers.append(np.zeros((len(self.ranks), len(roles)), np.int32))
            self._is_new = False
        self._numbers[-1][places] = numbers
        said = exchange.digest(at)
        branches = exchange.branches(at) if self._moves_part_by_part and exchange.etp > 1 else [""] * len(at)
        for place, one, branch in zip(places.tolist(), said, branches, strict=True):
            self._branches[place].append(branch)
            self._said[place].update(one)

    def alike(self) -> list[tuple[int, ...]]:
        """Return which ranks hear the same everywhere, by their first ranks."""
        if not self._roles:
            return [tuple(self.ranks.tolist())]
        found: dict[bytes, list[int]] = {}
        for rank, said in zip(self.ranks.tolist(), self._said, strict=True):
            found.setdefault(said.digest(), []).append(rank)
        return [tuple(one) for one in found.values()]

    def tell(self, chosen: Sequence[int]) -> TokenNumbers | None:
        """Return what some of the ranks hear; None where it is too much to keep."""
        if len(chosen) * len(self._roles) > _MOST_NUMBERS:
            return None
        places = np.searchsorted(self.ranks, np.array(chosen)).tolist()
        values = np.concatenate([numbers[places] for numbers in self._numbers], axis=1)
        branches = [",".join(self._branches[place]) for place in places]
        return TokenNumbers(values=values, roles=np.array(self._roles, np.int8), branches=branches)
