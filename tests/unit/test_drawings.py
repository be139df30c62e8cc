"""The three drawings: every GPU, layer, operator and expert is on a sheet, all text fits, all links lead somewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import networkx as nx
import polars as pl
import pydot
import pygraphviz
import pytest
from small_dag import SmallDag, pipeline
from small_replicas import folded, replicas, with_places, write_with_places
from svg_texts import links, overhangs

from truedag.tracer.errors import DrawError
from truedag.tracer.views.blocks import fold_blocks
from truedag.tracer.views.boxes import make_boxes
from truedag.tracer.views.detailed import draw_detailed
from truedag.tracer.views.draw import VIEWS, Choice, draw
from truedag.tracer.views.engine import lay_out_layers
from truedag.tracer.views.experts import ExpertMap
from truedag.tracer.views.scope import find_scope
from truedag.tracer.views.world import read_world
from truedag.tracer.views.world_page import lay_out_world


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    dag = replicas()
    path = write_with_places(dag, folder / "dag")
    draw(path, folder / "views")
    return folder / "views"


def sheets(views: Path, suffix: str) -> list[Path]:
    return sorted(views.rglob(f"*.{suffix}"))


def test_every_view_has_its_first_sheet_in_three_formats(views):
    names = {f"{view}.{suffix}" for view in VIEWS for suffix in ("dot", "svg", "png")}
    assert names <= {path.name for path in views.iterdir()}


def test_all_text_fits_its_box(views):
    for path in sheets(views, "svg"):
        too_wide = [(said, by) for said, by in overhangs(path) if by > 0.5]
        assert not too_wide, path.name


def test_links_lead_to_sheets_that_are_there_and_reach_all(views):
    reached = {views / "simplified.svg"}
    todo = list(reached)
    for path in todo:
        for way in links(path):
            goal = (path.parent / way).resolve()
            assert goal.exists(), f"{path.name} leads to {way}"
            if goal not in reached:
                reached.add(goal)
                todo.append(goal)
    assert {path.resolve() for path in sheets(views, "svg")} == {path.resolve() for path in reached}


def test_links_lead_to_no_sheet_that_was_not_asked_for(tmp_path):
    path = write_with_places(replicas(), tmp_path / "dag")
    out = tmp_path / "views"
    draw(path, out, views=["simplified"])
    assert links(out / "simplified.svg") == []
    draw(path, out, views=["simplified", "comprehensive"], choice=Choice(stages=(1,)))
    for sheet in sheets(out, "svg"):
        assert all((sheet.parent / way).exists() for way in links(sheet)), sheet.name
    assert set(links(out / "simplified.svg")) == {"comprehensive.svg", "comprehensive/stage-1.svg"}
    draw(path, out, views=["detailed"])
    assert {"simplified.svg", "comprehensive.svg"} <= set(links(out / "detailed.svg"))


def test_every_dot_file_is_read_by_graphviz_and_networkx_as_a_dag_of_true_edges(views):
    for path in sheets(views, "dot"):
        graph = pygraphviz.AGraph(filename=str(path))
        flows = [edge for edge in graph.edges() if edge.attr["num_edges"]]
        assert nx.is_directed_acyclic_graph(nx.DiGraph((str(a), str(b)) for a, b in flows)), path.name
        assert len(nx.nx_agraph.from_agraph(graph)) == graph.number_of_nodes()


@pytest.mark.filterwarnings("ignore:.* deprecated - use:DeprecationWarning")  # pydot's use of its own parser
def test_pydot_reads_the_nodes_and_edges_that_graphviz_reads(views):
    for view in VIEWS:
        (found,) = pydot.graph_from_dot_file(str(views / f"{view}.dot"))
        graph = pygraphviz.AGraph(filename=str(views / f"{view}.dot"))
        read, ties = set(), []
        clusters = [found]
        while clusters:
            one = clusters.pop()
            clusters += one.get_subgraphs()
            read |= {node.get_name().strip('"') for node in one.get_nodes()} - {"graph", "node", "edge"}
            ties += [(edge.get_source().strip('"'), edge.get_destination().strip('"')) for edge in one.get_edges()]
        assert read == set(graph.nodes())
        assert sorted(ties) == sorted((str(a), str(b)) for a, b in graph.edges())


def test_every_gpu_stands_on_the_map_of_its_stage(views):
    graph = pygraphviz.AGraph(filename=str(views / "comprehensive.dot"))
    for stage, ranks in ((0, {"0", "1"}), (1, {"2", "3"})):
        cluster = graph.get_subgraph(f"cluster stage {stage}")
        assert {str(node) for node in cluster.nodes() if str(node).startswith("gpu")} == {f"gpu{one}" for one in ranks}


def test_the_batch_is_split_over_replicas_and_merged(views):
    text = (views / "comprehensive.dot").read_text().replace("<BR/>", " ")
    assert "6 sequences, 24 tokens" in text
    assert text.count("3 sequences, 12 tokens") == 2
    assert "6 sequences, no backward pass was told" in text


def test_gradients_are_told_where_a_backward_pass_was(tmp_path):
    dag = replicas()
    for rank in (0, 1):
        dag.node(rank=rank, phase="backward", microbatch=0)
    for name, is_merged in (("with", True), ("without", False)):
        path = write_with_places(dag, tmp_path / name)
        draw(path, tmp_path / name / "views", views=["comprehensive"])
        text = (tmp_path / name / "views" / "comprehensive.dot").read_text().replace("<BR/>", " ")
        assert "gradients of 6 sequences" in text
        assert ("gradients of 6 sequences, merged" in text) == is_merged
        dag.groups = [row | {"axis": "tp" if row["axis"] == "dp" else row["axis"]} for row in dag.groups]


def test_a_batch_is_counted_once_a_step_and_not_guessed():
    dag = replicas()
    (before,) = {(world.num_sequences, world.num_tokens) for world in [read_world(find_scope(with_places(dag)))]}
    assert before == (6, 24)
    for rank in (0, 1):  # another step, whose sequences are longer
        tokens = dag.node("input", rank, outputs="int64[3,9]")
        dag.node(rank=rank, after=(tokens,), phase="forward", microbatch=0, step=1)
    world = read_world(find_scope(with_places(dag)))
    assert (world.num_sequences, world.num_tokens) == before
    graph = with_places(dag)
    graph._source.frames["ranks"] = graph._source.frames["ranks"].with_columns(dp=pl.lit(None, pl.Int32))
    assert read_world(find_scope(graph)).parts == [], "nobody told whether the ranks are replicas"
    ranks = with_places(dag)._source.frames["ranks"].with_columns(cp=pl.col("rank") % 2, dp=pl.lit(0, pl.Int32))
    graph._source.frames["ranks"] = ranks
    scope = find_scope(graph)
    words = [line for node in lay_out_world(scope, read_world(scope), ExpertMap(scope)).nodes for line in node.text]
    assert "3 sequences, 12 tokens on each of 2 places on cp" in " ".join(words)
    mask = dag.node("input", 0, outputs="int64[1,4]")
    dag.node(rank=0, after=(mask,), phase="forward", microbatch=0)
    assert read_world(find_scope(with_places(dag))).parts == [], "which of the two are the tokens?"


def test_every_layer_is_a_box_that_leads_to_its_operators(views):
    graph = pygraphviz.AGraph(filename=str(views / "detailed.dot"))
    labels = {node.attr["label"]: node.attr["URL"] for node in graph.nodes() if node.attr["stands_for"]}
    for layer in range(4):
        (way,) = [url for label, url in labels.items() if f"layer {layer}: forward" in label]
        assert (views / way).exists()
    assert {"send pp", "receive pp"} <= {word for label in labels for word in re.findall(r"<B>(\w+ pp)</B>", label)}


def test_operators_and_all_experts_are_on_the_sheet_of_their_layers(views):
    path = views / "detailed" / "stage-0.layers-0,1.forward.dot"
    graph = pygraphviz.AGraph(filename=str(path))
    own = [node for node in graph.nodes() if node.attr["stands_for"]]
    assert len(own) == 4 + 2 * 2
    assert {int(node.attr["stands_for"]) for node in own} == {4}, "two layers on two ranks"
    assert sorted(one.name for one in graph.subgraphs() if one.name.startswith("cluster expert")) == [
        "cluster expert 0",
        "cluster expert 1",
    ]
    assert "reads norm.weight" in path.read_text()
    dashed = [edge for edge in graph.edges() if edge.attr["style"] == "dashed"]
    gate = [[graph.get_node(end).attr["label"] for end in edge] for edge in dashed if edge.attr["num_edges"]]
    assert len(gate) == 1, "gate selection"
    assert "router" in gate[0][0]
    assert "topk" in gate[0][1]


def test_one_layer_alone_is_drawn_for_itself(tmp_path):
    path = replicas().write(tmp_path / "dag")
    (drawing,) = draw(path, tmp_path / "views", views=["detailed"], choice=Choice(layers=(1,)))
    assert {one.stem for one in drawing.sheets} == {"detailed", "stage-0.layer-1.forward"}


@pytest.mark.parametrize(
    ("view", "choice"),
    [
        ("detailed", Choice(layers=(9,))), ("detailed", Choice(stages=(7,))), ("detailed", Choice(rank=5)),
        ("comprehensive", Choice(stages=(1, 7))),
    ],
)  # fmt: skip
def test_a_choice_that_is_not_in_the_graph_is_said(tmp_path, view, choice):
    path = replicas().write(tmp_path / "dag")
    with pytest.raises(DrawError, match="is not in the graph"):
        draw(path, tmp_path / "views", views=[view], choice=choice)


def test_one_rank_of_each_class_stands_for_the_others():
    dag = replicas()
    whole, part = find_scope(with_places(dag)), find_scope(folded(with_places(dag)))
    assert (whole.is_folded, part.is_folded) == (False, True)
    assert part.read == [0, 2]
    pictures = []
    for scope in (whole, part):
        blocks = fold_blocks(scope, alike=True)
        boxes = make_boxes(scope, blocks)
        pictures.append([(box.text[0], box.num_nodes, box.ranks, box.experts) for box in boxes])
    assert pictures[0] == pictures[1]
    worlds = [read_world(scope) for scope in (whole, part)]
    assert [one.num_nodes for one in worlds[0].classes] == [one.num_nodes for one in worlds[1].classes]
    assert [one.calls for one in worlds[0].traffic] == [one.calls for one in worlds[1].traffic]
    assert worlds[0].parts == worlds[1].parts
    assert ExpertMap(whole).held == ExpertMap(part).held


def test_operators_of_many_parameters_are_folded_by_their_depth():
    dag = replicas()
    for _ in range(200):
        moment = dag.node(rank=0, label="lerp_", phase="update")
        root = dag.node(rank=0, label="sqrt", phase="update")
        dag.node(rank=0, after=[moment, root], label="addcdiv_", phase="update")
    _, *sheets = draw_detailed(find_scope(with_places(dag)), Choice(), lambda _: None, linked=())
    (update,) = [sheet for sheet in sheets if sheet.name.endswith("outside-layers.update")]
    assert (update.num_shown, update.num_nodes) == (3, 600)
    assert update.dot.count("200 ops x 1") == 3
    graph = nx.MultiDiGraph(nx.nx_agraph.from_agraph(pygraphviz.AGraph(string=update.dot)))
    assert sum(int(edge.get("num_edges", 0)) for _, _, edge in graph.edges(data=True)) == 400


def test_what_ranks_and_calls_ran_is_a_number_only_where_it_is_the_same(tmp_path):
    dag = replicas()
    scope = find_scope(with_places(dag))
    assert [one.num_operators for one in read_world(scope).classes] == [(18, 18), (17, 17)]
    # An expert without tokens gives zeros without an element: the ranks are of one class all the same.
    told = {"phase": "forward", "microbatch": 0, "layer": 1, "op": "aten::zeros", "label": "zeros"}
    dag.node(rank=1, module="decoder.layers.1.mlp", outputs="float32[0,4]", inputs="", **told)
    other = find_scope(with_places(dag))
    assert other.members == scope.members
    assert [one.num_operators for one in read_world(other).classes] == [(18, 19), (17, 17)]
    views = tmp_path / "views"
    path = write_with_places(dag, tmp_path / "dag")
    draw(path, views, views=["comprehensive", "detailed"])
    assert "each 18 to 19 operators" in (views / "comprehensive.dot").read_text()
    labels = (views / "detailed.dot").read_text()
    assert "17 operators in 2" in labels
    assert "8 operators x 2" in labels


def test_alike_layers_are_drawn_once_and_others_are_not():
    dag = replicas(num_layers=3)
    blocks = fold_blocks(find_scope(with_places(dag)), alike=True)
    assert blocks.alike.layers == {(0, 0): (0, 1, 2), (1, 3): (3, 4, 5)}
    assert blocks.alike.repeats[0, 0][0] == 2 * 2, "from two layers to the next, on two ranks"
    odd = next(row["node"] for row in dag.nodes if row["layer"] == 1)
    dag.node(rank=0, after=[odd], module="decoder.layers.1.extra", phase="forward", microbatch=0, layer=1, expert=7)
    other = fold_blocks(find_scope(with_places(dag)), alike=True)
    assert other.alike.layers == {(0, 0): (0,), (0, 1): (1,), (0, 2): (2,), (1, 3): (3, 4, 5)}


def test_all_drawings_of_the_same_graph_are_the_same_bytes(tmp_path):
    path = replicas().write(tmp_path / "dag")
    code = "import sys, pathlib; from truedag.tracer.views.draw import draw; draw(*map(pathlib.Path, sys.argv[1:]))"
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(path), str(tmp_path / seed)], check=True, env={"PYTHONHASHSEED": seed}
        )
    drawn = [{str(one.relative_to(tmp_path / seed)): one.read_bytes() for one in (tmp_path / seed).rglob("*.*")}
             for seed in ("1", "2")]  # fmt: skip
    assert len(drawn[0]) >= 18
    assert drawn[0] == drawn[1]


def test_without_graphviz_rows_are_depths_and_the_sheet_says_so(tmp_path, monkeypatch):
    def too_late(problems, *, timeout_s=0.0):
        return lay_out_layers(problems, timeout_s=0.001)

    monkeypatch.setattr("truedag.tracer.views.operator_page.lay_out_layers", too_late)
    path = replicas().write(tmp_path / "dag")
    (drawing,) = draw(path, tmp_path / "views", views=["detailed"])
    assert len(drawing.sheets) > 2
    texts = [one.with_suffix(".dot").read_text() for one in drawing.sheets[1:]]
    assert all("Rows are depths: graphviz took longer than" in text for text in texts)


def test_names_are_text_in_every_picture_whatever_they_hold(tmp_path):
    hostile = '</svg><script>alert(1)</script>"\\N &amp; <b>\x01\x1b[31m\n\ufffe'
    dag = pipeline()
    for node in dag.nodes:
        node |= {"label": hostile, "op": f"aten::{hostile}", "module": f"{node['module']}.<x>"}
    path = dag.write(tmp_path / "dag")
    meta = json.loads((path / "meta.json").read_text()) | {"deployment": hostile, "strategy": "<TP2>"}
    (path / "meta.json").write_text(json.dumps(meta))
    draw(path, tmp_path / "views")
    for sheet in sheets(tmp_path / "views", "svg"):
        root = ET.parse(sheet).getroot()
        assert "{http://www.w3.org/2000/svg}script" not in {one.tag for one in root.iter()}, sheet.name
        said = "".join("".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text"))
        assert "<script>alert(1)</script>" in said.replace(" ", "").replace("\xa0", ""), sheet.name


def test_a_pipeline_of_the_other_tests_is_drawn_in_all_views(tmp_path):
    drawings = draw(pipeline(num_microbatches=3).write(tmp_path / "dag"), tmp_path / "views")
    assert [one.view for one in drawings] == list(VIEWS)
    by_view = {one.view: one for one in drawings}
    assert by_view["simplified"].num_nodes == by_view["comprehensive"].num_nodes == by_view["simplified"].num_total


def test_programs_that_told_nothing_are_drawn_in_all_views(tmp_path):
    alone = SmallDag()
    alone.node(after=[alone.node()])
    together = SmallDag(num_ranks=2)
    group = together.group(None, [0, 1])
    first = [together.node(rank=rank) for rank in (0, 1)]
    meeting = together.node("collective", -1, first, label="all-reduce", category="communication")
    for rank in (0, 1):
        together.meet(meeting, group, rank, (1, 2, 3))
    for name, dag in (("alone", alone), ("together", together)):
        drawings = draw(dag.write(tmp_path / name / "dag"), tmp_path / name / "views")
        assert {one.num_nodes for one in drawings[:2]} == {len(dag.nodes)}, "each node is stood for once"
        assert len(drawings) == len(VIEWS)
