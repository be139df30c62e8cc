"""Recording an inference: the two phases, the cache, and the way of a token from the last stage to the first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from megatron_ranks import run_ranks
from recorder_comparison import assert_same_graph
from small_model import SMALL

from truedag.parallel.inference import InferenceConfig
from truedag.parallel.strategy import Strategy, parse_strategy
from truedag.tracer.graph import Graph
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.merge.rank_graph import build_rank_graph
from truedag.tracer.record.recording import RecorderName, record
from truedag.tracer.record.trace import read_trace

STEPS = 3
EQUAL = InferenceConfig(num_prompts=2, prompt_lengths=4, decode_steps=STEPS)
UNEQUAL = replace(EQUAL, prompt_lengths=(4, 6))


def record_run(folder: Path, strategy: Strategy, inference: InferenceConfig, recorder: RecorderName = "native") -> int:
    from torch import distributed

    from truedag.parallel.generate import build_generator
    from truedag.parallel.prompts import Prompts

    prompts = Prompts([list(range(inference.length_of(number))) for number in range(inference.num_prompts)])
    generator = build_generator(SMALL, strategy, inference, prompts=prompts, device=torch.device("cpu"))
    generator.run(0)
    path = folder / f"rank-{distributed.get_rank():05d}.trace"
    with record(path, recorder=recorder, watch=generator.model_chunks) as recording:
        generator.run(1)
    assert recording.switched_off == ""
    generator.close()
    return generator.cache.num_bytes


class Reader:
    """The recorded graph, and questions to it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = graph.nodes.collect()
        edges = graph.edges.filter(pl.col("kind") != "order").select("src", "dst").collect()
        self.successors: dict[int, list[int]] = {}
        for src, dst in edges.iter_rows():
            self.successors.setdefault(src, []).append(dst)

    def select(self, **wanted: object) -> set[int]:
        """Nodes with these values in these columns; a module is asked for by its last name."""
        module = wanted.pop("module", None)
        found = self.nodes.filter(*[pl.col(column) == value for column, value in wanted.items()])
        if module is not None:
            found = found.filter(pl.col("module").str.ends_with(str(module)))
        return set(found["node"].to_list())

    def reached(self, start: set[int], through: set[int]) -> set[int]:
        """Nodes that are reached from `start` over nodes of `through` only."""
        seen, waiting = set(start), list(start)
        while waiting:
            for node in self.successors.get(waiting.pop(), []):
                if node not in seen:
                    seen.add(node)
                    if node in through:
                        waiting.append(node)
        return seen - start


