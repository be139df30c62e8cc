"""The flow of `truedag dry`: one rank of each class, or every rank, is executed without memory and recorded."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from truedag.launch.children import Outcome, call_in_children
from truedag.launch.deployment import Deployment
from truedag.launch.deployment_file import load_deployment
from truedag.launch.errors import LaunchError, RunError
from truedag.launch.nodes import TorchrunOptions, place_ranks
from truedag.launch.run import build_recorder, describe_run
from truedag.launch.run_folder import ENDED, RunFolder
from truedag.model.errors import ModelError
from truedag.parallel.errors import DataError, RoutingError
from truedag.parallel.rank_classes import GroupRole, RankClass, find_rank_classes, places_on
from truedag.parallel.routing import Routing, parse_routing
from truedag.parallel.strategy import AXES
from truedag.tracer.dry.world import World

if TYPE_CHECKING:
    from truedag.parallel.made_groups import MadeGroup

# What a dry run cannot know, and how it goes on; written beside the graph.
ASSUMED = (
    "a single number that the program reads from a tensor is 0: no gradient is clipped, no float16 step is skipped",
    "generated tokens are 0, and none of them ends a prompt",
    "operators are those that run on the CPU, communications those of the deployment's backend",
)
# Nodes that are audited without being asked: more take minutes.
_MOST_AUDITED = 500_000


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
class DryResult:
    """What came out of a dry run."""

    deployment: str
    strategy: str
    world_size: int
    out: Path
    routing: Mapping[str, Any] | None
    """Where tokens went; None: the model has no experts."""
    classes: list[RankClass]
    ranks: list[DryRank]
    """Those that were executed."""
    verified: list[int]
    """Ranks that were executed beside those of the classes, and had their programs."""
    dag: Path
    """The graph of all ranks; of classes unless every rank was executed."""
    merge: Mapping[str, Any]
    """What the graph counts."""
    audit: Mapping[str, Any]
    """Of the graph: verdict, num_faults and the file that says more; empty where it is so large that this waits."""
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """Most memory that one rank's process had."""
        return max(rank.peak_bytes for rank in self.ranks)


def run_dry(
    name_or_path: str,
    overrides: Sequence[str],
    *,
    out: Path | None,
    replace: bool,
    routing: str,
    seed: int,
    all_ranks: bool,
    num_verified: int,
    jobs: int | None,
    command: Sequence[str],
    show: Callable[[str], None],
) -> DryResult:
    """Execute a deployment's ranks without memory and leave the folder behind. All is checked before anything starts.

    Args:
        name_or_path: the deployment.
        overrides: of its values.
        out: the folder; None: a default one.
        replace: whether an old one may be replaced.
        routing: where tokens go, as `parse_routing` reads it.
        seed: of routings that are drawn.
        all_ranks: execute every rank, and merge their graph; else one of each class.
        num_verified: random other ranks that are executed as well, and must have their class's program.
        jobs: ranks that are executed at a time; None: as many as there are cores.
        command: the command line.
        show: is told what goes on.

    Raises:
        DeploymentError: the deployment or an override is wrong.
        FolderError: the output folder is in the way.
        LaunchError: the routing is none, or not that of the deployment.
        RunError: a rank failed, or a rank has not the program of its class.
    """
    started = time.monotonic()
    source, deployment = load_deployment(name_or_path, overrides)
    try:
        chosen = None if deployment.model.num_experts is None else parse_routing(routing, seed=seed)
    except RoutingError as error:
        raise LaunchError(str(error)) from error
    folder = RunFolder(root=(out if out is not None else Path("truedag-out") / f"{deployment.name}-dry").absolute())
    folder.check_free(replace=replace)
    show("building the recorder")
    build_recorder()
    nodes = place_ranks(TorchrunOptions(), deployment.world_size)
    folder.claim(describe_run(source, deployment, overrides, command, nodes), nodes.node, replace=replace)
    classes = find_rank_classes(deployment.strategy, deployment.workload)
    first = [one.representative for one in classes]
    others = sorted(set(range(deployment.world_size)) - set(first))
    draw = random.Random(seed)  # noqa: S311 - which ranks are looked at is no secret
    verified = sorted(draw.sample(others, min(num_verified, len(others))))
    try:
        executed = list(range(deployment.world_size)) if all_ranks else sorted({*first, *verified})
        ranks, groups = _execute(deployment, executed, folder, chosen, jobs, show)
        said = None if chosen is None else chosen.describe()
        told = {"routing": said, "assumed": ASSUMED, "num_executed_ranks": len(executed)}
        (folder.root / "classes.json").write_text(_describe_classes(deployment, classes, told))
        if verified:
            show(f"verifying {len(verified)} ranks")
            _verify(deployment, classes, verified, folder)
        if all_ranks:
            merged = _merge(deployment, folder, told, show)
        else:
            merged = _build_classes(deployment, classes, groups, folder, told, show)
        audited = _audit(deployment, folder, show) if merged["num_nodes"] <= _MOST_AUDITED else {}
    finally:
        folder.node(nodes.node).write_text(ENDED)
    return DryResult(
        deployment=deployment.name,
        strategy=deployment.strategy.describe(),
        world_size=deployment.world_size,
        out=folder.root,
        routing=said,
        classes=classes,
        ranks=ranks,
        verified=verified,
        dag=folder.dag,
        merge=merged,
        audit=audited,
        seconds=time.monotonic() - started,
    )


