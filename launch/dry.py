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
from typing import Any

import numpy as np

from truedag.launch.children import Outcome, call_in_children
from truedag.launch.deployment import Deployment
from truedag.launch.deployment_file import load_deployment
from truedag.launch.device_file import load_device
from truedag.launch.errors import LaunchError, RunError
from truedag.launch.nodes import TorchrunOptions, place_ranks
from truedag.launch.pictures import Pictures, draw_pictures
from truedag.launch.run import build_recorder, describe_run
from truedag.launch.run_folder import ENDED, RunFolder
from truedag.model.errors import ModelError
from truedag.parallel.errors import DataError, RoutingError
from truedag.parallel.rank_classes import GroupRole, RankClass, find_rank_classes, places_on
from truedag.parallel.routing import Routing, parse_routing
from truedag.parallel.strategy import AXES
from truedag.parallel.training import TrainingConfig
from truedag.tracer.dry.world import World
from truedag.tracer.estimate.estimate import Estimate, estimate

# What a dry run cannot know, and how it goes on; written beside the graph.
ASSUMED = (
    "a single number that the program reads from a tensor is 0: no gradient is clipped, no float16 step is skipped",
    "generated tokens are 0, and none of them ends a prompt",
    "operators are those that run on the CPU, communications those of the deployment's backend",
)