@pytest.fixture(scope="module", params=[("TP2-PP2-EP2-ETP1", EQUAL), ("PP2", UNEQUAL)], ids=["equal", "unequal"])
def recorded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Reader, Strategy, InferenceConfig]:
    notation, inference = request.param
    strategy = parse_strategy(notation)
    folder = tmp_path_factory.mktemp("run")
    (folder / "traces").mkdir()
    sizes = run_ranks(strategy.world_size, record_run, folder / "traces", strategy, inference, timeout_s=120)
    positions = (inference.longest + STEPS) * 2
    assert sizes == [2 * positions * 32 // strategy.tp * 4 * 4 // strategy.pp] * strategy.world_size
    merge_traces(folder / "traces", folder / "dag")
    return Reader(Graph.open(folder)), strategy, inference


Recorded = tuple[Reader, Strategy, InferenceConfig]


def test_both_recorders_find_the_same_graph_of_prefill_and_decode(tmp_path: Path) -> None:
    strategy = parse_strategy("TP2-PP2-EP2-ETP1")
    graphs = []
    recorders: tuple[RecorderName, RecorderName] = ("native", "python")
    for recorder in recorders:
        (tmp_path / recorder).mkdir()
        run_ranks(strategy.world_size, record_run, tmp_path / recorder, strategy, UNEQUAL, recorder, timeout_s=120)
        traces = sorted((tmp_path / recorder).glob("rank-*.trace"))
        graphs.append([build_rank_graph(read_trace(path)) for path in traces])
    for native, python in zip(*graphs, strict=True):
        assert len(native.nodes.op) > 500
        assert_same_graph(native, python)


def test_every_communication_is_matched(recorded: Recorded) -> None:
    reader, strategy, inference = recorded
    assert reader.graph.meta["num_unmatched"] == 0
    num_passes = inference.num_prompts + STEPS
    # Hidden states forward and tokens back, of each tensor-parallel rank.
    assert len(reader.select(kind="send")) == 2 * num_passes * strategy.tp
    assert len(reader.select(kind="recv")) == 2 * num_passes * strategy.tp


def test_a_send_is_over_when_its_receive_is(recorded: Recorded) -> None:
    reader, _, _ = recorded
    ends = reader.graph.participants.select("node", "arrive_ns", "end_ns").collect()
    joined = (
        reader.graph.edges.filter(pl.col("kind") == "p2p")
        .select("src", "dst")
        .collect()
        .join(ends, left_on="src", right_on="node")
        .join(ends, left_on="dst", right_on="node", suffix="_received")
    )
    assert len(joined) > 0
    assert joined.filter(pl.col("end_ns") > pl.max_horizontal("end_ns_received", "arrive_ns")).is_empty()


def test_both_phases_are_told_of_every_layer_on_every_rank(recorded: Recorded) -> None:
    reader, strategy, inference = recorded
    computed = reader.nodes.filter(pl.col("kind") == "compute", pl.col("layer") >= 0)
    places = set(computed.select("rank", "layer", "phase", "microbatch", "decode_step").iter_rows())
    expected = set()
    for rank in range(strategy.world_size):
        for layer in strategy.layers_of_stage(SMALL.num_layers, strategy.coordinates(rank)["pp"]):
            expected |= {(rank, layer, "prefill", prompt, -1) for prompt in range(inference.num_prompts)}
            expected |= {(rank, layer, "decode", 0, step) for step in range(STEPS)}
    assert places == expected
    assert set(reader.nodes["phase"].drop_nulls()) <= {"prefill", "decode"}


def test_a_token_goes_from_the_last_stage_into_the_next_step(recorded: Recorded) -> None:
    reader, strategy, _ = recorded
    messages = reader.select(kind="send") | reader.select(kind="recv")
    firsts = [rank for rank in range(strategy.world_size) if strategy.coordinates(rank)["pp"] == 0]
    for step in range(STEPS):
        before = {"phase": "decode", "decode_step": step - 1} if step else {"phase": "prefill"}
        for first in firsts:
            last = strategy.group_of("pp", first)[-1]
            chosen = reader.select(op="aten::argmax", rank=last, **before)
            assert len(chosen) == (1 if step else 2)
            looked_up = reader.select(module="word_embeddings", rank=first, phase="decode", decode_step=step)
            for token in chosen:
                assert reader.reached({token}, messages) & looked_up


def test_a_step_attends_to_what_the_step_before_has_kept(recorded: Recorded) -> None:
    reader, _, inference = recorded
    one_copy = inference is EQUAL
    writes = {"op": "aten::copy_" if one_copy else "aten::index_put_", "module": "self_attention"}
    scores = reader.select(module="core_attention.scores")
    for step in range(1, STEPS):
        for layer in range(SMALL.num_layers):
            place = {"layer": layer, "phase": "decode"}
            kept = reader.select(**writes, **place, decode_step=step - 1)
            assert kept
            own = reader.select(**place, decode_step=step)
            # A slice that was written stays as it was; an indexed write is of the whole cache.
            over = reader.select(module="core_attention", **place, decode_step=step) if one_copy else own
            reached = [reader.reached({write}, over) & own for write in kept]
            assert sum(bool(nodes & scores) for nodes in reached) == len(kept) // 2  # the keys of each rank
            assert all(reached)


def test_a_step_attends_to_what_the_prefill_has_kept(recorded: Recorded) -> None:
    reader, _, inference = recorded
    for layer in range(SMALL.num_layers):
        own = reader.select(layer=layer, phase="decode", decode_step=0)
        kept = reader.select(op="aten::copy_", module="self_attention", layer=layer, phase="prefill")
        assert len(kept) % (2 * inference.num_prompts) == 0
        assert all(reader.reached({write}, set()) & own for write in kept)


def test_prompts_and_generated_tokens_are_named(recorded: Recorded) -> None:
    reader, strategy, inference = recorded
    inputs = reader.nodes.filter(pl.col("kind") == "input", pl.col("label").str.starts_with("prompts["))
    assert len(inputs) == inference.num_prompts * strategy.tp
    outputs = reader.nodes.filter(pl.col("kind") == "output", pl.col("label") == "sampled_tokens")
    assert len(outputs) == (inference.num_prompts + STEPS) * strategy.tp
    caches = {
        f"decoder.layers.{layer}.self_attention.{kind}_cache"
        for layer in range(SMALL.num_layers)
        for kind in ("key", "value")
    }
    # Rows of one length read the slots that this run has written and no other; an indexed write takes what was there.
    labels = set(reader.nodes.filter(pl.col("kind") == "input")["label"])
    assert labels & caches == (set() if inference is EQUAL else caches)
    assert labels >= ({"rotary_pos_emb"} if inference is EQUAL else {"rotary_pos_emb", "cache.rows", "cache.positions"})