def _execute(
    deployment: Deployment,
    ranks: Sequence[int],
    folder: RunFolder,
    routing: Routing | None,
    jobs: int | None,
    show: Callable[[str], None],
) -> tuple[list[DryRank], list[MadeGroup]]:
    """Record ranks, each in a process of its own: what one leaves behind in torch must not reach the next.

    Returns:
        What came of each, and the process groups of the world, which all of them have made.
    """
    show(f"executing {len(ranks)} of {deployment.world_size} ranks")
    calls = [(deployment, rank, folder.trace(rank), routing, rank == ranks[0]) for rank in ranks]
    done: list[DryRank] = []
    groups: list[MadeGroup] = []
    children = call_in_children(_run_rank, calls, jobs=jobs or os.cpu_count() or 1, preload="truedag.launch.dry_rank")
    with closing(children):
        for outcome in children:
            one, made = _take(outcome, ranks[outcome.number])
            done.append(one)
            groups = groups or made
            if len(ranks) > 1:
                show(f"executing {len(ranks)} of {deployment.world_size} ranks: {len(done)} done")
    return sorted(done, key=lambda one: one.rank), groups


def _run_rank(
    deployment: Deployment, rank: int, trace: Path, routing: Routing | None, tells_groups: bool
) -> tuple[DryRank, list[MadeGroup]]:
    from truedag.launch.dry_rank import run_rank

    result, groups = run_rank(deployment, rank, trace, routing)
    return result, groups if tells_groups else []


def _take(outcome: Outcome[tuple[DryRank, list[MadeGroup]]], rank: int) -> tuple[DryRank, list[MadeGroup]]:
    if isinstance(outcome.error, (RoutingError, DataError, ModelError)):
        raise LaunchError(f"rank {rank}: {outcome.error}") from outcome.error
    if outcome.error is not None:
        raise outcome.error
    assert outcome.result is not None
    if why := outcome.result[0].switched_off:
        raise RunError(f"rank {rank} was not recorded to its end: {why}")
    return outcome.result


def _describe_classes(deployment: Deployment, classes: Sequence[RankClass], told: Mapping[str, Any]) -> str:
    described = [
        {"key": dict(one.key), "representative": one.representative, "num_ranks": len(one.ranks), "ranks": one.ranks}
        for one in classes
    ]
    said = {"deployment": deployment.name, "strategy": deployment.strategy.describe(), **told, "classes": described}
    return json.dumps(said, indent=2) + "\n"


def _verify(deployment: Deployment, classes: Sequence[RankClass], verified: Sequence[int], folder: RunFolder) -> None:
    """See that ranks which were executed for nothing else have the program and the groups that their class says.

    Raises:
        RunError: says which rank differs, and where.
    """
    from truedag.tracer.dry.comparison import compare_ranks

    representative = {rank: one.representative for one in classes for rank in one.ranks}
    for rank in verified:
        first = representative[rank]
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


def _is_expert(axis: str | None) -> bool | None:
    """Whether a group's axes are the expert layers'; None where they are both, or unsaid."""
    axes = set((axis or "").split("+")) - {"pp", "world", ""}
    return None if not axes else bool(axes & {"etp", "ep", "edp"})


def _merge(
    deployment: Deployment, folder: RunFolder, told: Mapping[str, Any], show: Callable[[str], None]
) -> Mapping[str, Any]:
    from truedag.tracer.dry.untimed import forget_times
    from truedag.tracer.merge.merging import merge_traces

    show("merging the traces")
    merged = merge_traces(
        folder.traces,
        folder.dag,
        deployment=deployment.name,
        strategy=deployment.strategy.describe(),
        progress=show,
    )
    forget_times(folder.dag, told=told)
    return asdict(merged)


def _build_classes(
    deployment: Deployment,
    classes: Sequence[RankClass],
    groups: Sequence[MadeGroup],
    folder: RunFolder,
    told: Mapping[str, Any],
    show: Callable[[str], None],
) -> Mapping[str, Any]:
    from truedag.tracer.dry.class_graph import build_class_graph

    show("building the class graph")
    return build_class_graph(
        {one.representative: folder.trace(one.representative) for one in classes},
        describe_world(deployment, classes, groups),
        folder.dag,
        deployment=deployment.name,
        strategy=deployment.strategy.describe(),
        told=told,
    )


def describe_world(deployment: Deployment, classes: Sequence[RankClass], groups: Sequence[MadeGroup]) -> World:
    """Return what the tracer is told of ranks that are not executed."""
    strategy = deployment.strategy
    rank_class = np.zeros(strategy.world_size, np.int64)
    for number, one in enumerate(classes):
        rank_class[list(one.ranks)] = number
    axes = [axis for axis in AXES if axis != "cp" or strategy.cp > 1]
    coordinates = {str(axis): places_on(strategy, axis) for axis in axes}
    per_rank = (deployment.model.num_experts or 0) // strategy.ep
    return World(
        rank_class=rank_class,
        coordinates=coordinates,
        first_expert=coordinates["ep"] * per_rank,
        groups=[(one.name, one.description, one.ranks) for one in groups],
    )


def _audit(deployment: Deployment, folder: RunFolder, show: Callable[[str], None]) -> Mapping[str, Any]:
    from truedag.launch.run_audit import audit_run

    show("auditing")
    return audit_run(folder.dag, folder.root, deployment)
