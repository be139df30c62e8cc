"""Merge the traces of all ranks into the one graph.

Theory of operation. Each rank's part of the graph is made from its trace alone (`making`), by any process. What joins
the parts reads their communications: it matches them, sets the clocks, numbers all nodes topologically, and knows then
of each rank what its rows need. These are written rank by rank (`finishing`), again by any process. What lies in memory
at once is a few ranks' parts, and the communications of all. The dataset does not depend on how the work was divided.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from truedag.tracer.errors import CycleError, MergeError
from truedag.tracer.merge.align import Clock, ClockSource, align_clocks
from truedag.tracer.merge.causality import Moments, find_order
from truedag.tracer.merge.dataset import (
    begin_folder,
    describe_run,
    divide,
    file_names,
    find_origin,
    finish_folder,
    small_tables,
)
from truedag.tracer.merge.finishing import FileTask, RankTask, write_files
from truedag.tracer.merge.global_numbers import Node, RankOrder, number_all
from truedag.tracer.merge.joining import (
    ALL_RANKS,
    Joined,
    RankComms,
    join_communications,
    joined_nodes,
    read_comms_of,
)
from truedag.tracer.merge.lifetimes import number_peak
from truedag.tracer.merge.making import Made, Workers, choose_processes, make_parts, total_bytes
from truedag.tracer.merge.match import match_communications
from truedag.tracer.merge.microbatches import find_microbatches
from truedag.tracer.merge.part import P2P, Part, load_part
from truedag.tracer.merge.rank_part import short_name
from truedag.tracer.merge.tables import message_edges, repeated_order
from truedag.tracer.record.trace_folder import find_traces

# Traces of together less than this are merged in memory, by one process: starting others would take longer.
_FEW_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSummary:
    """What a merge found."""

    num_ranks: int
    missing_ranks: tuple[int, ...]
    num_nodes: int
    num_edges: int
    num_collectives: int
    num_messages: int
    num_unmatched: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a merge may use.

    More than one process: the caller's main module must be importable without effect (`if __name__ == "__main__"`).
    """

    processes: int = 1
    memory_bytes: int | None = None  # of all processes together; None: no bound

    @classmethod
    def of_machine(cls) -> Resources:
        """A process for each core that may be used, and any memory."""
        return cls(processes=len(os.sched_getaffinity(0)))


def merge_traces(
    traces_dir: Path,
    out_dir: Path,
    *,
    deployment: str | None = None,
    strategy: str | None = None,
    progress: Callable[[str], None] | None = None,
    resources: Resources | None = None,
) -> MergeSummary:
    """Merge a folder of traces (`rank-*.trace`, compressed as `rank-*.trace.gz` or not) into a dataset.

    What processes left that did not know their rank (`pid-*.trace`) is taken for the ranks that left nothing else.
    Ranks that are missing are named in `meta.json`, and their communications are unmatched there.

    Args:
        traces_dir: where the traces lie.
        out_dir: the dataset's folder; made new, an earlier dataset in it is replaced.
        deployment: what `meta.json` is to call the run.
        strategy: the parallel strategy, for `meta.json`.
        progress: hears what is being done.
        resources: what it may use; one process and any memory.

    Raises:
        TraceError: a trace is broken.
        MergeError: there are no traces, they are not of one run, or they need more memory than there may be.
        CycleError: the operations depend on each other in a circle.
    """
    say = progress or (lambda _: None)
    resources = resources or Resources()
    paths = find_traces(traces_dir)
    if not paths:
        raise MergeError(f"{traces_dir} holds no traces (rank-*.trace): name the folder that a run recorded into")
    say(f"reading {len(paths)} traces")
    processes = choose_processes(paths, resources.processes, resources.memory_bytes)
    is_small = total_bytes(paths) <= _FEW_BYTES
    with scratch_folder(out_dir, name="parts") as scratch, Workers(processes) as workers:
        folder = None if is_small or (len(paths) == 1 and resources.memory_bytes is None) else scratch
        made = make_parts(paths, folder, workers)
        return join_parts(
            made,
            out_dir,
            deployment=deployment,
            strategy=strategy,
            progress=say,
            scratch=folder,
            workers=workers if folder is not None else None,
        )