# A graph of more nodes takes minutes and gigabytes to audit.
_AUDITED_NODES = 1_000_000


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
    groups: list[tuple[str, str, tuple[int, ...]]]
    """Name, description and ranks of the world's process groups."""


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
    audit: Mapping[str, Any] | None
    """Of the graph: verdict, num_faults and the file that says more; None: it is too large to be audited unasked."""
    is_expanded: bool
    """Whether all its nodes and edges are written out."""
    pictures: list[Path]
    """The first sheet of each drawing, the simplest first."""
    not_drawn: str
    """Why there are none; '': there are, or nobody asked for them."""
    page: Path | None
    """The interactive page; None: nobody asked for it, or the graph is too large for one that nobody asked for."""
    estimate: Estimate | None
    """What it would take on a device; None: nobody asked."""
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
    expand: bool,
    device: str | None,
    gpus_per_node: int,
    num_verified: int,
    jobs: int | None,
    views: bool,
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
        expand: write all nodes and edges of all ranks, not the class graph.
        device: what times are estimated for, by name or file; None: none are.
        gpus_per_node: where communications cross nodes, for the estimates.
        num_verified: random other ranks that are executed as well, and must have their class's program.
        jobs: ranks that are executed at a time; None: as many as there are cores.
        views: draw the graph, and write its page.
        command: the command line.
        show: is told what goes on.

    Raises:
        DeploymentError: the deployment or an override is wrong.
        FolderError: the output folder is in the way.
        LaunchError: the routing is none, or not that of the deployment; or the device is none.
        RunError: a rank failed, or a rank has not the program of its class.
    """
    started = time.monotonic()
    source, deployment = load_deployment(name_or_path, overrides)
    try:
        chosen = None if deployment.model.num_experts is None else parse_routing(routing, seed=seed)
    except RoutingError as error:
        raise LaunchError(str(error)) from error
    hardware = None if device is None else load_device(device).device()
    folder = RunFolder(root=(out if out is not None else Path("truedag-out") / f"{deployment.name}-dry").absolute())
    folder.check_free(replace=replace)
    build_recorder(show)
    nodes = place_ranks(TorchrunOptions(), deployment.world_size)
    folder.claim(describe_run(source, deployment, overrides, command, nodes), nodes.node, replace=replace)
    classes = find_rank_classes(deployment.strategy, deployment.workload)
    verified: list[int] = []
    estimated: Estimate | None = None
    try:
        done = Runs(deployment, folder, chosen, jobs or os.cpu_count() or 1, show)
        if all_ranks:
            done.execute([(rank,) for rank in range(deployment.world_size)])
        else:
            classes = done.execute_classes(classes)
            others = sorted(set(range(deployment.world_size)) - {one.rank for one in done.ranks})
            draw = random.Random(seed)  # noqa: S311 - which ranks are looked at is no secret
            verified = sorted(draw.sample(others, min(num_verified, len(others))))
            done.execute([(rank,) for rank in verified])
        said = None if chosen is None else chosen.describe()
        told = {"routing": said, "assumed": ASSUMED, "num_executed_ranks": len(done.ranks)}
        (folder.root / "classes.json").write_text(_describe_classes(deployment, classes, told))
        if verified:
            show(f"verifying {len(verified)} ranks")
            _verify(deployment, classes, verified, folder)
        if all_ranks:
            merged = _merge(deployment, folder, told, show)
        else:
            merged = _build_classes(deployment, classes, done.groups, folder, told, show)
            if hardware is not None:
                show("estimating times")
                estimated = estimate(
                    folder.dag, hardware, gpus_per_node=gpus_per_node, num_tokens=_count_tokens(deployment)
                )
        if expand:
            _expand(folder, show)
        is_small = merged["num_nodes"] <= _AUDITED_NODES
        audited = _audit(deployment, folder, show) if is_small else None
        pictures = draw_pictures(folder.dag, folder.views, show=show) if views else Pictures(drawn=[])
        # A class graph's page is made of its classes; with times, or of all ranks, each rank counts.
        is_light = is_small or not (all_ranks or expand or hardware is not None)
        page = _write_page(folder, show) if views and is_light else None
    finally:
        folder.node(nodes.node).write_text(ENDED)
    return DryResult(
        deployment=deployment.name,
        strategy=deployment.strategy.describe(),
        world_size=deployment.world_size,
        out=folder.root,
        routing=said,
        classes=classes,
        ranks=sorted(done.ranks, key=lambda one: one.rank),
        verified=verified,
        dag=folder.dag,
        merge=merged,
        audit=audited,
        is_expanded=all_ranks or expand,
        pictures=pictures.drawn,
        not_drawn=pictures.why_not,
        page=page,
        estimate=estimated,
        seconds=time.monotonic() - started,
    )


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

    def execute_classes(self, classes: Sequence[RankClass]) -> list[RankClass]:
        """Execute a rank of each class; return the classes, divided where the routing makes sizes differ."""
        found: list[RankClass] = []
        for one, alike in zip(classes, self.execute([one.ranks for one in classes]), strict=True):
            keys = [one.key] if len(alike) == 1 else [(*one.key, ("tokens", number)) for number in range(len(alike))]
            found.extend(RankClass(key=key, ranks=ranks) for key, ranks in zip(keys, alike, strict=True))
        known = {one.rank for one in self.ranks}
        self.execute([(one.representative,) for one in found if one.representative not in known])
        return sorted(found, key=lambda one: one.representative)

    def execute(self, chosen: Sequence[Sequence[int]]) -> list[list[tuple[int, ...]]]:
        """Execute the first of some ranks for all of them, several times; return which of them have equal sizes."""
        if not chosen:
            return []
        world, number = self._deployment.world_size, len(chosen)
        self._show(f"executing {number} of {world} ranks")
        calls = [(self._deployment, ranks, self._folder.trace(ranks[0]), self._routing) for ranks in chosen]
        alike: dict[int, list[tuple[int, ...]]] = {}
        children = call_in_children(_run_rank, calls, jobs=self._jobs, preload="truedag.launch.dry_rank")
        with closing(children):
            for outcome in children:
                one = _take(outcome, chosen[outcome.number][0])
                self.ranks.append(one.rank)
                self.groups = self.groups or one.groups
                alike[outcome.number] = one.alike
                if number > 1:
                    self._show(f"executing {number} of {world} ranks: {len(alike)} done")
        return [alike[place] for place in range(number)]


def _run_rank(deployment: Deployment, ranks: Sequence[int], trace: Path, routing: Routing | None) -> Executed:
    from truedag.launch.dry_rank import run_rank

    return run_rank(deployment, ranks, trace, routing)


def _take(outcome: Outcome[Executed], rank: int) -> Executed:
    if isinstance(outcome.error, (RoutingError, DataError, ModelError)):
        raise LaunchError(f"rank {rank}: {outcome.error}") from outcome.error
    if outcome.error is not None:
        raise outcome.error
    assert outcome.result is not None
    if why := outcome.result.rank.switched_off:
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
        if found.num_sizes:
            raise RunError(
                f"rank {rank} is said to run as rank {first} does, but {found.num_sizes} of its operators have other "
                "sizes: a bug in truedag, report it; --all-ranks trusts no class"
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
    groups: Sequence[tuple[str, str, tuple[int, ...]]],
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


def _count_tokens(deployment: Deployment) -> int:
    """Return how many tokens a step trains on, or a generation makes."""
    workload = deployment.workload
    if isinstance(workload, TrainingConfig):
        return workload.global_batch_size * workload.sequence_length
    return workload.num_prompts * (workload.decode_steps + 1)


def _expand(folder: RunFolder, show: Callable[[str], None]) -> None:
    """Replace the class graph by the whole one."""
    from truedag.tracer.dry.expand import expand
    from truedag.tracer.graph.class_dataset import ClassDataset

    classes = folder.dag.rename(folder.dag.with_name("classes"))
    meta = json.loads((classes / "meta.json").read_text(encoding="utf-8"))
    expand(ClassDataset(classes, meta), folder.dag, progress=show)


def describe_world(
    deployment: Deployment, classes: Sequence[RankClass], groups: Sequence[tuple[str, str, tuple[int, ...]]]
) -> World:
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
        groups=groups,
    )


def _write_page(folder: RunFolder, show: Callable[[str], None]) -> Path:
    from truedag.launch.page import make_page

    return make_page(folder.root, folder.views, progress=show).html


def _audit(deployment: Deployment, folder: RunFolder, show: Callable[[str], None]) -> Mapping[str, Any]:
    from truedag.launch.run_audit import audit_run

    show("auditing")
    return audit_run(folder.dag, folder.root, deployment)
