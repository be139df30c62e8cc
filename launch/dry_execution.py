"""The ranks that a dry run executes, each in a process of its own; whether they stand for those that it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from truedag.launch.children import Outcome, call_in_children
from truedag.launch.deployment import Deployment
from truedag.launch.dry_choices import Choices
from truedag.launch.errors import LaunchError, RunError
from truedag.launch.run_folder import RunFolder
from truedag.model.errors import ModelError
from truedag.parallel.errors import DataError, RoutingError
from truedag.parallel.rank_classes import GroupRole, RankClass
from truedag.parallel.routing import Routing
from truedag.parallel.token_numbers import TokenNumbers
from truedag.tracer.dry.comparison import compare_ranks
from truedag.tracer.dry.derived_sizes import Derivation
from truedag.tracer.dry.programs import read_part, refine_classes
from truedag.tracer.dry.sizes import Names, Sizes

PRELOAD = "truedag.launch.dry_rank"  # with torch and megatron-core


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRank:
    """What came of a rank."""

    rank: int
    num_events: int
    switched_off: str
    """Why the recorder switched itself off; '': it did not."""
    seconds: float
    peak_bytes: int
    """Most memory that the process had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """What a rank's process hands back."""

    rank: DryRank
    alike: list[tuple[int, ...]]
    """Of the ranks that it was to stand for: which of them the routing sends as many tokens."""
    program: str
    """What its program is known by; '': it was not asked for."""
    numbers: TokenNumbers | None
    """What the first of each of them hear of the routing; None: it is the same, or too much to keep."""
    groups: list[tuple[str, str, tuple[int, ...]]]
    """Name, description and ranks of the world's process groups."""


class Runs:
    """Ranks are executed, each in a process of its own: what one leaves behind in torch must not reach the next."""

    def __init__(
        self, deployment: Deployment, folder: RunFolder, routing: Routing | None, jobs: int, show: Callable[[str], None]
    ) -> None:
        """Say what is executed, and how many ranks at a time."""
        self._deployment, self._folder, self._routing, self._jobs, self._show = deployment, folder, routing, jobs, show
        self.ranks: list[DryRank] = []
        self.groups: list[tuple[str, str, tuple[int, ...]]] = []
        """Name, description and ranks of the world's process groups, which all ranks have made."""
        self.derived: dict[int, tuple[Derivation, int]] = {}
        """By rank that was not executed, but the first of its sizes: what says them, and its place there."""
        self._programs: dict[int, str] = {}
        self._numbers: dict[int, TokenNumbers] = {}

    def execute_classes(self, classes: Sequence[RankClass]) -> list[RankClass]:
        """Execute a rank of each class, and for other choices of sizes that the routing gives its ranks some of them.

        Returns:
            The classes; divided where sizes make programs differ, as where an expert gets no token.

        Raises:
            RunError: a rank has not the sizes or the program that were derived for it, or failed.
        """
        alike = self.execute([one.ranks for one in classes])
        found = [replace(one, alike=tuple(some)) for one, some in zip(classes, alike, strict=True)]
        if all(len(one.alike) == 1 for one in found):
            return found
        first_of = {rank: ranks[0] for one in found for ranks in one.alike for rank in ranks}
        self._execute_choices(found)
        found = self._divide(found)
        executed = {one.rank for one in self.ranks}
        wanted = []
        for one in found:
            for first in (ranks[0] for ranks in one.alike):
                known = self.derived.get(first_of[first])
                if first not in executed and (known is None or first == one.representative):
                    wanted.append(first)
                elif known is not None:
                    self.derived[first] = known
        programs = {rank: self._programs[first_of[rank]] for rank in wanted if first_of[rank] in self.derived}
        self.execute([(rank,) for rank in wanted], is_told_apart=True)
        for rank, program in programs.items():
            self._check_derived(rank, first_of[rank], program)
        executed |= set(wanted)
        firsts = {ranks[0] for one in found for ranks in one.alike}
        self.derived = {rank: known for rank, known in self.derived.items() if rank in firsts - executed}
        return found

    def _execute_choices(self, classes: Sequence[RankClass]) -> None:
        """Execute as many of the choices of sizes that ranks of classes have as it takes to know all."""
        unsettled = []
        for one in classes:
            firsts, told = [ranks[0] for ranks in one.alike], self._numbers.get(one.representative)
            if told is None:
                done = {executed.rank for executed in self.ranks}
                self.execute([(rank,) for rank in firsts if rank not in done], is_told_apart=True)
                continue
            by_branch: dict[str, list[int]] = {}
            for row, branch in enumerate(told.branches):
                by_branch.setdefault(branch, []).append(row)
            unsettled += [Choices([firsts[row] for row in rows], told, rows) for rows in by_branch.values()]
        while unsettled:
            wanted = [rank for choices in unsettled for rank in choices.choose(self._programs, self._folder.trace)]
            for choices in unsettled:
                if choices.is_settled and choices.derivation is not None:
                    self.derived |= {rank: (choices.derivation, at) for rank, at in choices.derived.items()}
                    self._programs |= dict.fromkeys(choices.derived, choices.program)
                if choices.is_settled and choices.problem:
                    self._show(f"ranks that are routed otherwise are all executed: {choices.problem}")
            unsettled = [choices for choices in unsettled if not choices.is_settled]
            self.execute([(rank,) for rank in wanted], is_told_apart=True)

    def _check_derived(self, rank: int, derived: int, program: str) -> None:
        """See that a rank, executed to stand for its class, is what was derived for the first rank of its sizes."""
        first, trace = self.derived[derived][0].rank, self._folder.trace
        if self._programs[rank] != program or not _has_sizes(self, derived, trace(first), trace(rank)):
            raise RunError(
                f"rank {rank} is said to run as rank {first} does, with sizes that follow from its numbers of tokens, "
                "and does not: a bug in truedag, report it; --all-ranks trusts no class"
            )

    def derive(self, rank: int, base: Sizes, names: Names) -> Sizes | None:
        """Return the sizes of a rank that was not executed; None: it was."""
        if rank not in self.derived:
            return None
        derivation, at = self.derived[rank]
        return derivation.sizes(at, base, names)

    def _divide(self, classes: Sequence[RankClass]) -> list[RankClass]:
        """Divide classes by the programs of their ranks, until the groups of each one's are of one make."""
        of_rank = np.zeros(self._deployment.world_size, np.int64)
        keys: dict[tuple[int, str], int] = {}
        for number, one in enumerate(classes):
            for ranks in one.alike:
                of_rank[list(ranks)] = keys.setdefault((number, self._programs[ranks[0]]), len(keys))
        finer = refine_classes(of_rank, self.groups)
        found = []
        for one in classes:
            numbers = np.unique(finer[list(one.ranks)]).tolist()
            for place, number in enumerate(numbers):
                ranks = tuple(rank for rank in one.ranks if finer[rank] == number)
                own = set(ranks)
                some = [tuple(rank for rank in alike if rank in own) for alike in one.alike]
                key = one.key if len(numbers) == 1 else (*one.key, ("tokens", place))
                found.append(RankClass(key=key, ranks=ranks, alike=tuple(sorted(alike for alike in some if alike))))
        return sorted(found, key=lambda one: one.representative)

    def execute(self, chosen: Sequence[Sequence[int]], *, is_told_apart: bool = False) -> list[list[tuple[int, ...]]]:
        """Execute the first of some ranks for all of them, several times; return which of them have equal sizes."""
        if not chosen:
            return []
        world, number = self._deployment.world_size, len(chosen)
        self._show(f"executing {number} of {world} ranks")
        calls = [
            (self._deployment, ranks, self._folder.trace(ranks[0]), self._routing, is_told_apart) for ranks in chosen
        ]
        alike: dict[int, list[tuple[int, ...]]] = {}
        children = call_in_children(_run_rank, calls, jobs=self._jobs, preload=PRELOAD)
        with closing(children):
            for outcome in children:
                one = _take(outcome, chosen[outcome.number][0])
                self.ranks.append(one.rank)
                self.groups = self.groups or one.groups
                self._programs[one.rank.rank] = one.program
                if one.numbers is not None:
                    self._numbers[one.rank.rank] = one.numbers
                alike[outcome.number] = one.alike
                if number > 1:
                    self._show(f"executing {number} of {world} ranks: {len(alike)} done")
        return [alike[place] for place in range(number)]


