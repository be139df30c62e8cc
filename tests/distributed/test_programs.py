"""Programs as their users wrote them: recording leaves their results alone, misses nothing, and both recorders agree.

What cannot be held against the Python recorder is said in `_COMPARED`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest
from program_ranks import PROGRAMS, Run, run_programs
from recorder_comparison import assert_same_graph

from truedag.tracer.graph import Graph
from truedag.tracer.merge import dataset, finishing
from truedag.tracer.merge.making import Workers, make_parts
from truedag.tracer.merge.merging import MergeSummary, join_parts, merge_traces
from truedag.tracer.merge.rank_graph import RankGraph, build_rank_graph
from truedag.tracer.record.recording import RecorderName
from truedag.tracer.record.trace import read_trace
from truedag.tracer.record.trace_folder import find_traces

_RECORDERS: tuple[RecorderName, RecorderName] = ("native", "python")


def assert_same_but_for_objects(native: RankGraph, python: RankGraph) -> None:
    """The same graph but for the bytes of pickled objects, which lie in buffers of Python's.

    No operator allocated those: where one lies exactly where a freed tensor lay, it is taken for that tensor.
    """
    assert_same_graph(without_bytes(native), without_bytes(python))


def without_bytes(graph: RankGraph) -> RankGraph:
    flow, layouts = graph.flow, graph.nodes.trace.layouts
    kept = np.array([layout == 0 or layouts[layout].dtype != "uint8" for layout in flow.layout.tolist()], bool)
    columns = {name: getattr(flow, name)[kept] for name in ("src", "dst", "num_bytes", "layout", "is_update")}
    return replace(graph, flow=replace(flow, **columns))


def assert_python_saw_nothing(native: RankGraph, python: RankGraph) -> None:
    """A dispatch mode is of one thread: what the program's other threads do, the native recorder alone sees."""
    assert len(native.nodes.comms) == 30
    assert python.nodes.comms == []


