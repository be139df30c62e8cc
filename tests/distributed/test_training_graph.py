"""The graph of a training that does everything at once: interleaved, overlapped, sharded and recomputed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from megatron_ranks import run_ranks
from small_model import SMALL

from truedag.parallel.strategy import parse_strategy
from truedag.parallel.training import TrainingConfig
from truedag.tracer.graph import Graph
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.record.recording import record

STRATEGY = parse_strategy("PP2-VPP2-DP2-EP2-ETP1")
TRAINING = TrainingConfig(
    global_batch_size=8,
    micro_batch_size=1,
    sequence_length=16,
    distributed_optimizer=True,
    overlap_grad_reduce=True,
    overlap_param_gather=True,
    bucket_size=2000,
    recompute="full",
)
NUM_MICROBATCHES = 4


def record_third_step(folder: Path, text: Path) -> None:
    from torch import distributed

    from truedag.parallel.train import build_trainer

    model = replace(SMALL, attention="fused")
    trainer = build_trainer(model, STRATEGY, TRAINING, text=text, device=torch.device("cpu"))
    trainer.step(0)
    trainer.step(1)
    with record(folder / f"rank-{distributed.get_rank():05d}.trace", watch=trainer.model_chunks):
        trainer.step(2)
    trainer.close()


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    folder = tmp_path_factory.mktemp("training")
    text, traces, dag = folder / "text.txt", folder / "traces", folder / "dag"
    text.write_bytes(np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8).tobytes())
    traces.mkdir()
    run_ranks(4, record_third_step, traces, text, timeout_s=120)
    merged = merge_traces(traces, dag, deployment="everything", strategy=STRATEGY.describe())
    assert merged.num_unmatched == 0
    return Graph.open(dag)


@pytest.fixture(scope="module")
def ran(graph: Graph) -> pl.DataFrame:
    return graph.nodes.filter(pl.col("kind").is_in(["compute", "collective", "send", "recv"])).collect()


def test_each_stage_runs_its_layers_for_every_microbatch_forward_and_backward(ran: pl.DataFrame) -> None:
    in_layers = ran.filter(
        (pl.col("layer") >= 0) & (pl.col("kind") == "compute") & pl.col("module").str.contains("norm")
    )
    for phase in ("forward", "backward"):
        found = set(
            in_layers.filter(pl.col("phase") == phase).select("rank", "layer", "microbatch").unique().iter_rows()
        )
        assert found == {
            (rank, layer, microbatch)
            for rank in range(4)
            for layer in STRATEGY.layers_of_stage(4, rank // 2)
            for microbatch in range(NUM_MICROBATCHES)
        }


def test_what_is_computed_again_is_the_backward_pass_of_its_module(ran: pl.DataFrame) -> None:
    attention = ran.filter(pl.col("op") == "aten::_scaled_dot_product_flash_attention_for_cpu")
    counts = attention.group_by("phase", "rank", "layer", "microbatch").len()
    assert set(counts["len"]) == {1}
    assert counts.height == 2 * 4 * 2 * NUM_MICROBATCHES, "once forward, once again backward"
    assert set(counts["phase"]) == {"forward", "backward"}
    assert attention["module"].str.contains(r"decoder\.layers\.\d\.self_attention\.core_attention").all()


def test_messages_between_chunks_have_their_microbatch(ran: pl.DataFrame) -> None:
    messages = ran.filter(pl.col("kind") == "send")
    counts = {(rank, phase): count for rank, phase, count in messages.group_by("rank", "phase").len().iter_rows()}
    # Forward, the first stage passes both of its chunks' results on, the last one only its first's; backward as well.
    few, many = NUM_MICROBATCHES, 2 * NUM_MICROBATCHES
    first = {(rank, phase): count for rank in (0, 1) for phase, count in (("forward", many), ("backward", few))}
    last = {(rank, phase): count for rank in (2, 3) for phase, count in (("forward", few), ("backward", many))}
    assert counts == first | last
    assert set(messages["microbatch"]) == set(range(NUM_MICROBATCHES))


def test_gradients_are_reduced_in_the_backward_pass_and_parameters_gathered_in_the_forward(ran: pl.DataFrame) -> None:
    collectives = ran.filter(pl.col("kind") == "collective")
    reductions = collectives.filter(pl.col("op").str.contains("reduce_scatter"))
    gatherings = collectives.filter(pl.col("op").str.contains("allgather_into_tensor_coalesced"))
    assert len(reductions) == len(gatherings) > 4
    assert set(reductions["phase"]) == {"backward"}
    assert set(gatherings["phase"]) == {"forward"}


def test_the_optimizer_reads_named_states(graph: Graph) -> None:
    inputs = graph.nodes.filter(pl.col("kind") == "input").collect()
    states = inputs.filter(pl.col("op") == "state")["label"]
    assert states.str.contains(r"\.exp_avg(\[\d+:\d+\])?$").any()
    assert states.str.contains(r"\.exp_avg_sq(\[\d+:\d+\])?$").any()
    assert states.str.contains(r"decoder\.layers\.3\.").any()


def test_what_goes_in_is_named_where_it_goes_in(graph: Graph) -> None:
    named = graph.nodes.filter((pl.col("kind") == "input") & pl.col("label").is_in(["tokens", "labels"])).collect()
    counts = {(rank, label): count for rank, label, count in named.group_by("rank", "label").len().iter_rows()}
    first = {(rank, "tokens"): NUM_MICROBATCHES for rank in (0, 1)}
    assert counts == first | {(rank, "labels"): NUM_MICROBATCHES for rank in (2, 3)}
