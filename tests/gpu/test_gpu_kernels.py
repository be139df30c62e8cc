"""What one GPU runs is recorded: kernels, copies, streams, waits, CUDA graphs, compiled regions. Needs a GPU.

The first line of each test says what works where it passes: `scripts/gpu_check.py` prints it.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from gpu_programs import (
    compiled_training,
    graph_replays,
    reused_memory,
    training,
    transformer,
    two_streams,
)
from kineto_reference import launching_operators, profiled

from truedag.tracer.graph import Graph
from truedag.tracer.merge.kernels import read_kernels
from truedag.tracer.merge.launches import RankKernels, tie_kernels
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.merge.nodes import RankNodes, extract_nodes
from truedag.tracer.record.kernels_file import kernels_path
from truedag.tracer.record.recording import record
from truedag.tracer.record.trace import read_trace

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # other versions of PyTorch and of the driver say other things
]

Note = Callable[[str, object], None]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with torch._dynamo.config.patch(disable=False):  # other tests of this process switch the compiler off
        yield
    torch._dynamo.reset()


def recorded(folder: Path, program: Callable[[], object]) -> tuple[object, RankNodes, RankKernels]:
    """Record a program; return what it returned, its operators and its kernels."""
    path = folder / "rank-00000.trace"
    with record(path, synchronize=False) as recording:
        result = program()
    assert not recording.switched_off
    return result, *tied(path)


def tied(path: Path) -> tuple[RankNodes, RankKernels]:
    trace = read_trace(path)
    nodes = extract_nodes(trace)
    device = read_kernels(kernels_path(path), trace.meta)
    assert device is not None, "nothing was recorded of the GPU"
    return nodes, tie_kernels(device, nodes)


def merged(folder: Path) -> Graph:
    merge_traces(folder, folder / "dag")
    return Graph.open(folder / "dag")


def rows(frame: pl.LazyFrame, **wanted: object) -> list[dict[str, Any]]:
    return frame.filter(*(pl.col(name) == value for name, value in wanted.items())).collect().to_dicts()


def order_edges(graph: Graph) -> set[tuple[int, int]]:
    return {(row["src"], row["dst"]) for row in rows(graph.edges, kind="order")}


def names(kernels: RankKernels) -> list[str]:
    return [kernels.trace.names[name] for name in kernels.trace.kernels["name"].tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_training_step(dtype: torch.dtype, tmp_path: Path, record_property: Note) -> None:
    """Every kernel and copy of a training step (autocast, attention, fused and foreach AdamW) has its operator."""
    _, nodes, kernels = recorded(tmp_path, training(transformer("cuda"), dtype=dtype))
    alone = Counter(name for name, node in zip(names(kernels), kernels.node.tolist(), strict=True) if node < 0)
    assert not alone
    assert len(kernels.node) > 100
    operators = {nodes.op[node] for node in kernels.node.tolist()}
    assert {"aten::addmm", "aten::native_layer_norm", "aten::_fused_adamw_", "aten::_local_scalar_dense"} <= operators
    record_property("kernels and copies", len(kernels.node))


def test_profiler_agrees(tmp_path: Path, record_property: Note) -> None:
    """PyTorch's own profiler sees the same kernels in the same order and ties each to the same operator."""
    program = training(transformer("cuda"))
    (tmp_path / "ours").mkdir()
    _, _, ours = recorded(tmp_path / "ours", program)
    path = tmp_path / "rank-00000.trace"
    with record(path, synchronize=False, kernels=False):
        profiled(kernels_path(path), program)
    around = launching_operators(kernels_path(path))
    nodes, theirs = tied(path)
    assert names(ours) == names(theirs)
    wrong = []
    table = theirs.trace.kernels
    for name, row, node in zip(names(theirs), table, theirs.node.tolist(), strict=True):
        operators = around[int(row["correlation"]), name, int(row["bytes"])]
        if (nodes.op[node] not in operators) if node >= 0 else operators:
            wrong.append((name, nodes.op[node] if node >= 0 else None, operators))
    assert not wrong
    record_property("kernels compared", len(table))


def test_clock(tmp_path: Path, record_property: Note) -> None:
    """On the host's clock every kernel begins after its launch has begun and ends before the host stops waiting."""
    x = torch.randn(1 << 16, device="cuda")

    def many() -> None:
        for _ in range(500):
            for _ in range(4):
                x.mul_(1.0)
            torch.cuda.synchronize()

    _, _, kernels = recorded(tmp_path, many)
    table, calls, syncs = kernels.trace.kernels, kernels.trace.calls, kernels.trace.syncs
    launched = kernels.call >= 0
    assert launched.all()
    latency = table["start_ns"] - calls["start_ns"][kernels.call]
    assert latency.min() >= 0
    wait, waited = kernels.waits
    assert len(np.unique(wait)) >= 500
    assert kernels.clock.error_ns is not None
    assert (table["end_ns"][waited] - syncs["end_ns"][wait]).max() <= kernels.clock.error_ns
    clock = kernels.clock
    record_property("clock corrected by", f"{clock.correction_ns} ns, drift {clock.drift_ns} ns")
    record_property("clock error", f"{clock.error_ns} ns")
    record_property("launch to start", f"{np.median(latency) / 1e3:.1f} µs in the median")


