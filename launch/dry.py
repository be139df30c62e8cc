"""The flow of `truedag dry`: one rank of each class, or every rank, is executed without memory and recorded."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from truedag.launch.children import Outcome, call_in_children, start_server
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
from truedag.tracer.analysis.held_memory import HeldMemory, read_memory
from truedag.tracer.dry.world import World
from truedag.tracer.estimate.estimate import Estimate, estimate

# What a dry run cannot know, and how it goes on; written beside the graph.
ASSUMED = (
    "a single number that the program reads from a tensor is 0: no gradient is clipped, no float16 step is skipped",
    "generated tokens are 0, and none of them ends a prompt",
    "operators are those that run on the CPU, communications those of the deployment's backend",
)

_PRELOAD = "truedag.launch.dry_rank"  # with torch and megatron-core

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
    program: str
    """What its program is known by; '': it was not asked for."""
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
    memory: tuple[HeldMemory, ...]
    """What ranks have in memory."""
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
    replace: bool = False,
    routing: str = "balanced",
    seed: int = 0,
    all_ranks: bool = False,
    expand: bool = False,
    device: str | None = None,
    gpus_per_node: int = 8,
    num_verified: int = 0,
    jobs: int | None = None,
    views: bool = True,
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
    start_server(_PRELOAD)
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
        # A class graph's page is made of its classes; with times or own sizes, or of all ranks, each rank counts.
        is_uneven = any(len(one.alike) > 1 for one in classes)
        is_light = is_small or not (all_ranks or expand or is_uneven or hardware is not None)
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
        memory=_read_memory(folder),
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
        self._programs: dict[int, str] = {}

    def execute_classes(self, classes: Sequence[RankClass]) -> list[RankClass]:
        """Execute a rank of each class, and one for each other choice of sizes that the routing gives its ranks.

        Returns:
            The classes; divided where sizes make programs differ, as where an expert gets no token.
        """
        alike = self.execute([one.ranks for one in classes])
        found = [replace(one, alike=tuple(some)) for one, some in zip(classes, alike, strict=True)]
        if all(len(one.alike) == 1 for one in found):
            return found
        others = [ranks for one in found if len(one.alike) > 1 for ranks in one.alike[1:]]
        self.execute(others, is_told_apart=True)
        found = self._divide(found)
        known = {one.rank for one in self.ranks}
        self.execute([ranks for one in found for ranks in one.alike if ranks[0] not in known], is_told_apart=True)
        return found

    def _divide(self, classes: Sequence[RankClass]) -> list[RankClass]:
        """Divide classes by the programs of their ranks, until the groups of each one's are of one make."""
        from truedag.tracer.dry.programs import refine_classes

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
        children = call_in_children(_run_rank, calls, jobs=self._jobs, preload=_PRELOAD)
        with closing(children):
            for outcome in children:
                one = _take(outcome, chosen[outcome.number][0])
                self.ranks.append(one.rank)
                self.groups = self.groups or one.groups
                self._programs[one.rank.rank] = one.program
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


def _describe_classes(deployment: Deployment, classes: Sequence[RankClass], told: Mapping[str, Any]) -> str:
    described = [
        {
            "key": dict(one.key),
            "representative": one.representative,
            "num_ranks": len(one.ranks),
            "num_sizes": len(one.alike),
            "ranks": one.ranks,
        }
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

    sized_as = {rank: ranks[0] for one in classes for ranks in one.alike for rank in ranks}
    for rank in verified:
        first = sized_as[rank]
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
        {ranks[0]: folder.trace(ranks[0]) for one in classes for ranks in one.alike},
        describe_world(deployment, classes, groups),
        folder.dag,
        deployment=deployment.name,
        strategy=deployment.strategy.describe(),
        told=told,
    )


def _read_memory(folder: RunFolder) -> tuple[HeldMemory, ...]:
    meta = json.loads((folder.dag / "meta.json").read_text(encoding="utf-8"))
    ranks = pl.read_parquet(folder.dag / "ranks.parquet", columns=["rank", "rank_class"])
    return tuple(read_memory(meta, ranks))


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
    rank_class, sized_as = np.zeros((2, strategy.world_size), np.int64)
    for number, one in enumerate(classes):
        rank_class[list(one.ranks)] = number
        for ranks in one.alike:
            sized_as[list(ranks)] = ranks[0]
    axes = [axis for axis in AXES if axis != "cp" or strategy.cp > 1]
    coordinates = {str(axis): places_on(strategy, axis) for axis in axes}
    return World(
        rank_class=rank_class,
        coordinates=coordinates,
        first_expert=first_experts(deployment),
        groups=groups,
        sized_as=sized_as,
    )


def first_experts(deployment: Deployment) -> NDArray[np.int64]:
    """Return [world] the lowest number of a layer's experts that a rank holds; 0 where there are none."""
    per_rank = (deployment.model.num_experts or 0) // deployment.strategy.ep
    return places_on(deployment.strategy, "ep") * per_rank


def _write_page(folder: RunFolder, show: Callable[[str], None]) -> Path:
    from truedag.launch.page import make_page

    return make_page(folder.root, folder.views, progress=show).html


def _audit(deployment: Deployment, folder: RunFolder, show: Callable[[str], None]) -> Mapping[str, Any]:
    from truedag.launch.run_audit import audit_run

    show("auditing")
    return audit_run(folder.dag, folder.root, deployment)