@contextmanager
def scratch_folder(out_dir: Path, *, name: str) -> Iterator[Path]:
    """Make a folder for what is needed on the way, beside the dataset, and take it away in the end.

    Raises:
        MergeError: it cannot be made.
    """
    folder = out_dir.absolute().with_name(f".{out_dir.absolute().name}.{name}")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise MergeError(f"cannot write into {folder}: {error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def join_parts(
    made: Sequence[Made],
    out_dir: Path,
    *,
    deployment: str | None = None,
    strategy: str | None = None,
    progress: Callable[[str], None] | None = None,
    scratch: Path | None = None,
    workers: Workers | None = None,
) -> MergeSummary:
    """Join the parts of all ranks into a dataset.

    Args:
        made: the parts, in the order of `find_traces`.
        out_dir: the dataset's folder.
        deployment: what `meta.json` is to call the run.
        strategy: the parallel strategy, for `meta.json`.
        progress: hears what is being done.
        scratch: a folder for nodes' numbers; None: they stay in memory.
        workers: who writes the dataset; other processes than this one need the parts on disk, and a scratch folder.

    Raises:
        MergeError: they are not of one run.
        CycleError: the operations depend on each other in a circle.
    """
    say = progress or (lambda _: None)
    parts = _choose(made, say)
    ranks = {rank: read_comms_of(_load(part)) for rank, part in parts.items()}
    world_size = _check_one_run(ranks)
    say("joining communications")
    matched = match_communications({rank: one.comms for rank, one in ranks.items()})
    sources = [
        ClockSource(meta=one.told["meta"], clock_samples=one.told["clock_samples"], end_ns=one.told["end_ns"])
        for one in ranks.values()
    ]
    clocks = align_clocks(sources)
    clocks = align_clocks(sources, find_order(matched, {rank: _moments(one) for rank, one in ranks.items()}, clocks))
    joined = join_communications(ranks, matched, clocks)
    say("numbering nodes")
    room = _Room(scratch)
    orders, dropped = _orders(parts, joined, clocks)
    numbers, collectives, cycle = number_all(orders, joined, room.allocate)
    if cycle:
        raise CycleError(_describe_cycle(parts, joined, cycle))
    microbatches: dict[int, dict[int, tuple[int, str | None]]] = {}
    if any(one.told["has_microbatch"] for one in ranks.values()):
        microbatches = find_microbatches(lambda rank: _load(parts[rank]), numbers, joined)
    say("writing the dataset")
    origin_ns = find_origin(ranks, joined, clocks)
    fresh = begin_folder(out_dir)
    tasks = {
        rank: RankTask(
            part=parts[rank],
            number=room.place_of(numbers[rank]),
            places=joined.places[rank],
            clock=clocks[rank],
            origin_ns=origin_ns,
            labels=_labels_alone(one, joined.places[rank], joined.axes),
            microbatches=microbatches.get(rank, {}),
            dropped=dropped[rank],
        )
        for rank, one in ranks.items()
    }
    files = _divide_work(fresh, tasks, joined, numbers, collectives, origin_ns)
    counted = (workers or Workers()).run(write_files, files)
    counts = {table: sum(count[table] for count in counted) for table in counted[0]}
    present = set(ranks)
    missing = tuple(rank for rank in range(world_size) if rank not in present)
    meta = describe_run(
        ranks,
        joined,
        matched,
        origin_ns=origin_ns,
        counts=counts,
        memory=[
            {"rank": rank, **number_peak(one.told["memory"], numbers[rank], collectives, joined.places[rank])}
            for rank, one in ranks.items()
            if one.told["memory"] is not None
        ],
        missing_ranks=missing,
        deployment=deployment,
        strategy=strategy,
    )
    finish_folder(
        fresh, out_dir, small_tables(ranks, joined, clocks, {**numbers, ALL_RANKS: collectives}, origin_ns), meta
    )
    return MergeSummary(
        num_ranks=len(ranks),
        missing_ranks=missing,
        num_nodes=counts["nodes"],
        num_edges=counts["edges"],
        num_collectives=len(matched.collectives),
        num_messages=len(matched.messages),
        num_unmatched=len(matched.unmatched),
    )


def _moments(one: RankComms) -> Moments:
    gpu = one.told["gpu_clock"]
    return Moments(
        clock=str(one.told["meta"]["boot_id"]),
        start_ns=one.start_ns,
        has_kernels=gpu is not None,
        kernel_error_ns=0 if gpu is None else gpu[2],
    )


@dataclass(slots=True)
class _Room:
    """Room for columns of numbers: in memory, or in files of a folder."""

    folder: Path | None
    count: int = 0
    places: dict[int, Path] = field(default_factory=dict)

    def allocate(self, size: int) -> NDArray[np.int64]:
        """Return room for so many numbers."""
        if self.folder is None or size == 0:
            return np.empty(size, np.int64)
        path = self.folder / f"numbers-{self.count:06d}.npy"
        self.count += 1
        column = np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=(size,))
        self.places[id(column)] = path
        return column

    def place_of(self, column: NDArray[np.int64]) -> NDArray[np.int64] | Path:
        """Return a column, or the file that it lies in."""
        path = self.places.get(id(column))
        if path is None:
            return column
        cast("np.memmap[Any, Any]", column).flush()
        return path


def _load(part: Part | Path) -> Part:
    return load_part(part) if isinstance(part, Path) else part


