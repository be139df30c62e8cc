"""The drawing: what it shows and says it leaves out, conventions, the same bytes, and failures that say what."""

from __future__ import annotations

import re
import subprocess
import sys

import networkx as nx
import pygraphviz
import pytest
from small_dag import SmallDag, pipeline

from truedag.tracer.analysis.quantities import write_bytes, write_runs, write_time
from truedag.tracer.errors import DrawError, GraphError
from truedag.tracer.graph import Graph
from truedag.tracer.views import render
from truedag.tracer.views.blocks import fold_blocks
from truedag.tracer.views.boxes import STEP, make_boxes
from truedag.tracer.views.captions import write_shapes
from truedag.tracer.views.draw import draw
from truedag.tracer.views.scope import find_scope
from truedag.tracer.views.sheet import MAX_PIXELS


def simplified(dag, views):
    (drawing,) = draw(dag, views, views=["simplified"])
    return drawing


def fold(dag):
    return fold_blocks(find_scope(Graph.open(dag)), alike=False)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return simplified(pipeline().write(folder / "dag"), folder / "views")


@pytest.fixture(scope="module")
def graph(drawn):
    return pygraphviz.AGraph(filename=str(drawn.dot))  # its nodes live no longer than it


def own(graph):
    return [node for node in graph.nodes() if node.attr["stands_for"]]


def titled(graph, title):
    return [node for node in own(graph) if f"<B>{title}</B>" in node.attr["label"]]


def test_all_three_files_are_there(drawn):
    assert drawn.svg.read_text().lstrip().startswith("<?xml")
    header = drawn.png.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert all(0 < int.from_bytes(header[at : at + 4], "big") <= MAX_PIXELS for at in (16, 20))


def test_every_operator_is_stood_for_and_the_legend_says_so(drawn, graph):
    assert sum(int(node.attr["stands_for"]) for node in own(graph)) == drawn.num_nodes == drawn.num_total
    assert f"{drawn.num_shown} nodes shown of {drawn.num_total}" in drawn.dot.read_text()


def test_the_drawing_is_a_dag(graph):
    ties = nx.DiGraph((str(a), str(b)) for a, b in graph.edges())
    assert nx.is_directed_acyclic_graph(ties)


def test_shapes_follow_the_conventions(graph):
    assert {node.attr["shape"] for node in titled(graph, "all-to-all ep")} == {"ellipse"}
    assert {node.attr["shape"] for node in titled(graph, "router")} == {"parallelogram"}
    assert {node.attr["shape"] for node in titled(graph, "attention")} == {"box"}


def test_gate_selection_and_stage_transfers_are_dashed(graph):
    transfers = [edge for edge in graph.edges() if edge.attr["kind"] == "p2p"]
    assert len(transfers) == 2
    assert {edge.attr["style"] for edge in transfers} == {"dashed"}


def test_experts_are_named_with_their_ranks(graph):
    experts = titled(graph, "experts 0,1")
    assert sorted(node.attr["ranks"] for node in experts) == ["0", "0", "1", "1"]


def test_every_node_states_shapes_ranks_times_and_operators(graph):
    for node in titled(graph, "router"):
        lines = node.attr["label"].strip("<>").split("<BR/>")
        assert lines[1] == "f32[2,4] → [2,4]"
        assert re.fullmatch(r"GPU \d · 1 op x 2", lines[2])
        assert lines[3] == "60 ns, max 60 ns"


def test_waiting_and_transfer_stand_apart(graph):
    (reduction,) = titled(graph, "all-reduce")
    assert "50 ns, max 50 ns<BR/>wait 10 ns, max 10 ns" in reduction.attr["label"]


def test_stages_are_clusters_of_their_own_colour(graph):
    clusters = {one.name: one for one in graph.subgraphs() if one.name.startswith("cluster stage")}
    assert sorted(clusters) == ["cluster stage 0", "cluster stage 1"]
    assert len({one.graph_attr["color"] for one in clusters.values()}) == 2


def test_microbatches_fold_and_are_compared(tmp_path):
    alike = fold(pipeline(num_microbatches=3).write(tmp_path / "a"))
    assert (alike.num_microbatches, alike.num_unlike) == (3, 0)
    dag = pipeline(num_microbatches=3)
    dag.node(rank=0, after=(0,), time=(0, 5), module="decoder.layers.0.extra", phase="probe", microbatch=2, layer=0)
    other = fold(dag.write(tmp_path / "b"))
    assert (other.num_microbatches, other.num_unlike) == (3, 1)