def _run_rank(
    deployment: Deployment, ranks: Sequence[int], trace: Path, routing: Routing | None, is_told_apart: bool
) -> Executed:
    from truedag.launch.dry_rank import run_rank

    return run_rank(deployment, ranks, trace, routing, is_told_apart=is_told_apart)


def _take(outcome: Outcome[Executed], rank: int) -> Executed:
    if isinstance(outcome.error, (RoutingError, DataError, ModelError)):
        raise LaunchError(f"rank {rank}: {outcome.error}") from outcome.error
    if outcome.error is not None:
        raise outcome.error
    assert outcome.result is not None
    if why := outcome.result.rank.switched_off:
        raise RunError(f"rank {rank} was not recorded to its end: {why}")
    return outcome.result


def verify_ranks(
    deployment: Deployment, classes: Sequence[RankClass], verified: Sequence[int], folder: RunFolder, runs: Runs
) -> None:
    """See that ranks which were executed for nothing else have the program and the groups that their class says.

    Raises:
        RunError: says which rank differs, and where.
    """
    sized_as = {rank: ranks[0] for one in classes for ranks in one.alike for rank in ranks}
    for rank in verified:
        same = sized_as[rank]
        derived = runs.derived.get(same)
        first = same if derived is None else derived[0].rank
        found = compare_ranks(folder.trace(first), folder.trace(rank))
        for axis, own, other in found.groups:
            role = GroupRole.of(deployment.strategy, own, expert=_is_expert(axis))
            if role is None or role.members(deployment.strategy, rank) != tuple(sorted(other)):
                raise RunError(
                    f"rank {rank} is said to run as rank {first} does, but its {axis} group is {other} where rank "
                    f"{first} has {own}: a bug in truedag, report it"
                )
        if found.difference:
            raise RunError(
                f"rank {rank} is said to run as rank {first} does, but differs: {found.difference}: "
                "a bug in truedag, report it; --all-ranks trusts no class"
            )
        if found.num_sizes if derived is None else not _has_sizes(runs, same, folder.trace(first), folder.trace(rank)):
            what = f"as rank {first} does" if derived is None else "with sizes that follow from its numbers of tokens"
            raise RunError(
                f"rank {rank} is said to run {what}, but operators of it have other sizes: a bug in truedag, report "
                "it; --all-ranks trusts no class"
            )


def _has_sizes(runs: Runs, derived: int, base: Path, trace: Path) -> bool:
    """Whether a trace has the sizes that were derived for a rank."""
    names = Names()
    said = runs.derive(derived, Sizes.of(read_part(base), names), names)
    return said is not None and said.same_as(Sizes.of(read_part(trace), names))


def _is_expert(axis: str | None) -> bool | None:
    """Whether a group's axes are the expert layers'; None where they are both, or unsaid."""
    axes = set((axis or "").split("+")) - {"pp", "world", ""}
    return None if not axes else bool(axes & {"etp", "ep", "edp"})
