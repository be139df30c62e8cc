"""What operators do to memory, in tiny programs that are recorded: who reads whose values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from truedag.tracer import annotate
from truedag.tracer.merge.rank_graph import RankGraph, build_rank_graph
from truedag.tracer.record.recording import record
from truedag.tracer.record.trace import read_trace

Record = Callable[[Callable[[], object]], RankGraph]


@pytest.fixture
def recorded(tmp_path: Path) -> Record:
    def run(program: Callable[[], object]) -> RankGraph:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.trace"
        with record(path, synchronize=False) as recording:
            program()
        assert recording.switched_off == ""
        return build_rank_graph(read_trace(path))

    return run


@pytest.fixture
def library() -> torch.library.Library:
    with torch.library._scoped_library("truedag_test", "DEF") as made:
        yield made


def edges(graph: RankGraph) -> dict[tuple[str, str], list[int]]:
    """Bytes along each edge, by the names of its ends; a source goes by its role, an output by its name."""
    names = [op.rpartition("::")[2] for op in graph.nodes.op] + [output.name for output in graph.outputs]
    found: dict[tuple[str, str], list[int]] = {}
    flow = graph.flow
    for src, dst, count in zip(flow.src.tolist(), flow.dst.tolist(), flow.num_bytes.tolist(), strict=True):
        source = names[src] if src >= 0 else flow.sources[-1 - src].role
        found.setdefault((source, names[dst]), []).append(count)
    return found


def test_an_operator_on_memory_without_a_name_is_no_view(recorded: Record) -> None:
    def program() -> None:
        sparse = torch.eye(3).to_sparse()
        (sparse + sparse).to_dense()

    graph = recorded(program)
    assert "aten::add" in graph.nodes.op


def test_an_operator_that_returns_the_argument_it_filled_is_a_node(
    recorded: Record, library: torch.library.Library
) -> None:
    library.define("fill_into(Tensor x, Tensor buffer) -> Tensor")
    library.impl("fill_into", lambda x, buffer: buffer.copy_(x)[:2], "CPU")

    def program() -> None:
        buffer = torch.empty(4)
        torch.ops.truedag_test.fill_into(torch.ones(4), buffer).sum()

    graph = recorded(program)
    assert edges(graph) == {
        ("ones", "fill_into"): [16],
        ("empty", "fill_into"): [0],
        ("fill_into", "sum"): [8],
    }


def test_batch_norm_writes_its_running_statistics_in_training_only(recorded: Record) -> None:
    norm = torch.nn.BatchNorm1d(4, track_running_stats=True)
    mean = norm.running_mean
    assert mean is not None
    x = torch.ones(3, 4)
    for training in (True, False):
        norm.train(training)
        graph = recorded(lambda: (norm(x), mean.sum()))
        assert (("native_batch_norm", "sum") in edges(graph)) == training
        assert (("input", "sum") in edges(graph)) == (not training)


def test_a_result_that_is_resized_to_fit_is_written(recorded: Record) -> None:
    def program() -> None:
        a, out = torch.ones(8), torch.empty(0)
        torch.add(a, a, out=out)
        out.sum()

    graph = recorded(program)
    assert edges(graph)["add", "sum"] == [32]
    layouts = graph.nodes.trace.layouts
    assert [layouts[i].sizes for i in graph.nodes.outputs[graph.nodes.op.index("aten::add")]] == [(8,)]


@pytest.mark.parametrize("how", ["resize", "storage", "share"])
def test_memory_that_moves_keeps_what_was_written(recorded: Record, how: str) -> None:
    def program() -> None:
        a = torch.ones(4)
        if how == "resize":
            a.resize_(1 << 16)
        elif how == "storage":
            a.untyped_storage().resize_(1 << 16)
        else:
            a.share_memory_()
        a[:4].sum()

    assert edges(recorded(program))["ones", "sum"] == [16]


def test_memory_that_comes_from_outside_again_is_new(recorded: Record) -> None:
    def program() -> None:
        for _ in range(3):
            x = torch.from_numpy(np.ones(4))
            x.mul_(2)
            del x

    found = edges(recorded(program))
    assert found == {("input", "mul_"): [32, 32, 32]}


def test_a_keyword_that_another_operator_writes_is_read_too(recorded: Record, library: torch.library.Library) -> None:
    library.define("accumulate(Tensor x, *, Tensor(a!) total) -> ()")

    def accumulate(x: torch.Tensor, *, total: torch.Tensor) -> None:
        total.add_(x)

    library.impl("accumulate", accumulate, "CPU")

    def program() -> None:
        total = torch.zeros(4)
        for _ in range(2):
            torch.ops.truedag_test.accumulate(torch.ones(4), total=total)

    assert edges(recorded(program))["accumulate", "accumulate"] == [16]


def test_an_operator_that_failed_wrote_nothing(recorded: Record) -> None:
    def program() -> None:
        a = torch.ones(3)
        with pytest.raises(RuntimeError):
            a.add_(torch.zeros(4))
        a.sum()

    found = edges(recorded(program))
    assert found["ones", "sum"] == [12]
    assert found["ones", "add_"] == [12]
    assert ("add_", "sum") not in found


def test_operators_that_only_find_out_shapes_are_dropped(recorded: Record) -> None:
    def program() -> None:
        torch.ones(4, device="meta").mul(2)
        torch.ones(4).mul(3)

    graph = recorded(program)
    assert graph.nodes.op == ["aten::ones", "aten::mul"]
    assert graph.nodes.num_shape_ops == 2


def test_what_torch_tensor_filled_comes_from_outside(recorded: Record) -> None:
    graph = recorded(lambda: torch.tensor([1.0, 2.0]).mul_(2).sum())
    assert edges(graph) == {("input", "mul_"): [8], ("mul_", "sum"): [8]}
    assert "input" in {source.role for source in graph.flow.sources}


def test_a_parameter_comes_out_where_it_lies_at_the_end(recorded: Record) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    annotate.tensor(weight, "weight", role="parameter")

    def program() -> None:
        weight.data = weight.detach() * 2
        torch.zeros(4)

    assert edges(recorded(program)) == {("parameter", "mul"): [16], ("mul", "weight"): [16]}


def test_a_root_reads_what_it_broadcasts_and_a_group_made_again_is_another(recorded: Record) -> None:
    def program() -> None:
        for _ in range(2):
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            t = torch.ones(4)
            dist.broadcast(t, 0)
            dist.reduce(t, 0)
            dist.destroy_process_group()

    graph = recorded(program)
    before = graph.nodes.comms[0].incarnation  # groups that other tests made in this process
    assert [(one.sent_bytes, one.received_bytes, one.incarnation - before) for one in graph.nodes.comms] == [
        (16, 0, 0),
        (16, 16, 0),
        (16, 0, 1),
        (16, 16, 1),
    ]
    assert edges(graph) == {("ones", "broadcast_"): [16, 16], ("ones", "reduce_"): [16, 16]}


def test_one_half_of_the_columns_of_a_large_matrix_is_not_the_other(recorded: Record) -> None:
    def program() -> None:
        matrix = torch.zeros(1024, 4096)
        matrix[:, ::2].add_(1)
        matrix[:, 1::2].sum()

    assert edges(recorded(program)) == {("zeros", "add_"): [8 << 20], ("zeros", "sum"): [8 << 20]}
