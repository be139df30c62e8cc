"""Recording the executor: both recorders agree on every rank, and the graph follows the model that ran."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from megatron_ranks import run_ranks
from recorder_comparison import assert_same_graph
from small_model import SMALL

from truedag.parallel.strategy import Strategy, parse_strategy
from truedag.parallel.training import TrainingConfig
from truedag.tracer.graph import Graph
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.merge.rank_graph import build_rank_graph
from truedag.tracer.record.recording import RecorderName, record
from truedag.tracer.record.trace import read_trace

MODEL = SMALL
TRAINING = TrainingConfig(global_batch_size=8, micro_batch_size=1, sequence_length=16)
DEMO_LAYOUT = parse_strategy("TP2-PP2-DP2-EP2-ETP1")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8).tobytes())
    return path


def record_step(
    folder: Path, recorder: RecorderName, strategy: Strategy, text: Path, *, residual: bool = True
) -> float:
    from torch import distributed

    from truedag.model import specs
    from truedag.parallel.train import build_trainer

    if not residual:  # the one line: what a block computed is no longer added to what went in
        specs.get_bias_dropout_add = lambda training, fused: lambda x_and_bias, _residual, _probability: x_and_bias[0]
    trainer = build_trainer(MODEL, strategy, TRAINING, text=text, device=torch.device("cpu"))
    trainer.step(0)
    path = folder / f"rank-{distributed.get_rank():05d}.trace"
    with record(path, recorder=recorder, watch=trainer.model_chunks) as recording:
        result = trainer.step(1)
    assert recording.switched_off == ""
    trainer.close()
    return result.loss


def test_both_recorders_find_the_same_graph_on_every_rank(text: Path, tmp_path: Path) -> None:
    losses = {}
    for recorder in ("native", "python"):
        (tmp_path / recorder).mkdir()
        losses[recorder] = run_ranks(8, record_step, tmp_path / recorder, recorder, DEMO_LAYOUT, text, timeout_s=150)
    assert losses["native"] == losses["python"]
    for rank in range(8):
        native, python = (
            build_rank_graph(read_trace(tmp_path / recorder / f"rank-{rank:05d}.trace")) for recorder in losses
        )
        assert len(native.nodes.op) > 1000
        assert_same_graph(native, python)


def merged(folder: Path, strategy: Strategy, text: Path, *, residual: bool) -> Graph:
    traces = folder / "traces"
    traces.mkdir(parents=True)
    run_ranks(strategy.world_size, _record_with, traces, strategy, text, residual, timeout_s=120)
    merge_traces(traces, folder / "dag")
    return Graph.open(folder)


def _record_with(folder: Path, strategy: Strategy, text: Path, residual: bool) -> float:
    return record_step(folder, "native", strategy, text, residual=residual)


def test_a_model_without_residuals_has_another_graph(text: Path, tmp_path: Path) -> None:
    strategy = parse_strategy("TP1-PP2-DP1")
    usual = merged(tmp_path / "usual", strategy, text, residual=True)
    changed = merged(tmp_path / "changed", strategy, text, residual=False)

    def adds(graph: Graph) -> Counter[int]:
        own = pl.col("module").str.contains(r"^decoder\.layers\.\d+$")
        rows = graph.nodes.filter(own & (pl.col("op") == "aten::add") & (pl.col("phase") == "forward"))
        return Counter(rows.collect()["layer"].to_list())

    per_layer = 2 * TRAINING.num_microbatches(strategy.dp)  # after attention and after the experts
    assert adds(usual) == dict.fromkeys(range(MODEL.num_layers), per_layer)
    assert adds(changed) == {}
    # Without it nothing of a layer's input bypasses its attention.
    assert bypasses(usual) == set(range(MODEL.num_layers))
    assert bypasses(changed) == set()


def bypasses(graph: Graph) -> set[int]:
    """Layers in which what goes into the first norm also goes somewhere else in the layer, forward."""
    nodes = graph.nodes.filter(pl.col("phase") == "forward").select("node", "module", "layer").collect()
    edges = graph.edges.filter((pl.col("kind") == "data") & (pl.col("bytes") > 0)).select("src", "dst").collect()
    into_norm = nodes.filter(pl.col("module").str.ends_with("input_layernorm"))
    sources = edges.join(into_norm, left_on="dst", right_on="node").select("src", "layer").unique()
    inside = sources.join(
        nodes.filter(pl.col("module").str.ends_with("input_layernorm")), left_on="src", right_on="node", how="anti"
    )
    beside = nodes.filter(~pl.col("module").str.ends_with("input_layernorm"))
    reached = inside.join(edges, on="src").join(beside, left_on="dst", right_on="node", suffix="_reached")
    return set(reached.filter(pl.col("layer") == pl.col("layer_reached"))["layer"].to_list())


def test_ranks_that_were_not_recorded_are_named_and_nothing_is_guessed(text: Path, tmp_path: Path) -> None:
    strategy = parse_strategy("TP1-PP2-DP1")
    graph = merged(tmp_path / "whole", strategy, text, residual=True)
    assert graph.meta["num_unmatched"] == 0
    (tmp_path / "whole" / "traces" / "rank-00001.trace").unlink()
    summary = merge_traces(tmp_path / "whole" / "traces", tmp_path / "part")
    assert summary.missing_ranks == (1,)
    part = Graph.open(tmp_path / "part")
    assert {rank for told in part.meta["unmatched"] for rank in told["missing_ranks"]} == {1}
    messages = 2 * TRAINING.num_microbatches(strategy.dp)
    assert sum(told["what"].startswith(("send", "receive")) for told in part.meta["unmatched"]) == messages
    lone = part.nodes.filter(pl.col("kind").is_in(["send", "recv", "collective"]) & (pl.col("rank") >= 0)).collect()
    assert len(lone) == part.meta["num_unmatched"]
    assert part.edges.filter(pl.col("kind") == "p2p").collect().is_empty()


def all_reduce_with_a_callback(folder: Path) -> None:
    """The program's own code runs on the backend's thread when the communication is done."""
    from torch import distributed

    path = folder / f"rank-{distributed.get_rank():05d}.trace"
    with record(path):
        work = distributed.all_reduce(torch.ones(2), async_op=True)
        tripled = work.get_future().then(lambda future: future.value()[0].mul(3))
        assert tripled.wait().tolist() == [6.0, 6.0]
        tripled.wait().sum()


def test_what_a_callback_computes_on_a_communication_is_in_the_graph(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    run_ranks(2, all_reduce_with_a_callback, tmp_path / "traces", timeout_s=60)
    merge_traces(tmp_path / "traces", tmp_path / "dag")
    graph = Graph.open(tmp_path)
    nodes = graph.nodes.select("node", "op", "rank").collect()
    edges = graph.edges.filter((pl.col("kind") == "data") & (pl.col("bytes") > 0)).select("src", "dst").collect()
    named = edges.join(nodes, left_on="src", right_on="node").join(nodes, left_on="dst", right_on="node", suffix="_to")
    found = Counter(named.select("op", "op_to", "rank_to").iter_rows())
    assert found == {
        ("aten::ones", "c10d::allreduce_", -1): 2,
        ("c10d::allreduce_", "aten::mul", 0): 1,
        ("c10d::allreduce_", "aten::mul", 1): 1,
        ("aten::mul", "aten::sum", 0): 1,
        ("aten::mul", "aten::sum", 1): 1,
    }


def all_reduce_inside_an_operator(folder: Path) -> None:
    from torch import distributed

    def kernel(x: torch.Tensor) -> torch.Tensor:
        result = x.clone()
        distributed.all_reduce(result)
        return result.mul_(2)

    with torch.library._scoped_library("truedag_test", "FRAGMENT") as library:
        library.define("reduce_twice(Tensor x) -> Tensor")
        library.impl("reduce_twice", kernel, "CPU")
        with record(folder / f"rank-{distributed.get_rank():05d}.trace"):
            distributed.all_reduce(torch.ones(3))
            torch.ops.truedag_test.reduce_twice(torch.ones(2)).sum()
            distributed.all_reduce(torch.ones(4))


def test_a_communication_inside_an_operator_is_joined_as_well(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    run_ranks(2, all_reduce_inside_an_operator, tmp_path / "traces", timeout_s=60)
    summary = merge_traces(tmp_path / "traces", tmp_path / "dag")
    assert (summary.num_collectives, summary.num_unmatched) == (3, 0)
    nodes = Graph.open(tmp_path).nodes.filter(pl.col("kind") == "collective").collect()
    assert nodes["inputs"].to_list() == ["float32[3]", "float32[2]", "float32[4]"]
    ops = Graph.open(tmp_path).nodes.filter(pl.col("rank") == 0).collect()["op"].to_list()
    assert ops == ["aten::ones", "aten::ones", "truedag_test::reduce_twice", "aten::sum", "aten::ones"]


def reduce_and_send(folder: Path, recorder: RecorderName) -> None:
    from torch import distributed

    rank = distributed.get_rank()
    with record(folder / f"rank-{rank:05d}.trace", recorder=recorder):
        distributed.all_reduce(torch.ones(2))
        if rank == 0:
            distributed.send(torch.ones(3), 1)
        else:
            distributed.recv(torch.empty(3), 0)


def only_send(folder: Path) -> None:
    from torch import distributed

    rank = distributed.get_rank()
    with record(folder / f"rank-{rank:05d}.trace"):
        if rank == 0:
            distributed.send(torch.ones(3), 1)
        else:
            distributed.recv(torch.empty(3), 0)


def pretend_another_host(path: Path) -> None:
    """Say of a trace that another kernel recorded it."""
    boot_id = read_trace(path).meta["boot_id"]
    other = boot_id[:-1] + ("0" if boot_id[-1] != "0" else "1")
    path.write_bytes(path.read_bytes().replace(boot_id.encode(), other.encode()))


def test_times_of_hosts_whose_clocks_nobody_compared_are_not_split(tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    traces.mkdir()
    run_ranks(2, only_send, traces, timeout_s=60)
    pretend_another_host(traces / "rank-00001.trace")
    merge_traces(traces, tmp_path / "dag")
    graph = Graph.open(tmp_path)
    assert graph.ranks.collect()["clock_error_ns"].to_list() == [0, None]
    parts = graph.participants.collect()
    assert len(parts) == 2
    assert parts["start_ns"].null_count() == 2
    assert parts["arrive_ns"].null_count() == 0
    assert graph.meta["num_unmatched"] == 0


def test_communications_both_ways_bound_a_clock_that_nobody_compared(tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    traces.mkdir()
    run_ranks(2, reduce_and_send, traces, "native", timeout_s=60)
    pretend_another_host(traces / "rank-00001.trace")
    merge_traces(traces, tmp_path / "dag")
    graph = Graph.open(tmp_path)
    rank = graph.ranks.collect().row(1, named=True)
    assert abs(rank["clock_offset_ns"]) <= rank["clock_error_ns"]  # it is the same clock in truth
    parts = graph.participants.collect()
    assert len(parts) == 4
    assert parts["start_ns"].null_count() == 0
    collective = parts.filter(pl.col("send_bytes") == pl.col("recv_bytes"))
    assert len(collective) == 2
    assert collective["end_ns"].min() >= collective["arrive_ns"].max()


def test_a_message_whose_end_nobody_told_has_none(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    run_ranks(2, reduce_and_send, tmp_path / "traces", "python", timeout_s=60)
    merge_traces(tmp_path / "traces", tmp_path / "dag")
    messages = Graph.open(tmp_path).nodes.filter(pl.col("kind").is_in(["send", "recv"])).collect()
    assert messages["timing"].to_list() == ["none", "none"]
    assert messages["end_ns"].null_count() == 2
    assert messages["start_ns"].null_count() == 0