_COMPARED: dict[str, Callable[[RankGraph, RankGraph], None]] = {
    "async_collectives": assert_same_graph,
    "data_parallel": assert_same_graph,
    "fully_sharded": assert_same_graph,
    "functional_collectives": assert_same_graph,
    "groups": assert_same_graph,
    "loader_workers": assert_same_graph,
    "messages": assert_same_graph,
    "objects": assert_same_but_for_objects,
    "optimizers": assert_same_graph,
    "pipeline": assert_same_but_for_objects,  # stages tell each other their shapes
    "sharded_optimizer": assert_same_graph,
    "single_process": assert_same_graph,
    "tensor_parallel": assert_same_graph,
    "threads": assert_python_saw_nothing,
}
# On two ranks: collectives and messages.
_COMMUNICATIONS = {
    "async_collectives": (16, 0),
    "data_parallel": (28, 0),
    "fully_sharded": (18, 0),
    "functional_collectives": (14, 0),
    "groups": (30, 4),
    "loader_workers": (9, 0),
    "messages": (2, 26),
    "objects": (9, 2),
    "optimizers": (0, 0),
    "pipeline": (0, 44),
    "sharded_optimizer": (22, 0),
    "single_process": (0, 0),
    "tensor_parallel": (20, 0),
    "threads": (15, 15),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the runs of one program printed on each rank, and where their recordings are."""

    unrecorded: list[str]
    recorded: dict[RecorderName, list[str]]
    folder: Path

    def merge(self, recorder: RecorderName) -> MergeSummary:
        run = self.folder / recorder
        return merge_traces(run / "traces", run / "dag")

    def rank_graph(self, recorder: RecorderName, rank: int) -> RankGraph:
        return build_rank_graph(read_trace(self.folder / recorder / "traces" / f"rank-{rank:05d}.trace"))


def run_three_ways(world_size: int, folder: Path, *, timeout_s: float) -> dict[str, Outcome]:
    """Run all programs on the same ranks, each without and with either recorder."""
    runs = [
        run
        for program in _COMPARED
        for run in (
            Run(program=program),
            *(
                Run(program=program, folder=folder / program / recorder / "traces", recorder=recorder)
                for recorder in _RECORDERS
            ),
        )
    ]
    printed = iter(run_programs(world_size, runs, timeout_s=timeout_s))
    return {
        program: Outcome(
            unrecorded=next(printed),
            recorded={recorder: next(printed) for recorder in _RECORDERS},
            folder=folder / program,
        )
        for program in _COMPARED
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return run_three_ways(2, tmp_path_factory.mktemp("programs"), timeout_s=200)


def test_every_program_is_run() -> None:
    elsewhere = {"digest", "own_ranks"}  # no program; started by itself
    assert {path.stem for path in PROGRAMS.glob("*.py")} - elsewhere == set(_COMPARED) == set(_COMMUNICATIONS)


@pytest.mark.parametrize("program", _COMPARED)
def test_results_are_bitwise_the_same_with_and_without_recording(program: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[program]
    assert all(printed.startswith("digest ") for printed in outcome.unrecorded)
    assert outcome.recorded == dict.fromkeys(_RECORDERS, outcome.unrecorded)


@pytest.mark.parametrize("program", _COMPARED)
def test_every_communication_is_joined(program: str, outcomes: dict[str, Outcome]) -> None:
    for recorder in _RECORDERS:
        if recorder == "python" and _COMPARED[program] is assert_python_saw_nothing:
            continue
        summary = outcomes[program].merge(recorder)
        assert summary.num_unmatched == 0
        assert (summary.num_collectives, summary.num_messages) == _COMMUNICATIONS[program]


@pytest.mark.parametrize("program", _COMPARED)
def test_both_recorders_find_the_same_graph_of_a_program(program: str, outcomes: dict[str, Outcome]) -> None:
    for rank in range(2):
        native, python = (outcomes[program].rank_graph(recorder, rank) for recorder in _RECORDERS)
        assert len(native.nodes.op) > 10
        _COMPARED[program](native, python)


@pytest.mark.parametrize("program", _COMPARED)
def test_all_at_once_is_one_by_one(program: str, outcomes: dict[str, Outcome]) -> None:
    for path in find_traces(outcomes[program].folder / "native" / "traces"):
        trace = read_trace(path)
        fast, exact = build_rank_graph(trace), build_rank_graph(trace, exact=True)
        assert fast.flow.sources == exact.flow.sources
        for name in ("src", "dst", "num_bytes", "layout", "is_update"):
            assert np.array_equal(getattr(fast.flow, name), getattr(exact.flow, name)), name
        for name in ("node", "kind", "storage", "layout", "offset"):
            assert np.array_equal(getattr(fast.nodes.accesses, name), getattr(exact.nodes.accesses, name)), name
        assert (fast.nodes.inputs, fast.nodes.outputs) == (exact.nodes.inputs, exact.nodes.outputs)


@pytest.mark.slow
def test_programs_on_four_ranks(tmp_path: Path) -> None:
    for program, outcome in run_three_ways(4, tmp_path, timeout_s=280).items():
        assert outcome.recorded == dict.fromkeys(_RECORDERS, outcome.unrecorded), program
        assert outcome.merge("native").num_unmatched == 0, program
        for rank in range(4):
            if program != "threads" or rank < 2:
                _COMPARED[program](*(outcome.rank_graph(recorder, rank) for recorder in _RECORDERS))


def test_data_flows_through_the_collectives_of_a_sharded_model(outcomes: dict[str, Outcome]) -> None:
    outcomes["fully_sharded"].merge("native")
    graph = Graph.open(outcomes["fully_sharded"].folder / "native")
    nodes = graph.nodes.collect()
    collectives = nodes.filter(nodes["kind"] == "collective")["node"].to_list()
    edges = graph.edges.collect().filter(graph.edges.collect()["bytes"] > 0)
    into, out_of = Counter(edges["dst"].to_list()), Counter(edges["src"].to_list())
    assert all(into[node] >= 2 and out_of[node] >= 2 for node in collectives)  # both ranks' data, to both ranks


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two datasets have the same files, byte for byte."""
    files = [{path.relative_to(dag): path.read_bytes() for path in dag.rglob("*.*")} for dag in (one, other)]
    return len(files[0]) > 5 and files[0] == files[1]


def test_the_dataset_does_not_depend_on_who_made_which_part(outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    traces = outcomes["groups"].folder / "native" / "traces"
    merge_traces(traces, tmp_path / "whole")
    with Workers(2) as workers:
        made = make_parts(find_traces(traces), tmp_path / "parts", workers)
        join_parts(made, tmp_path / "processes", scratch=tmp_path / "parts", workers=workers)
    assert same_bytes(tmp_path / "whole", tmp_path / "processes")
    # Each rank has its own folder of traces, and its own part: nothing but the parts comes to rank 0.
    for path in find_traces(traces):
        own = tmp_path / "host" / path.stem.removeprefix("rank-").lstrip("0").zfill(1) / "traces"
        own.mkdir(parents=True)
        shutil.copy(path, own)
    for name, folder in (("shared", str(traces)), ("apart", f"{tmp_path}/host/$RANK/traces")):
        here = f"exec {sys.executable} -m truedag.tracer.merge {folder} --out {tmp_path}/at-$RANK/{name}"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", "bash", "-c"]
        subprocess.run([sys.executable, *torchrun, here], check=True, timeout=120, capture_output=True)
        assert same_bytes(tmp_path / "whole", tmp_path / "at-0" / name)
        assert not (tmp_path / "at-1" / name).exists()


def test_a_large_graph_is_divided_into_files_that_are_one_table_to_every_reader(
    outcomes: dict[str, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = outcomes["messages"].folder / "native" / "traces"
    merge_traces(traces, tmp_path / "one")
    monkeypatch.setattr(dataset, "_NODES_OF_A_SMALL_GRAPH", 10)
    for module in (dataset, finishing):
        monkeypatch.setattr(module, "NODES_IN_A_FILE", 40)
    monkeypatch.setattr(finishing, "EDGES_IN_A_FILE", 100)
    merge_traces(traces, tmp_path / "many")
    for table, order in (("nodes", ["node"]), ("edges", ["src", "dst", "kind", "bytes"])):
        files = sorted((tmp_path / "many" / table).glob("*.parquet"))
        assert len(files) > 3
        many = pl.read_parquet(files).sort(order, maintain_order=True)
        assert many.equals(pl.read_parquet(tmp_path / "one" / f"{table}.parquet"))
        for place, readable in ((tmp_path / "many" / table, "/*.parquet"), (tmp_path / "one" / f"{table}.parquet", "")):
            frame = pd.read_parquet(place).sort_values(order, kind="stable")
            key = order[0]
            assert frame[key].tolist() == many[key].to_list()
            counted = duckdb.sql(f"select count(*), sum({key}) from '{place}{readable}'").fetchall()
            assert counted == [(len(many), many[key].sum())]
    assert (
        Graph.open(tmp_path / "many").nodes.collect().sort("node").equals(Graph.open(tmp_path / "one").nodes.collect())
    )


def test_a_program_that_starts_its_own_ranks(tmp_path: Path) -> None:
    attached = ["-m", "truedag.tracer.attach", "--out", str(tmp_path / "out")]
    printed = [
        subprocess.run(
            [sys.executable, "-W", "ignore", *options, str(PROGRAMS / "own_ranks.py")],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for options in ([], attached)
    ]
    assert printed[0].startswith("digest ")
    assert printed[0] == printed[1]
    (folder,) = {path.parent for path in tmp_path.rglob("rank-*.trace")}
    summary = merge_traces(folder, tmp_path / "merged" / "dag")
    assert (summary.num_ranks, summary.num_collectives, summary.num_unmatched) == (2, 3, 0)