def test_streams_and_copies(tmp_path: Path) -> None:
    """An event's wait orders two streams, a wait of the host its next operator; copies have their bytes."""
    recorded(tmp_path, two_streams())
    graph = merged(tmp_path)
    (product,) = rows(graph.nodes, op="aten::mm")
    (relu,) = rows(graph.nodes, op="aten::relu")
    (negative,) = rows(graph.nodes, op="aten::neg")
    copies = rows(graph.kernels, kind="memcpy")
    assert len({product["stream"], relu["stream"]}) == 2
    found = order_edges(graph)
    assert (product["node"], relu["node"]) in found
    back = next(row["node"] for row in copies if row["stream"] == relu["stream"])
    assert (back, negative["node"]) in found
    assert [row["bytes"] for row in copies] == [512 * 512 * 4] * 2
    data = {(row["src"], row["dst"]) for row in rows(graph.edges, kind="data")}
    assert (product["node"], relu["node"]) not in data


def test_reused_memory(tmp_path: Path) -> None:
    """Memory that the allocator gives out again is another tensor: nothing flows from what lay there before."""
    reused, _, _ = recorded(tmp_path, reused_memory())
    assert reused, "the allocator gave out other memory: nothing was tested"
    graph = merged(tmp_path)
    (before,) = rows(graph.nodes, op="aten::add")
    (again,) = rows(graph.nodes, op="aten::mul")
    (reader,) = rows(graph.nodes, op="aten::sigmoid")
    data = {(row["src"], row["dst"]) for row in rows(graph.edges, kind="data")}
    assert (again["node"], reader["node"]) in data
    assert not {(before["node"], again["node"]), (before["node"], reader["node"])} & data


def test_cuda_graph(tmp_path: Path) -> None:
    """A replay of a CUDA graph is one node with all its kernels, said to be opaque, in its stream's order."""
    recorded(tmp_path, graph_replays())
    graph = merged(tmp_path)
    replays = rows(graph.nodes, op="cuda::graph")
    assert len(replays) == 2
    kernels = graph.kernels.collect()
    of_replays = [len(kernels.filter(pl.col("node") == one["node"])) for one in replays]
    assert of_replays[0] == of_replays[1] >= 2
    assert [(one["what"], one["nodes"]) for one in graph.meta["opaque"]] == [("CUDA graph", 2)]
    (before,) = rows(graph.nodes, op="aten::add_")
    (after,) = rows(graph.nodes, op="aten::sum")
    found = order_edges(graph)
    assert (before["node"], replays[0]["node"]) in found
    assert (replays[1]["node"], after["node"]) in found


@pytest.mark.usefixtures("compiler")
def test_compiled(tmp_path: Path) -> None:
    """A region that torch.compile has compiled is one node a call, and its kernels (Triton's too) are that node's."""
    _, nodes, kernels = recorded(tmp_path, compiled_training())
    of_regions = [nodes.op[node] for node in kernels.node.tolist() if node >= 0]
    assert of_regions.count("inductor::compiled_graph") > 2
    assert not [name for name, node in zip(names(kernels), kernels.node.tolist(), strict=True) if node < 0]


def test_results_are_the_same(tmp_path: Path) -> None:
    """A training step computes the same to the last bit with and without a recorder."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        bare = training(transformer("cuda"))()
        result, _, _ = recorded(tmp_path, training(transformer("cuda")))
    finally:
        torch.use_deterministic_algorithms(False)
    assert result == bare


def test_many_recordings(tmp_path: Path) -> None:
    """Recording starts and stops many times in a process, and each file has the kernels of its own."""
    x = torch.randn(64, 64, device="cuda")
    counts = []
    for i in range(5):
        folder = tmp_path / str(i)
        folder.mkdir()
        _, _, kernels = recorded(folder, lambda count=i + 1: [x.add(1) for _ in range(count)])
        counts.append(len(kernels.node))
    assert counts == [1, 2, 3, 4, 5]


def test_own_profiler(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A program's own profiler has precedence: it sees what it would see, and the recorder says what it lacks."""
    x = torch.randn(64, 64, device="cuda")
    torch.cuda.synchronize()
    path = tmp_path / "rank-00000.trace"
    with record(path, synchronize=False):
        x.add(1)
        profiled(tmp_path / "own.json.gz", lambda: x.mul(2))
    assert "the program begins a profiler of its own" in capfd.readouterr().err
    _, kernels = tied(path)
    assert len(kernels.node) == 1
    own = json.loads(gzip.decompress((tmp_path / "own.json.gz").read_bytes()))
    assert [event["cat"] for event in own["traceEvents"] if event.get("cat") == "kernel"] == ["kernel"]
