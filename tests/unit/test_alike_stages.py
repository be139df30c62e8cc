"""Stages of a pipeline: alike ones are drawn once and counted, messages name their layers and cross no box."""

from __future__ import annotations

import itertools

import pygraphviz
import pytest
from dag_source import as_graph
from small_dag import SmallDag

from truedag.tracer.graph import Graph
from truedag.tracer.views.blocks import fold_blocks
from truedag.tracer.views.boundaries import find_boundaries
from truedag.tracer.views.boxes import make_boxes
from truedag.tracer.views.calls import read_calls
from truedag.tracer.views.chain import make_chain
from truedag.tracer.views.chain_page import place_chain
from truedag.tracer.views.chain_ways import find_ways
from truedag.tracer.views.draw import draw
from truedag.tracer.views.faults import Faults
from truedag.tracer.views.heads import find_heads
from truedag.tracer.views.scope import find_scope
from truedag.tracer.views.speed import measure_speed

NUM_STAGES = 6


def pipeline(*, odd_stage: int | None = None, gives_tokens_back: bool = False) -> SmallDag:
    """A rank a stage, two layers each, forward to the last and backward to the first."""
    dag = SmallDag(num_ranks=NUM_STAGES)
    dag.stages = {rank: rank for rank in range(NUM_STAGES)}
    pp = dag.group("pp", list(range(NUM_STAGES)))
    kept: dict[int, list[int]] = {}

    def message(src: int, dst: int, made: int, phase: str) -> int:
        told = {"category": "communication", "phase": phase, "microbatch": 0}
        send = dag.node("send", src, [made], label="send pp", **told)
        recv = dag.node("recv", dst, label="receive pp", **told)
        for node, rank in ((send, src), (recv, dst)):
            dag.meet(node, pp, rank, (None, None, None))
        dag.edges.append({"src": send, "dst": recv, "kind": "p2p", "bytes": 32, "dtype": "float32", "shape": [2, 4]})
        return recv

    last = dag.node(rank=0, module="model.embedding", phase="forward", microbatch=0)
    for stage in range(NUM_STAGES):
        for layer in (2 * stage, 2 * stage + 1):
            last = dag.node(
                rank=stage, after=[last], module=f"decoder.layers.{layer}", phase="forward", microbatch=0, layer=layer
            )
            kept.setdefault(stage, []).append(last)
        if stage == odd_stage:
            dag.node(rank=stage, after=[last], module="decoder.extra", phase="forward", microbatch=0)
        if stage + 1 < NUM_STAGES:
            last = message(stage, stage + 1, last, "forward")
    if gives_tokens_back:
        message(NUM_STAGES - 1, 0, last, "forward")
    for stage in reversed(range(NUM_STAGES)):
        for turn in (1, 0):
            layer = 2 * stage + turn
            last = dag.node(
                rank=stage, after=[last, kept[stage][turn]], module=f"decoder.layers.{layer}", phase="backward",
                microbatch=0, layer=layer,
            )  # fmt: skip
        if stage > 0:
            last = message(stage, stage - 1, last, "backward")
    return dag


def with_classes(dag: SmallDag) -> Graph:
    graph = as_graph(dag)
    graph._source.meta |= {"num_nodes": len(dag.nodes)}
    return graph


def test_alike_stages_are_drawn_once_and_their_transfers_are_counted() -> None:
    scope = find_scope(with_classes(pipeline()))
    blocks = fold_blocks(scope, alike=True)
    assert blocks.alike.runs == {0: (0,), 1: (1, 2, 3, 4), 5: (5,)}
    assert blocks.alike.layers[1, 2] == (2, 3, 4, 5, 6, 7, 8, 9)
    assert blocks.alike.repeats[1, 2] == (2 * 4, 2 * 4 * 32), "layer to layer, in each of four stages, forth and back"
    assert blocks.alike.transfers == {(1, "forward"): (3, 3), (1, "backward"): (3, 3)}
    boxes = make_boxes(scope, blocks)
    assert sum(box.num_nodes for box in boxes) == len(pipeline().nodes), "every node is stood for once"
    sends = {box.text[1] for box in boxes if box.stage == 1 and box.text[0] == "send pp"}
    assert sends == {
        "layers 3→4, 5→6, 7→8, 9→10 · 4 messages", "layers 2→1, 4→3, 6→5, 8→7 · 4 messages",
    }  # fmt: skip
    assert fold_blocks(scope, alike=False).alike.runs == {stage: (stage,) for stage in range(NUM_STAGES)}


