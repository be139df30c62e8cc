"""Merge the traces of all ranks into the one graph.

Read every trace, build each rank's part, join the communications, set the clocks, number the nodes topologically,
write the dataset. Each step is a module of its own; this one puts them in order and lays the parts side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from truedag.tracer.errors import CycleError, EmptyTraceError, MergeError
from truedag.tracer.merge.align import align_clocks
from truedag.tracer.merge.assembly import assemble, label_by_dataflow
from truedag.tracer.merge.causality import Moments, find_order
from truedag.tracer.merge.columns import Assembly
from truedag.tracer.merge.dataset import write_dataset
from truedag.tracer.merge.kernels import read_kernels
from truedag.tracer.merge.match import match_communications
from truedag.tracer.merge.rank_graph import RankGraph, build_rank_graph
from truedag.tracer.record.kernels_file import kernels_path
from truedag.tracer.record.trace import read_trace
from truedag.tracer.record.trace_folder import find_traces
from truedag.tracer.topology import number_nodes


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


def merge_traces(
    traces_dir: Path,
    out_dir: Path,
    *,
    deployment: str | None = None,
    strategy: str | None = None,
    progress: Callable[[str], None] | None = None,
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

    Raises:
        TraceError: a trace is broken.
        MergeError: there are no traces, or they are not of one run.
        CycleError: the operations depend on each other in a circle.
    """
    say = progress or (lambda _: None)
    paths = find_traces(traces_dir)
    if not paths:
        raise MergeError(f"{traces_dir} holds no traces (rank-*.trace): name the folder that a run recorded into")
    say(f"reading {len(paths)} traces")
    graphs = _rank_graphs(paths, say)
    world_size = _check_one_run(graphs)
    say("joining communications")
    matched = match_communications({graph.rank: graph.nodes.comms for graph in graphs})
    traces = [graph.nodes.trace for graph in graphs]
    clocks = align_clocks(traces)
    clocks = align_clocks(traces, find_order(matched, {graph.rank: Moments.of(graph) for graph in graphs}, clocks))
    assembly = assemble(graphs, matched, clocks)
    say("numbering nodes")
    number, cycle = number_nodes(assembly.time_ns, assembly.src, assembly.dst)
    if cycle:
        raise CycleError(_describe_cycle(assembly, cycle))
    label_by_dataflow(assembly, number)
    present = {graph.rank for graph in graphs}
    missing = tuple(rank for rank in range(world_size) if rank not in present)
    say("writing the dataset")
    write_dataset(
        out_dir,
        assembly,
        number,
        graphs=graphs,
        clocks=clocks,
        matched=matched,
        missing_ranks=missing,
        deployment=deployment,
        strategy=strategy,
    )
    return MergeSummary(
        num_ranks=len(graphs),
        missing_ranks=missing,
        num_nodes=len(number),
        num_edges=len(assembly.src),
        num_collectives=len(matched.collectives),
        num_messages=len(matched.messages),
        num_unmatched=len(matched.unmatched),
    )


def _rank_graphs(paths: Sequence[Path], say: Callable[[str], None]) -> list[RankGraph]:
    """Each rank's part; a rank that was killed before it recorded anything is missing."""
    graphs: dict[int, RankGraph] = {}
    empty = []
    for path in paths:
        try:
            trace = read_trace(path)
        except EmptyTraceError as error:
            say(str(error))
            empty.append(error)
            continue
        if trace.truncated:
            say(f"{path} ends early: {trace.truncated}")
        # Of a process that nobody called by its rank: it may be a rank that left nothing else, or what started them.
        if path.name.startswith("pid-") and graphs and (trace.rank in graphs or not trace.meta.get("placed")):
            say(f"{path} is left out: there are traces of ranks, and it is of none that is missing")
            continue
        other = graphs.get(trace.rank)
        if other is not None:
            raise MergeError(f"{other.nodes.trace.path} and {path} both say they are rank {trace.rank}: keep one")
        graphs[trace.rank] = build_rank_graph(trace, read_kernels(kernels_path(path), trace.meta))
    if not graphs:
        raise MergeError(f"there is nothing to merge: {empty[0]}") from empty[0]
    return [graphs[rank] for rank in sorted(graphs)]


def _check_one_run(graphs: list[RankGraph]) -> int:
    sizes = {int(graph.nodes.trace.meta["world_size"]) for graph in graphs}
    if len(sizes) > 1:
        raise MergeError(
            f"the traces are of different runs: world sizes {sorted(sizes)}; merge each run in a folder of its own"
        )
    return sizes.pop()


def _describe_cycle(assembly: Assembly, cycle: list[int]) -> str:
    def describe(node: int) -> str:
        rank = int(assembly.rank[node])
        return f"{assembly.op[node]} on {'all its ranks' if rank < 0 else f'rank {rank}'} [{assembly.label[node]}]"

    steps = "\n  -> ".join(describe(node) for node in [*cycle, cycle[0]])
    return (
        "the operations depend on each other in a circle, which is a deadlock in the program or a bug in truedag:\n  "
        + steps
    )
