"""What drawings mark: estimates, counts that one rank gave for others, and what an audit found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import polars as pl
import pygraphviz
from small_dag import pipeline
from small_replicas import folded, replicas, with_places, write_with_places
from svg_texts import overhangs

from truedag.tracer.graph import Graph
from truedag.tracer.views.blocks import fold_blocks
from truedag.tracer.views.boxes import make_boxes
from truedag.tracer.views.draw import VIEWS, draw
from truedag.tracer.views.faults import RED, Faults
from truedag.tracer.views.legend import tell
from truedag.tracer.views.scope import MAX_NODES, find_scope
from truedag.tracer.views.ties import sort_ties


def head_of(dot: Path) -> str:
    """What a sheet's head says, its lines joined."""
    return " ".join(re.findall(r'^  "told .*?<TD ALIGN="LEFT">(.*?)</TD>', dot.read_text(), re.MULTILINE))


def test_counts_that_one_rank_gave_for_others_that_ran_are_marked():
    recorded, dry = with_places(replicas()), folded(with_places(replicas()))
    recorded._source.meta["num_nodes"] = MAX_NODES + 1
    assert [find_scope(one).is_folded for one in (recorded, dry)] == [True, True]
    for graph, about in ((recorded, "about "), (dry, "")):
        scope = find_scope(graph)
        blocks = fold_blocks(scope, alike=True)
        boxes = make_boxes(scope, blocks)
        said = tell(scope, blocks, boxes, sort_ties(blocks.fold.edges, boxes), is_part=False)[0]
        assert f"they stand for {about}" in said
        assert said.count("about") == (about != "")


def test_estimates_are_in_no_drawing_unmarked(tmp_path):
    shown = {}
    for timing in ("measured", "estimated"):
        dag = pipeline()
        for node in dag.nodes:
            node["timing"] = timing
        for drawing in draw(dag.write(tmp_path / timing / "dag"), tmp_path / timing / "views"):
            lines = [line for sheet in drawing.sheets for line, _ in overhangs(sheet)]
            shown[drawing.view, timing] = {line for line in lines if re.search(r"\d (ns|µs|ms|s)\b", line)}
    for view in VIEWS:
        assert shown[view, "measured"]
        assert {line for line in shown[view, "estimated"] if "est. " not in line} == set(), view
    assert any(line.startswith("est. wait ") for line in shown["detailed", "estimated"])


def test_what_an_audit_found_is_marked_and_leads_to_the_page(tmp_path):
    path = replicas().write(tmp_path / "dag")
    graph = Graph.open(path)
    faulty = graph.nodes.filter((pl.col("layer") == 1) & (pl.col("phase") == "forward")).head(1).collect()["node"][0]
    findings = [
        {"title": "a layer is not what it should be " + 40 * "x", "nodes": [], "ranks": [], "layers": [0]},
        {"title": "an operator is wrong", "nodes": [f"{faulty} (mm)"], "ranks": [0], "layers": [1]},
        {"title": "a GPU is missing", "nodes": [], "ranks": [9], "layers": []},
    ]
    plain = {one.view: one.dot.read_text() for one in draw(path, tmp_path / "plain")}
    for one in draw(path, tmp_path / "views", audit={"findings": findings}):
        assert RED not in plain[one.view]
        for sheet in one.sheets:
            dot = pygraphviz.AGraph(filename=str(sheet.with_suffix(".dot")))
            marked = [node for node in dot.nodes() if node.attr["color"] == RED and not node.startswith("gpu")]
            up = "../" * len(sheet.parent.relative_to(tmp_path / "views").parts)
            for node in marked:
                number = 1 if "an operator is wrong" in node.attr["label"] else 0
                assert f"finding {number + 1}" in node.attr["label"]
                way = f"{up}index.html#view=graph&select=finding.{number}"
                assert node.attr["URL"] == way or node.attr["URL"].startswith(up + "detailed/")
            if one.view == "simplified":
                assert marked
            if sheet.stem in VIEWS:
                said = head_of(sheet.with_suffix(".dot")).partition("no place of its own here: ")[2]
                assert "3. a GPU is missing" in said
    members = graph.nodes.select("node", "rank", "layer", box="node").collect()
    assert [one.number for one in Faults.of({"findings": findings}).on(members)[faulty]] == [1]


def test_a_sheet_says_that_red_frames_are_there_only_where_they_are(tmp_path):
    path = write_with_places(replicas(), tmp_path / "dag")
    weight = Graph.open(path).nodes.filter(pl.col("kind") == "parameter").collect()["node"][0]
    findings = [
        {"title": "a weight is wrong", "nodes": [f"{weight} (weight)"], "ranks": [0], "layers": [0]},
        {"title": "a layer is wrong", "nodes": [], "ranks": [], "layers": [0]},
    ]
    views = tmp_path / "views"
    draw(path, views, views=["simplified", "comprehensive"], audit={"findings": findings})
    assert "no place of its own here: 1. a weight is wrong." in head_of(views / "simplified.dot")
    heads = [head_of(views / "comprehensive" / f"stage-{stage}.dot") for stage in (0, 1)]
    assert ["Red frames" in head for head in heads] == [True, False]


def test_gpus_of_findings_are_red_on_the_map_and_those_that_recorded_nothing_are_there(tmp_path):
    path = write_with_places(replicas(), tmp_path / "dag")
    meta = json.loads((path / "meta.json").read_text()) | {"missing_ranks": [4, 5]}
    (path / "meta.json").write_text(json.dumps(meta))
    findings = [
        {"title": "two GPUs are missing", "nodes": [], "ranks": [4, 5], "layers": []},
        {"title": "a GPU is odd", "nodes": [], "ranks": [3], "layers": []},
        {"title": "all of them are slow", "nodes": [], "ranks": [0, 1, 2, 3, 4, 5], "layers": []},
    ]
    (one,) = draw(path, tmp_path / "views", views=["comprehensive"], audit={"findings": findings})
    dot = pygraphviz.AGraph(filename=str(one.dot))
    red = {str(node): node.attr["URL"] for node in dot.nodes() if node.attr["color"] == RED}
    way = "index.html#view=graph&select=finding."
    assert red == {"gpu4": f"{way}0", "gpu5": f"{way}0", "gpu3": f"{way}1", "class2": f"{way}1"}
    assert "recorded nothing" in dot.get_node("gpu4").attr["tooltip"]
    text = head_of(one.dot)
    assert "6 GPUs are drawn, all of them." in text
    assert "2 GPUs of these recorded nothing" in text
    assert "The audit also found, with no place of its own here: 3. all of them are slow." in text