@pytest.mark.parametrize(
    ("odd_stage", "runs"),
    [(3, {0: (0,), 1: (1, 2), 3: (3,), 4: (4,), 5: (5,)}), (1, {0: (0,), 1: (1,), 2: (2, 3, 4), 5: (5,)})],
)
def test_a_stage_that_runs_something_else_stands_for_itself(odd_stage: int, runs: dict[int, tuple[int, ...]]) -> None:
    assert fold_blocks(find_scope(with_classes(pipeline(odd_stage=odd_stage))), alike=True).alike.runs == runs


def test_the_strategy_says_which_stages_are_alike(tmp_path) -> None:
    (one,) = draw(pipeline().write(tmp_path / "dag"), tmp_path / "views", views=["simplified"])
    text = one.dot.read_text()
    assert "Stages 1-4, alike · GPUs 1-4 · layers 2-9, 2 in each" in text
    assert text.count("and 3 transfers from one of these stages to the next") == 2
    assert "and so do stages 1-4" in text
    assert one.num_nodes == one.num_total
    dot = pygraphviz.AGraph(filename=str(one.dot))
    transfers = [edge for edge in dot.edges() if edge.attr["kind"] == "p2p"]
    assert len(transfers) == 4, "into the alike stages and out of them, forth and back"


@pytest.mark.parametrize("gives_tokens_back", [False, True])
def test_messages_of_the_chain_name_their_layers_and_cross_no_box(gives_tokens_back: bool) -> None:
    scope = find_scope(with_classes(pipeline(gives_tokens_back=gives_tokens_back)))
    chain = make_chain(scope.whole, {rank: read_calls(scope, rank) for rank in range(NUM_STAGES)}, Faults())
    ends = [part for part in chain.parts if part.label]
    assert {pair for part in ends if part.phase == "forward" for pair in part.boundaries} == {
        (2 * stage + 1, 2 * stage + 2) for stage in range(NUM_STAGES - 1)
    } | ({(2 * NUM_STAGES - 1, 0)} if gives_tokens_back else set())
    assert {pair for part in ends if part.phase == "backward" for pair in part.boundaries} == {
        (2 * stage, 2 * stage - 1) for stage in range(1, NUM_STAGES)
    }
    page = place_chain(chain.parts, [60.0] * len(chain.parts))
    ways = find_ways(chain, page)
    assert len(ways) == 2 * (NUM_STAGES - 1) + gives_tokens_back
    pieces = {pair: list(itertools.pairwise(way)) for pair, way in ways.items()}
    for (src, dst), way in pieces.items():
        for a, b in way:
            assert a[0] == b[0] or a[1] == b[1], "lines are level or upright"
            for i, place in enumerate(page.places):
                is_beside = max(a[0], b[0]) <= place.left or min(a[0], b[0]) >= place.right
                is_above = max(a[1], b[1]) <= place.top or min(a[1], b[1]) >= place.bottom
                assert is_beside or is_above, (src, dst, i)
    for one, other in itertools.combinations(pieces.values(), 2):
        for (a, b), (c, d) in itertools.product(one, other):
            if a[0] == b[0] == c[0] == d[0]:
                assert min(max(a[1], b[1]), max(c[1], d[1])) <= max(min(a[1], b[1]), min(c[1], d[1])), "a lane each"


