"""Graphs are executed again from their nodes and edges alone, and miss every edge that matters."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from replay_programs import Decoding, Program, Training, name_output, record_with_arguments
from torch import nn
from torch.utils.checkpoint import checkpoint

from truedag.launch.cli import main
from truedag.tracer.errors import RecordError, ReplayError
from truedag.tracer.graph import Graph
from truedag.tracer.record.arguments import CALLS, arguments_path
from truedag.tracer.record.recording import record
from truedag.tracer.replay.execution import Execution
from truedag.tracer.replay.program import Program as ReadProgram
from truedag.tracer.replay.proof import Proof, prove

_KEPT: list[torch.Tensor] = []  # what a program named lives until its graph is proven


@pytest.fixture(autouse=True)
def forget_results() -> Iterator[None]:
    yield
    _KEPT.clear()


def result(tensor: torch.Tensor, name: str = "result") -> None:
    _KEPT.append(name_output(tensor, name))


def prove_program(folder: Path, program: Program, *, num_orders: int = 10, num_removals: int = 30) -> Proof:
    torch.manual_seed(0)
    graph, traces = record_with_arguments(folder, program)
    return prove(graph, traces, num_orders=num_orders, num_removals=num_removals)


def check_whole(proof: Proof) -> None:
    """What holds of every proof: all orders agree, and what is not missed is redundant."""
    assert proof.first_failure == ""
    assert proof.is_proven
    for removal in proof.removals:
        assert removal.is_noticed == (removal.reason is None)
        assert (removal.num_missing_bytes >= removal.num_bytes) if removal.num_bytes else removal.reason == "no bytes"


def test_a_training_step_is_executed_again_from_its_graph(tmp_path: Path) -> None:
    training = Training()
    proof = prove_program(tmp_path, training)
    check_whole(proof)
    assert not proof.unspecified
    assert proof.num_different_orders == 10
    assert proof.results.count("loss") == 2
    assert set(proof.results) - {"loss"} == {name for name, _ in training.model.named_parameters()}
    assert proof.num_order_reversed > 50
    assert proof.num_overwrites_reversed > 20
    assert any(removal.reaches_results for removal in proof.removals)


def test_decoding_with_a_cache_is_executed_again_from_its_graph(tmp_path: Path) -> None:
    proof = prove_program(tmp_path, Decoding())
    check_whole(proof)
    assert not proof.unspecified
    assert proof.num_different_orders == 10
    assert proof.results == ("logits",) * 6 + ("tokens",)
    assert {removal.reaches_results for removal in proof.removals if removal.num_bytes} == {True}


@pytest.mark.slow
@pytest.mark.parametrize("program", [Training, Decoding])
def test_two_hundred_orders_and_three_hundred_edges(program: type[Program], tmp_path: Path) -> None:
    proof = prove_program(tmp_path, program(), num_orders=200, num_removals=300)
    check_whole(proof)
    assert not proof.unspecified
    # What the data does not keep in order was turned round somewhere, and nobody saw a difference.
    assert proof.num_order_implied + proof.num_order_reversed == proof.num_order_edges
    assert proof.num_overwrites_implied + proof.num_overwrites_reversed == proof.num_overwrites
    assert proof.num_empty_implied + proof.num_empty_reversed == proof.num_empty_edges


def strided() -> None:
    buffer = torch.arange(24.0).reshape(4, 6).clone()
    buffer[:, ::2].mul_(2)
    buffer[1::2].add_(buffer[::2])
    column = buffer.t()[1:4].sum(0)
    buffer.t()[:3].copy_(torch.full((3, 4), 3.0))
    buffer.as_strided((2, 2), (7, 1), 2).add_(5)
    result(buffer + column[0])


def memory_given_out_again() -> None:
    values = torch.ones(1000)
    for _ in range(10):
        doubled = values * 2
        raised = doubled + 1
        del doubled
        values = raised * 0.25
        del raised
    result(values)


def swapped_and_resized() -> None:
    first, second = torch.zeros(8), torch.ones(8)
    first.data = second
    first.add_(1)
    third = second * 2
    first.set_(third.untyped_storage(), 2, (3,), (1,))
    first.mul_(5)
    result(third + 0)
    grown = torch.ones(4)
    grown.resize_(8)
    grown[4:].fill_(3)
    joined = torch.empty(0)
    torch.cat([grown, grown], out=joined)
    grown.untyped_storage().resize_(0)
    grown.untyped_storage().resize_(32)
    grown.copy_(torch.ones(8))
    result(joined[:8] + grown)


def indexed() -> None:
    table = torch.zeros(5, 3)
    table.index_put_((torch.tensor([0, 0, 4]),), torch.ones(3, 3), accumulate=True)
    table[torch.tensor([1, 2])] = torch.full((2, 3), 7.0)
    table.scatter_add_(0, torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3))
    table.masked_fill_(table > 6, 0.5)
    result(table.sum(0) + table.gather(0, torch.tensor([[0, 1, 2]])))


def foreach() -> None:
    flat = torch.arange(12.0)
    views = [flat[:4], flat[4:9], flat[9:]]
    others = [torch.ones_like(view) for view in views]
    torch._foreach_mul_(views, 2.0)
    torch._foreach_add_(views, others, alpha=0.5)
    norm = torch.stack(torch._foreach_norm(views)).norm()
    torch._foreach_copy_(others, views)
    torch._foreach_div_(others, [norm, norm, norm])
    torch._foreach_addcdiv_(views, others, [view + 1 for view in views])
    result(flat * 1)


def aliased() -> None:
    square = torch.arange(9.0).reshape(3, 3)
    square.add_(square.t().clone())
    square.add_(square)
    product = square * square
    torch.add(square, product, out=square)
    square[0] += square[1]
    result(square.clone())


def drawn() -> None:
    values = torch.rand(5)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(5, generator=generator) + torch.empty(5).uniform_(generator=generator)
    chosen = torch.multinomial(values, 3).sum() + torch.randperm(5) + torch.bernoulli(values)
    result(nn.functional.dropout(values, 0.5) + noise + chosen)


def complex_numbers() -> None:
    spectrum = torch.fft.rfft(torch.randn(8))
    power = spectrum.conj() * spectrum
    result(torch.fft.irfft(spectrum.conj() @ torch.ones(5, 3, dtype=spectrum.dtype)) + power.real.sum())


def normalised_batches() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2))
    images = torch.randn(2, 2, 6, 6)
    for _ in range(2):
        model(images).sum().backward()
    model.eval()
    result(model(images).sum())


def recomputed() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 4))
    values = torch.randn(2, 4, requires_grad=True)
    checkpoint(model, values, use_reentrant=False).sum().backward()
    assert values.grad is not None
    result(values.grad * 1)


def out_of_python() -> None:
    values = torch.tensor([3.0, 4.0])
    scaled = values / values.norm().item()
    count = int((scaled > 0.7).sum())
    result(scaled[:count] * count)
    result(torch.unique(torch.tensor([3, 1, 3])), "unique")


@pytest.mark.parametrize(
    "program",
    [
        strided, memory_given_out_again, swapped_and_resized, indexed, foreach, aliased, drawn, complex_numbers,
        normalised_batches, recomputed, out_of_python,
    ],
)  # fmt: skip
def test_programs_that_use_memory_in_every_way(program: Program, tmp_path: Path) -> None:
    proof = prove_program(tmp_path, program, num_orders=5, num_removals=1000)
    check_whole(proof)
    assert not proof.unspecified
    assert sum(removal.is_noticed for removal in proof.removals) >= 4


def test_memory_that_changes_behind_the_dispatcher_is_found_out(tmp_path: Path) -> None:
    def program() -> None:
        memory = np.arange(6, dtype=np.float32)
        tensor = torch.from_numpy(memory)
        before = tensor * 2
        memory[:] = 7
        result(before + tensor * 3)

    proof = prove_program(tmp_path, program)
    assert not proof.is_proven
    assert "aten::mul.Tensor" in proof.first_failure


def altered(graph: Graph, folder: Path, edges: pl.DataFrame) -> Graph:
    """The graph with other edges."""
    shutil.copytree(graph.path, folder)
    edges.write_parquet(folder / "edges.parquet")
    return Graph.open(folder)


def is_proven(graph: Graph, traces: Path) -> bool:
    try:
        return prove(graph, traces, num_orders=1, num_removals=0).is_proven
    except ReplayError:
        return False


def test_a_graph_with_a_wrong_edge_is_not_proven(tmp_path: Path) -> None:
    graph, traces = record_with_arguments(tmp_path / "run", foreach)
    edges = graph.edges.collect().with_row_index("row")
    real = edges.filter((pl.col("kind") == "data") & (pl.col("bytes") > 0) & (pl.col("src") > 0))
    assert is_proven(graph, traces)
    refused = 0
    for row in real["row"].to_list():
        is_row = pl.col("row") == row
        wrong = {
            "without": edges.filter(~is_row),
            "moved": edges.with_columns(src=pl.when(is_row).then(pl.col("src") - 1).otherwise("src")),
            "fewer": edges.with_columns(bytes=pl.when(is_row).then(pl.col("bytes") - 4).otherwise("bytes")),
        }
        for name, table in wrong.items():
            other = altered(graph, tmp_path / f"{name}-{row}", table.drop("row"))
            refused += not is_proven(other, traces)
    assert refused == 3 * len(real)


def test_an_edge_from_an_older_value_of_the_same_memory_gives_other_results(tmp_path: Path) -> None:
    def program() -> None:
        values = torch.ones(4)
        values.mul_(2)
        values.mul_(3)
        result(values + 1)

    graph, traces = record_with_arguments(tmp_path / "run", program)
    node_of = {op: node for node, op in graph.nodes.select("node", "op").collect().rows()}
    edges = graph.edges.collect()
    wrong = (pl.col("dst") == node_of["aten::add"]) & (pl.col("kind") == "data")
    stale = edges.with_columns(src=pl.when(wrong).then(pl.col("src") - 1).otherwise("src"))
    assert prove(graph, traces, num_orders=2, num_removals=0).is_proven
    proof = prove(altered(graph, tmp_path / "stale", stale), traces, num_orders=2, num_removals=0)
    assert "aten::add.Tensor" in proof.first_failure


def test_what_an_operator_wrote_does_not_come_from_outside(tmp_path: Path) -> None:
    outside = torch.ones(4)

    def program() -> None:
        result(torch.zeros_like(outside).add_(1) + outside)

    graph, traces = record_with_arguments(tmp_path / "run", program)
    nodes, edges = graph.nodes.collect(), graph.edges.collect()
    adds = nodes.filter(pl.col("op") == "aten::add_")["node"].to_list()
    shifted = edges.with_columns(pl.col("src", "dst") + 1)
    is_edge = (pl.col("src") == adds[0] + 1) & (pl.col("kind") == "data")
    other = altered(graph, tmp_path / "other", shifted.with_columns(src=pl.when(is_edge).then(0).otherwise("src")))
    one_more = nodes.filter(pl.col("kind") == "input").head(1).with_columns(node=pl.lit(0, pl.Int64))
    pl.concat([one_more, nodes.with_columns(pl.col("node") + 1)]).write_parquet(other.path / "nodes.parquet")
    assert prove(graph, traces, num_orders=1, num_removals=0).is_proven
    with pytest.raises(ReplayError, match=r"aten::add_\..* had written it: an edge is missing"):
        prove(other, traces)


def test_a_step_whose_indices_are_missing_is_not_run(tmp_path: Path) -> None:
    def program() -> None:
        result(torch.arange(10.0)[torch.arange(3) + 1])

    proof = prove_program(tmp_path, program, num_removals=100)
    check_whole(proof)
    assert {removal.noticed_by for removal in proof.removals} == {"nan"}


def test_the_program_is_the_same_with_its_arguments_kept(tmp_path: Path) -> None:
    states = []
    for keeps in (False, True):
        training = Training()
        with record(tmp_path / f"{keeps}.trace", recorder="python", arguments=keeps, synchronize=False) as recording:
            training()
        assert recording.switched_off == ""
        states.append([*training.losses, *training.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_what_a_forked_child_calls_is_not_its_parents(tmp_path: Path) -> None:
    def program() -> None:
        values = torch.ones(3)
        child = os.fork()
        if child == 0:
            values.add_(1)
            os._exit(0)
        os.waitpid(child, 0)
        result(values * 2)

    proof = prove_program(tmp_path, program)
    check_whole(proof)
    assert proof.num_nodes == 2


def test_what_cannot_be_kept_switches_the_recorder_off(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sparse = torch.eye(3).to_sparse()
    with record(tmp_path / "trace", recorder="python", arguments=True, synchronize=False) as recording:
        total = (sparse * 2).to_dense().sum()
    assert total == 6
    assert "cannot be kept" in recording.switched_off
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_arguments_are_asked_of_the_recorder_that_keeps_them(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="only the Python recorder"), record(tmp_path / "trace", arguments=True):
        pass


def test_traces_without_arguments_or_of_another_graph_are_refused(tmp_path: Path) -> None:
    graph, traces = record_with_arguments(tmp_path / "run", aliased)
    other, others = record_with_arguments(tmp_path / "other", strided)
    with pytest.raises(ReplayError, match="is not in the traces"):
        prove(other, traces)
    calls = arguments_path(traces / "rank-00000.trace") / CALLS
    calls.write_text("".join(calls.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ReplayError, match="is incomplete"):
        prove(graph, traces)
    shutil.rmtree(arguments_path(others / "rank-00000.trace"))
    with pytest.raises(ReplayError, match="recorded without its arguments"):
        prove(other, others)


def test_execution_leaves_the_random_state_as_it_was(tmp_path: Path) -> None:
    graph, traces = record_with_arguments(tmp_path, drawn)
    program = ReadProgram(graph, traces)
    before = torch.get_rng_state()
    outcome, _ = Execution(program).run(sorted(program.steps))
    assert outcome.is_same
    assert torch.equal(torch.get_rng_state(), before)


def test_the_command_says_what_it_proved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, traces = record_with_arguments(tmp_path, aliased)
    assert main(["prove", str(traces), "--orders", "3", "--edges", "20"]) == 0
    said = capsys.readouterr().out
    assert "in 3 random orders" in said
    assert "every result of every operator was bitwise what was recorded" in said
    assert main(["prove", str(tmp_path)]) == 1
    assert "holds no *.trace files" in capsys.readouterr().err
