"""The flow of `truedag dry`: one rank of each class, or every rank, is executed without memory and recorded."""

from __future__ import annotations

import json
import os
import random
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from truedag.launch.children import start_server
from truedag.launch.deployment import Deployment
from truedag.launch.deployment_file import load_deployment
from truedag.launch.device_file import load_device
from truedag.launch.dry_execution import PRELOAD, DryRank, Runs, verify_ranks
from truedag.launch.dry_world import describe_world
from truedag.launch.errors import LaunchError
from truedag.launch.nodes import TorchrunOptions, place_ranks
from truedag.launch.pictures import Pictures, draw_pictures
from truedag.launch.run import build_recorder, describe_run
from truedag.launch.run_audit import audit_run, is_audited_unasked
from truedag.launch.run_folder import ENDED, RunFolder
from truedag.parallel.errors import RoutingError
from truedag.parallel.rank_classes import RankClass, find_rank_classes
from truedag.parallel.routing import parse_routing
from truedag.parallel.training import TrainingConfig
from truedag.tracer.analysis.device_fit import Fit, find_fits
from truedag.tracer.analysis.held_memory import HeldMemory, read_memory
from truedag.tracer.analysis.quantities import write_runs
from truedag.tracer.estimate.estimate import Estimate, estimate
from truedag.tracer.graph import Graph

# What a dry run cannot know, and how it goes on; written beside the graph.
ASSUMED = (
    "a single number that the program reads from a tensor is 0: no gradient is clipped, no float16 step is skipped",
    "generated tokens are 0, and none of them ends a prompt",
    "operators are those that run on the CPU, communications those of the deployment's backend",
)

_PAGE_RANKS = 4096  # the page lists the ranks of each of its boxes, which of more takes gigabytes


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
    fits: tuple[Fit, ...]
    """Whether that is no more than the device has, the largest peak first; none without a device."""
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
    num_derived: int
    """Ranks whose sizes were derived from their numbers of tokens."""
    reached: Mapping[str, float]
    """What was there after how many seconds: graph (of classes, or of all ranks where all were executed), expanded,
    audited, drawn, page."""
    graph_peak_bytes: int
    """Most memory that one process had until the graph was there."""
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
    start_server(PRELOAD)
    build_recorder(show)
    nodes = place_ranks(TorchrunOptions(), deployment.world_size)
    folder.claim(describe_run(source, deployment, overrides, command, nodes), nodes.node, replace=replace)
    classes = find_rank_classes(deployment.strategy, deployment.workload)
    verified: list[int] = []
    estimated: Estimate | None = None
    reached: dict[str, float] = {}
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
        derived = [rank for one in classes for ranks in one.alike if ranks[0] in done.derived for rank in ranks]
        told = {"routing": said, "assumed": ASSUMED, "num_executed_ranks": len(done.ranks), **_tell_derived(derived)}
        (folder.root / "classes.json").write_text(_describe_classes(deployment, classes, told))
        if verified:
            show(f"verifying {len(verified)} ranks")
            verify_ranks(deployment, classes, verified, folder, done)
        if all_ranks:
            merged = _merge(deployment, folder, told, show)
        else:
            merged = _build_classes(deployment, classes, done, folder, told, show)
        reached["graph"] = time.monotonic() - started
        own_peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if hardware is not None:
            show("estimating times")
            estimated = estimate(
                folder.dag, hardware, gpus_per_node=gpus_per_node, num_tokens=_count_tokens(deployment)
            )
        if expand:
            _expand(folder, show)
            reached["expanded"] = time.monotonic() - started
        graph = Graph.open(folder.dag)
        is_light = is_audited_unasked(graph)
        audited = _audit(deployment, folder, show) if is_light else None
        reached |= {"audited": time.monotonic() - started} if is_light else {}
        pictures = draw_pictures(folder.dag, folder.views, show=show) if views else Pictures(drawn=[])
        reached |= {"drawn": time.monotonic() - started} if pictures.drawn else {}
        is_light = is_light and deployment.world_size <= _PAGE_RANKS
        page = _write_page(folder, show) if views and is_light else None
        reached |= {"page": time.monotonic() - started} if page else {}
    finally:
        folder.node(nodes.node).write_text(ENDED)
    memory = _read_memory(folder)
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
        memory=memory,
        fits=find_fits(memory, graph.meta),
        is_expanded=all_ranks or expand,
        pictures=pictures.drawn,
        not_drawn=pictures.why_not,
        page=page,
        estimate=estimated,
        num_derived=len(derived),
        reached=reached,
        graph_peak_bytes=max(own_peak_bytes, *(one.peak_bytes for one in done.ranks)),
        seconds=time.monotonic() - started,
    )


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
    done: Runs,
    folder: RunFolder,
    told: Mapping[str, Any],
    show: Callable[[str], None],
) -> Mapping[str, Any]:
    from truedag.tracer.dry.class_graph import build_class_graph

    show("building the class graph")
    return build_class_graph(
        {rank: folder.trace(rank) for one in classes for rank, *_ in one.alike if rank not in done.derived},
        describe_world(deployment, classes, done.groups),
        folder.dag,
        deployment=deployment.name,
        strategy=deployment.strategy.describe(),
        told=told,
        derived=done.derive,
    )


def _tell_derived(ranks: Sequence[int]) -> dict[str, Any]:
    """Say which ranks' sizes nobody saw; nothing where all are those of executed ranks."""
    if not ranks:
        return {}
    how = "linear forms of their numbers of tokens, which hold exactly on all executed ranks of the same program"
    return {"derived_sizes": {"num_ranks": len(ranks), "ranks": write_runs(sorted(ranks)), "how": how}}


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


def _write_page(folder: RunFolder, show: Callable[[str], None]) -> Path:
    from truedag.launch.page import make_page

    return make_page(folder.root, folder.views, progress=show).html


def _audit(deployment: Deployment, folder: RunFolder, show: Callable[[str], None]) -> Mapping[str, Any]:
    show("auditing")
    return audit_run(folder.dag, folder.root, deployment)