def test_messages_of_interleaved_stages_name_the_layers_that_their_chunk_ends_with() -> None:
    dag = SmallDag(num_ranks=2)
    dag.stages = {0: 0, 1: 1}
    last: list[int] = []
    calls = [("forward", layers) for layers in ((0, 1), (2, 3), (4, 5), (6, 7))]
    calls += [("backward", layers) for layers in ((7, 6), (5, 4), (3, 2), (1, 0))]
    sent = []
    for turn, (phase, layers) in enumerate(calls):
        rank, told = layers[0] // 2 % 2, {"phase": phase, "microbatch": 0}
        if turn not in (0, 4):
            recv = dag.node("recv", rank, label="receive pp", **told)
            dag.edges.append({"src": sent[-1], "dst": recv, "kind": "p2p", "bytes": 1, "dtype": None, "shape": None})
            last = [recv]
        for layer in layers:
            last = [dag.node(rank=rank, after=last, layer=layer, **told)]
        if turn not in (3, 7):
            sent.append(dag.node("send", rank, last, label="send pp", **told))
    frames = dag.frames()
    members = frames["nodes"].select("node", fold="node")
    found = find_boundaries(frames["nodes"], frames["edges"], members)
    assert [found[node] for node in sent] == [{(1, 2)}, {(3, 4)}, {(5, 6)}, {(6, 5)}, {(4, 3)}, {(2, 1)}]


def test_heads_are_those_of_the_scores_and_of_the_places_on_tp() -> None:
    def read(inputs: str, *, op: str = "aten::_softmax", num_tp: int = 2, **columns):
        dag = SmallDag(num_ranks=2)
        dag.stages = {0: 0, 1: 0}
        for rank in (0, 1):
            dag.node(rank=rank, op=op, inputs=inputs, layer=0, module="decoder.layers.0.attention", **columns)
        graph = with_classes(dag)
        ranks = graph._source.frames["ranks"]
        graph._source.frames["ranks"] = ranks.with_columns(tp=ranks["rank"] % num_tp)
        return find_heads(find_scope(graph))

    heads = read("float32[1,4,8,8]")
    assert heads is not None
    assert (heads.num, heads.num_total) == (4, 8)
    assert (heads.of([1]), heads.of([0, 1])) == ([4, 5, 6, 7], list(range(8)))
    fused = read("bfloat16[2,6,8,16] bfloat16[2,6,8,16]", op="aten::_scaled_dot_product_flash_attention", num_tp=1)
    assert fused is not None
    assert (fused.num, fused.num_total) == (6, 6)
    assert read("float32[8,64]") is None, "that is a router's"
    assert read("float32[1,4,8,8]", category="routing") is None
    assert read("float32[1,4,8,8]", op="aten::_softmax_backward_data") is None


def test_prefill_and_decoding_are_as_fast_as_the_report_says() -> None:
    dag = SmallDag(num_ranks=1)
    dag.stages = {0: 0}
    told = {"op": "aten::embedding", "microbatch": 0}
    dag.node(time=(100, 400), phase="prefill", inputs="float32[9,4] int64[2,5]", **told)
    dag.node(time=(400, 600), phase="decode", decode_step=0, inputs="float32[9,4] int64[2,1]", **told)
    dag.node(time=(600, 1100), phase="decode", decode_step=1, inputs="float32[9,4] int64[2,1]", **told)
    graph = with_classes(dag)
    nodes, participants = graph.nodes.collect(), graph.participants.collect()
    speed = measure_speed(find_scope(graph), nodes, participants)
    assert speed is not None
    assert (speed.first_token_ns, speed.output_token_ns) == (300, 350)
    assert speed.tokens_per_s_per_rank == pytest.approx((10 + 2 + 2) / 1e-6)
    dag.node(time=(900, 1300), phase="prefill", inputs="float32[9,4] int64[2,3]", step=1, **told)  # while step 0 ends
    graph = with_classes(dag)
    speed = measure_speed(find_scope(graph), graph.nodes.collect(), graph.participants.collect())
    assert speed is not None
    assert speed.tokens_per_s_per_rank == pytest.approx((14 + 6) / 1.2e-6)
    for row in dag.nodes:
        row["timing"] = "estimated"
    assert measure_speed(find_scope(graph), with_classes(dag).nodes.collect(), participants) is None
