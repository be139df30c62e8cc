"""The graph as a library: where it is read from, its parts and their borders, its way to other libraries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx as nx
import polars as pl
import pytest
import rustworkx
from dag_source import as_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from small_dag import SmallDag, pipeline

from truedag.tracer.errors import GraphError
from truedag.tracer.graph import TABLES, Graph


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline().write(tmp_path_factory.mktemp("graph") / "dag")


@pytest.fixture(scope="module")
def graph(folder: Path) -> Graph:
    return Graph.open(folder)


class InMemory:
    """A source of its own, which returns no more than it was asked for and remembers that."""

    def __init__(self, graph: Graph) -> None:
        self.path, self.meta = Path("nowhere"), graph.meta
        self.frames = {name: getattr(graph, name).collect() for name in TABLES}
        self.asked: list[tuple[str, frozenset[int] | None]] = []

    def scan(self, table: str, ranks: frozenset[int] | None = None) -> pl.LazyFrame:
        self.asked.append((table, ranks))
        frame = self.frames[table]
        if ranks is None or table in ("groups", "ranks"):
            return frame.lazy()
        met = self.frames["participants"].filter(pl.col("rank").is_in(list(ranks)))["node"]
        own = self.frames["nodes"].filter(pl.col("rank").is_in(list(ranks)))["node"]
        known = pl.concat([met, own]).implode()
        if table == "edges":
            return frame.filter(pl.col("src").is_in(known) | pl.col("dst").is_in(known)).lazy()
        return frame.filter(pl.col("node").is_in(known)).lazy()


def split(folder: Path, out: Path) -> Path:
    """The same dataset, its large tables partitioned by rank."""
    shutil.copytree(folder, out)
    nodes = pl.read_parquet(out / "nodes.parquet")
    owner = nodes.select("node", "rank")
    parts = {
        "nodes": nodes,
        "edges": pl.read_parquet(out / "edges.parquet").join(owner.rename({"node": "dst"}), on="dst"),
        "participants": pl.read_parquet(out / "participants.parquet"),
    }
    for name, frame in parts.items():
        (out / f"{name}.parquet").unlink()
        (out / name).mkdir()
        for (rank,), part in frame.group_by("rank"):
            told = part.drop("rank") if name == "edges" else part
            told.write_parquet(out / name / f"rank-{rank}.parquet")
    return out


def test_tables_may_be_files_or_folders_of_files(graph: Graph, folder: Path, tmp_path: Path) -> None:
    parted = Graph.open(split(folder, tmp_path / "dag"))
    for name in TABLES:
        found, expected = getattr(parted, name).collect(), getattr(graph, name).collect()
        # The merge writes edges in this order; a small graph of tests does not.
        assert found.equals(expected.sort("src", "dst", "kind") if name == "edges" else expected), name
    one, same = (whole.subgraph(ranks=1, phases="forward") for whole in (parted, graph))
    assert one.nodes.collect().equals(same.nodes.collect())
    assert one.edges.collect().equals(same.edges.collect().sort("src", "dst", "kind"))


def test_a_missing_table_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "dag")
    (tmp_path / "dag" / "edges.parquet").unlink()
    with pytest.raises(GraphError, match=r"lacks edges\.parquet"):
        Graph.open(tmp_path / "dag")
    (tmp_path / "dag" / "edges").mkdir()
    with pytest.raises(GraphError, match=r"lacks edges\.parquet"):
        Graph.open(tmp_path / "dag")
    with pytest.raises(GraphError, match=r"lacks kernels\.parquet"):
        Graph.open(folder).kernels.collect()


def test_frames_are_lazy_and_a_source_of_ones_own_is_asked_for_no_other_ranks(graph: Graph) -> None:
    source = InMemory(graph)
    part = Graph(source).subgraph(ranks=[1], layers=[1])
    assert all(isinstance(frame, pl.LazyFrame) for frame in (part.nodes, part.edges, part.border, part.participants))
    same = graph.subgraph(ranks=[1], layers=[1])
    source.asked.clear()
    for name in (*TABLES, "border"):
        assert getattr(part, name).collect().equals(getattr(same, name).collect()), name
    assert {ranks for _, ranks in source.asked} == {frozenset([1])}
    assert same.nodes.collect().height > 0


def rows(frame: pl.LazyFrame) -> set[tuple[Any, ...]]:
    return set(frame.select("src", "dst", "kind").collect().rows())


CUTS: Mapping[str, st.SearchStrategy[Any]] = {
    "ranks": st.sampled_from([1, [1], [0, 1]]),
    "layers": st.sampled_from([0, [0, -1], [1]]),
    "phases": st.sampled_from(["forward", ["forward", "optimizer"]]),
    "steps": st.sampled_from([0, [0, 1]]),
    "time_ns": st.tuples(st.integers(0, 3000), st.integers(3000, 9000)),
}


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.fixed_dictionaries({}, optional=dict(CUTS)), min_size=1, max_size=3))
def test_every_edge_is_inside_a_part_or_on_its_border_or_outside(graph: Graph, cuts: list[dict[str, Any]]) -> None:
    part = graph
    for cut in cuts:
        if cut.get("ranks") == [0, 1]:
            cut["ranks"] = part.ranks.collect()["rank"].to_list()  # those that an earlier cut has left
        part = part.subgraph(**cut)
    inside = set(part.nodes.collect()["node"].to_list())
    everything = graph.edges.select("src", "dst", "kind").collect().rows()
    assert rows(part.edges) == {row for row in everything if row[0] in inside and row[1] in inside}
    border = part.border.collect()
    assert set(border.filter(direction="in").select("src", "dst", "kind").rows()) == {
        row for row in everything if row[0] not in inside and row[1] in inside
    }
    assert set(border.filter(direction="out").select("src", "dst", "kind").rows()) == {
        row for row in everything if row[0] in inside and row[1] not in inside
    }
    known = set(graph.nodes.collect()["node"].to_list())
    assert set(border["src"]) | set(border["dst"]) <= known
    assert set(part.participants.collect()["node"]) <= inside
    assert part.whole.nodes.collect().height == len(known)
    assert part.nodes.collect()["node"].is_sorted()


def test_a_part_by_ranks_has_their_collectives_and_their_share_of_them() -> None:
    dag = SmallDag(num_ranks=3)
    both, rest = dag.group("tp", [0, 1]), dag.group("dp", [2])
    first = [dag.node(rank=rank, time=(0, 10)) for rank in range(3)]
    joint = dag.node("collective", -1, first[:2], time=(10, 20))
    alone = dag.node("collective", -1, first[2:], time=(10, 20))
    for node, group, ranks in ((joint, both, (0, 1)), (alone, rest, (2,))):
        for rank in ranks:
            dag.meet(node, group, rank, (10, 12, 20))
    part = as_graph(dag).subgraph(ranks=0)
    assert part.nodes.collect()["node"].to_list() == [first[0], joint]
    assert part.participants.collect().select("node", "rank").rows() == [(joint, 0)]
    assert part.groups.collect()["group"].to_list() == [both]
    assert part.ranks.collect()["rank"].to_list() == [0]
    assert part.border.collect().select("src", "dst", "direction").rows() == [(first[1], joint, "in")]


@pytest.mark.parametrize(
    ("cut", "said"),
    [({"ranks": [0, 7]}, "rank 7 is not in this graph"), ({"time_ns": (5, 4)}, "ends before it begins")],
)
def test_a_part_that_cannot_be_is_refused(graph: Graph, cut: dict[str, Any], said: str) -> None:
    with pytest.raises(GraphError, match=said):
        graph.subgraph(**cut)


def test_what_has_no_duration_is_in_the_part_of_its_moment() -> None:
    dag = SmallDag()
    for time in ((0, 10), (10, 10), (10, 20), None):
        dag.node(time=time)
    graph = as_graph(dag)
    assert graph.subgraph(time_ns=(10, 20)).nodes.collect()["node"].to_list() == [1, 2]
    assert graph.subgraph(time_ns=(0, 10)).nodes.collect()["node"].to_list() == [0]


def test_ancestors_make_a_part(graph: Graph) -> None:
    last = graph.nodes.filter(pl.col("kind") == "collective").collect()["node"].to_list()[-1]
    before = graph.ancestors(last)
    part = graph.subgraph(nodes=before)
    assert part.nodes.collect()["node"].to_list() == before
    assert (last,) in part.border.filter(pl.col("direction") == "out").select("dst").collect().rows()
    assert graph.between(before[0], last)[-1] == last
    assert set(before) == nx.ancestors(nx.DiGraph(graph.to_networkx(order=False)), last)
    assert graph.descendants(before[0])[-1] >= last


def test_networkx_and_rustworkx_hold_the_same_graph(graph: Graph) -> None:
    part = graph.subgraph(where=pl.col("node") % 3 != 1)  # its numbers have gaps
    network = part.to_networkx()
    assert network.number_of_nodes() == part.nodes.collect().height
    assert sorted((src, dst) for src, dst, _ in network.edges) == sorted(row[:2] for row in part.edges.collect().rows())

    fast = part.to_rustworkx()
    number = [payload["node"] for payload in fast.nodes()]
    assert number == sorted(network.nodes)
    told = sorted((number[src], number[dst], edge["kind"]) for src, dst, edge in fast.weighted_edge_list())
    assert told == sorted((src, dst, edge["kind"]) for src, dst, edge in network.edges(data=True))
    assert rustworkx.is_directed_acyclic_graph(fast)
    assert len(part.to_rustworkx(order=False).edge_list()) == part.to_networkx(order=False).number_of_edges()


def test_a_notebook_shows_what_is_in_it_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "dag")
    meta = json.loads((folder / "meta.json").read_text()) | {"deployment": "<script>alert(1)</script>"}
    (tmp_path / "dag" / "meta.json").write_text(json.dumps(meta))
    graph = Graph.open(tmp_path / "dag")
    shown = graph._repr_html_()
    assert "<script" not in shown
    assert f"{graph.nodes.collect().height:,} nodes" in shown
    assert "cut edges" not in shown
    part = graph.subgraph(layers=0)
    leads_in = part.border.filter(pl.col("direction") == "in").collect().height
    assert leads_in > 0
    assert f"{leads_in:,} lead in" in part._repr_html_()
    nothing = graph.subgraph(layers=99)._repr_html_()
    assert "0 nodes" in nothing


def test_a_class_graph_of_another_version_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "dag")
    meta = json.loads((tmp_path / "dag" / "meta.json").read_text())
    (tmp_path / "dag" / "meta.json").write_text(json.dumps({**meta, "form": "classes"}))
    with pytest.raises(GraphError, match=r"class graph of version None.*make it again with truedag dry"):
        Graph.open(tmp_path)


def test_a_graph_without_nodes_has_no_rank_classes(graph: Graph) -> None:
    classes = graph.subgraph(where=pl.col("node") < 0).rank_classes()
    assert classes.schema == graph.rank_classes().schema
    assert classes.is_empty()