def test_communications_never_fold_into_computation(tmp_path):
    blocks = fold(pipeline().write(tmp_path / "dag"))
    kinds = blocks.fold.members.join(blocks.nodes.select("node", "kind"), on="node").group_by("fold").agg("kind")
    assert all(len(set(found)) == 1 for found in kinds["kind"].to_list())


def test_steps_stay_apart_where_folding_them_would_make_a_cycle(tmp_path):
    dag = SmallDag()
    last = ()
    for step in range(2):
        for layer in range(2):
            last = (
                dag.node(
                    after=last, time=(10 * step + layer, 10 * step + layer + 1), module=f"layers.{layer}", layer=layer,
                    phase="forward", microbatch=0, step=step,
                ),
            )  # fmt: skip
    blocks = fold(dag.write(tmp_path / "dag"))
    assert blocks.folded == "ranks and microbatches of a step"
    assert len(blocks.fold.nodes) == 4


def test_a_program_that_told_nothing_is_drawn(tmp_path):
    dag = SmallDag(num_ranks=2)
    group = dag.group(None, [0, 1])
    first = [dag.node(rank=rank, time=(0, 10)) for rank in (0, 1)]
    reduce = dag.node("collective", -1, first, time=(10, 20), label="all-reduce")
    for rank in (0, 1):
        dag.meet(reduce, group, rank, (10, 12, 20))
        dag.node(rank=rank, after=(reduce,), time=(20, 30))
    path = dag.write(tmp_path / "dag")
    scope = find_scope(Graph.open(path))
    boxes = make_boxes(scope, fold_blocks(scope, alike=False))
    assert {box.panel for box in boxes} == {STEP}
    assert simplified(path, tmp_path / "views").num_nodes == 5


def test_unknown_times_are_written_as_unknown(tmp_path):
    dag = SmallDag()
    dag.node()
    dot = simplified(dag.write(tmp_path / "dag"), tmp_path / "views").dot.read_text()
    assert "not timed" in dot


def test_the_same_graph_gives_the_same_bytes(tmp_path):
    path = pipeline().write(tmp_path / "dag")
    code = "import sys, pathlib; from truedag.tracer.views.draw import draw; draw(*map(pathlib.Path, sys.argv[1:]))"
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(path), str(tmp_path / seed)], check=True, env={"PYTHONHASHSEED": seed}
        )
    for name in ("simplified.dot", "simplified.svg", "simplified.png"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_letters_are_drawn_on_a_machine_without_fonts(drawn):
    assert "@font-face" in drawn.svg.read_text()
    assert "IBM Plex Sans Condensed" in drawn.dot.read_text()


def test_a_broken_dot_file_and_a_slow_one_are_said(tmp_path):
    broken = tmp_path / "broken.dot"
    broken.write_text("digraph {")
    with pytest.raises(DrawError, match="could not draw"):
        render.render(broken, [tmp_path / "out.svg"], dpi=96)
    with pytest.raises(DrawError, match="longer than 0 s"):
        render.render(broken, [tmp_path / "out.svg"], dpi=96, timeout_s=0.01)
    assert not (tmp_path / "out.svg").exists()


def test_an_empty_dataset_and_none_are_said(tmp_path):
    with pytest.raises(DrawError, match="no operator"):
        draw(SmallDag().write(tmp_path / "dag"), tmp_path / "views")
    with pytest.raises(GraphError):
        draw(tmp_path / "nothing", tmp_path / "views")


@pytest.mark.parametrize(
    ("told", "written"),
    [
        (write_time(None), "unknown"),
        (write_time(0), "0 ns"),
        (write_time(999.4), "999 ns"),
        (write_time(1_240_000), "1.24 ms"),
        (write_time(12_400_000), "12.4 ms"),
        (write_time(999_600_000), "1.00 s"),
        (write_time(124_000), "124 µs"),
        (write_bytes(1536), "1.5 KiB"),
        (write_bytes(None), "unknown"),
        (write_runs([3, 1, 2, 8, 10, 11]), "1-3,8,10,11"),
        (write_shapes([("float32", (2, size)) for size in (3, 9, 4, 7)]), ["f32[2,3-9]"]),
        (write_shapes([("int64", (2,)), ("bfloat16", (4, 4))]), ["bf16[4,4]", "i64[2]"]),
    ],
)
def test_captions(told, written):
    assert told == written
