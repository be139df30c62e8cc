"""Facts about time that hold whatever the clocks: this happened here before that happened there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One a row: what one did at `before_ns` of its clock came before what another did at `after_ns` of its own.

    `before` and `after` are numbers of ranks, or of clocks. `slack_ns`: by how much the two times may contradict it,
    since they were not read from these clocks but brought onto them (those of GPUs).
    """

    before: NDArray[np.int64]
    before_ns: NDArray[np.int64]
    after: NDArray[np.int64]
    after_ns: NDArray[np.int64]
    slack_ns: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int, int, int, int]] | NDArray[np.int64]) -> Facts:
        """Make them of rows (before, before_ns, after, after_ns, slack_ns)."""
        before, before_ns, after, after_ns, slack_ns = np.array(rows, np.int64).reshape(-1, 5).T.copy()
        return cls(before=before, before_ns=before_ns, after=after, after_ns=after_ns, slack_ns=slack_ns)

    def take(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Facts:
        """Return some of them."""
        return Facts(
            before=self.before[rows],
            before_ns=self.before_ns[rows],
            after=self.after[rows],
            after_ns=self.after_ns[rows],
            slack_ns=self.slack_ns[rows],
        )

    @classmethod
    def join(cls, one: Facts, other: Facts) -> Facts:
        """Put two lists into one."""
        return cls(
            before=np.concatenate([one.before, other.before]),
            before_ns=np.concatenate([one.before_ns, other.before_ns]),
            after=np.concatenate([one.after, other.after]),
            after_ns=np.concatenate([one.after_ns, other.after_ns]),
            slack_ns=np.concatenate([one.slack_ns, other.slack_ns]),
        )