def _choose(made: Sequence[Made], say: Callable[[str], None]) -> dict[int, Part | Path]:
    """Each rank's part, by rank; a rank that was killed before it recorded anything is missing."""
    parts: dict[int, Part | Path] = {}
    paths: dict[int, Path] = {}
    for one in made:
        if one.said:
            say(one.said)
        if one.part is None:
            continue
        # Of a process that nobody called by its rank: it may be a rank that left nothing else, or what started them.
        if one.path.name.startswith("pid-") and parts and (one.rank in parts or not one.is_placed):
            say(f"{one.path} is left out: there are traces of ranks, and it is of none that is missing")
            continue
        if one.rank in parts:
            raise MergeError(f"{paths[one.rank]} and {one.path} both say they are rank {one.rank}: keep one")
        parts[one.rank], paths[one.rank] = one.part, one.path
    if not parts:
        raise MergeError(f"there is nothing to merge: {made[0].said}")
    return {rank: parts[rank] for rank in sorted(parts)}


def _check_one_run(ranks: Mapping[int, RankComms]) -> int:
    sizes = {int(one.told["meta"]["world_size"]) for one in ranks.values()}
    if len(sizes) > 1:
        raise MergeError(
            f"the traces are of different runs: world sizes {sorted(sizes)}; merge each run in a folder of its own"
        )
    return sizes.pop()


def _orders(
    parts: Mapping[int, Part | Path], joined: Joined, clocks: Mapping[int, Clock]
) -> tuple[dict[int, RankOrder], dict[int, NDArray[np.int64]]]:
    """What numbering needs of each rank, and which edges of order its part has that another's has as well."""
    orders: dict[int, RankOrder] = {}
    dropped: dict[int, NDArray[np.int64]] = {}
    seen: set[tuple[int, int]] = set()
    for rank, place in parts.items():
        part = _load(place)
        collective = joined_nodes(joined, rank, part.num_nodes)
        dropped[rank] = repeated_order(part, collective, seen)
        src, dst = _edges_of(place)
        touching = np.flatnonzero((collective[src] >= 0) | (collective[dst] >= 0))
        orders[rank] = RankOrder(
            time_ns=clocks[rank].correct(part.nodes["sort_ns"]),
            collective=collective,
            edges=lambda place=place: _edges_of(place),  # type: ignore[misc]
            touching=(src[touching], dst[touching]),
        )
    return orders, dropped


def _edges_of(place: Part | Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    edges = _load(place).edges
    return edges["src"], edges["dst"]


def _labels_alone(
    one: RankComms, places: Mapping[int, int], axes: Mapping[tuple[str, tuple[int, ...]], str]
) -> dict[int, str]:
    """The labels of communications that are nodes of their own: what they are, and the axis of their group."""
    return {
        record.node: f"{short_name(record.op)} {axis}"
        for record in one.comms
        if record.node not in places and (axis := axes.get((record.group_name, record.group)))
    }


def _divide_work(
    folder: Path,
    tasks: Mapping[int, RankTask],
    joined: Joined,
    numbers: Mapping[int, NDArray[np.int64]],
    collectives: NDArray[np.int64],
    origin_ns: int,
) -> list[FileTask]:
    """Say which ranks' rows go into which files. A message's edge is in the file of the rank that receives it."""
    sharing = divide({rank: len(number) for rank, number in numbers.items()})
    is_small = len(sharing) == 1
    files = []
    for ranks in sharing:
        received = [one for one in joined.messages if one.destination in set(ranks)]
        files.append(
            FileTask(
                ranks=[tasks[rank] for rank in ranks],
                collectives=joined.collectives if is_small else (),
                numbers=collectives,
                messages=message_edges(received, numbers, P2P) if received else None,
                origin_ns=origin_ns,
                names=file_names(folder, ranks, is_small=is_small),
                is_small=is_small,
            )
        )
    if not is_small and joined.collectives:
        files.append(
            FileTask(
                ranks=(),
                collectives=joined.collectives,
                numbers=collectives,
                messages=None,
                origin_ns=origin_ns,
                names=file_names(folder, None, is_small=False),
                is_small=False,
            )
        )
    return files


def _describe_cycle(parts: Mapping[int, Part | Path], joined: Joined, cycle: list[Node]) -> str:
    def describe(node: Node) -> str:
        rank, place = node
        if rank == ALL_RANKS:
            one = joined.collectives[place]
            return f"{one.op} on all its ranks [{one.label}]"
        part = _load(parts[rank])
        op, label = (part.told["texts"][int(part.nodes[name][place])] for name in ("op", "label"))
        return f"{op} on rank {rank} [{label}]"

    steps = "\n  -> ".join(describe(node) for node in [*cycle, cycle[0]])
    return (
        "the operations depend on each other in a circle, which is a deadlock in the program or a bug in truedag:\n  "
        + steps
    )
