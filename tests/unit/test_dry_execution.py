"""A rank whose sizes were derived, and that is executed after all, has to be what was derived for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from truedag.launch import dry_execution
from truedag.launch.dry_execution import DryRank, Runs
from truedag.launch.errors import RunError
from truedag.parallel.rank_classes import RankClass

ALIKE = [(0,), (1,), (2,), (3,)]


class FewRuns(Runs):
    """Four ranks of own sizes: 0 and 2 are executed, and those of 1 and 3 follow from rank 2, whose program they have.

    Rank 1 is the lowest of that program, and so it is executed at last.
    """

    def __init__(self, program: str) -> None:
        deployment: Any = SimpleNamespace(world_size=4)
        folder: Any = SimpleNamespace(trace=lambda rank: Path(f"trace-{rank}"))
        super().__init__(deployment, folder, None, 1, lambda _: None)
        self._says = {0: "one", 1: program, 2: "other"}

    def execute(self, chosen: Sequence[Sequence[int]], *, is_told_apart: bool = False) -> list[list[tuple[int, ...]]]:
        """Say what its program is of each."""
        del is_told_apart
        for rank, *_ in chosen:
            self.ranks.append(DryRank(rank=rank, num_events=0, switched_off="", seconds=0.0, peak_bytes=0))
            self._programs[rank] = self._says[rank]
        return [ALIKE] * len(chosen)

    def _execute_choices(self, classes: Sequence[RankClass]) -> None:
        del classes
        self.execute([(2,)])
        known: Any = SimpleNamespace(rank=2)
        self.derived = {1: (known, 0), 3: (known, 1)}
        self._programs |= {1: "other", 3: "other"}


@pytest.mark.parametrize(("program", "has_sizes"), [("other", True), ("other", False), ("third", True)])
def test_a_derived_rank_that_is_executed_is_held_against_it(
    program: str, has_sizes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, Path, Path]] = []

    def compare(runs: Runs, derived: int, base: Path, trace: Path) -> bool:
        del runs
        compared.append((derived, base, trace))
        return has_sizes

    monkeypatch.setattr(dry_execution, "_has_sizes", compare)
    runs = FewRuns(program)
    classes = [RankClass(key=(("pp", 0),), ranks=(0, 1, 2, 3), alike=((0, 1, 2, 3),))]
    if program != "other" or not has_sizes:
        with pytest.raises(RunError, match="rank 1 is said to run as rank 2 does"):
            runs.execute_classes(classes)
        return
    found = runs.execute_classes(classes)
    assert [one.ranks for one in found] == [(0,), (1, 2, 3)]
    assert compared == [(1, Path("trace-2"), Path("trace-1"))]
    assert list(runs.derived) == [3]
