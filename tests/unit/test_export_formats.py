"""Chakra, GraphML, node-link, Model Explorer and CSV hold what the graph holds; what is too much is refused."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import polars as pl
import pytest
from dag_source import as_graph
from protobuf_reader import every, first, read_packed, read_varint
from small_dag import SmallDag, pipeline

from truedag.tracer.errors import GraphError
from truedag.tracer.export import chakra, networks
from truedag.tracer.export.exporting import FORMATS, export
from truedag.tracer.graph import Graph


def quiet(_: str) -> None:
    """Nobody watches."""


def written(graph: Graph, to: str, tmp_path: Path, **options: object) -> Path:
    path = tmp_path / FORMATS[to].file
    export(graph, FORMATS[to], path, show=quiet, **options)
    return path


def data_edges(graph: Graph, rank: int) -> set[tuple[int, int]]:
    """The edges of data between what a rank did and took part in, straight from the tables."""
    own = set(graph.nodes.filter((pl.col("rank") == rank) & (pl.col("kind") == "compute")).collect()["node"])
    own |= set(graph.participants.filter(pl.col("rank") == rank).collect()["node"])
    edges = graph.edges.filter(pl.col("kind") == "data").select("src", "dst").collect()
    return {(src, dst) for src, dst in edges.iter_rows() if src in own and dst in own}


def messages(path: Path) -> list[bytes]:
    raw, at, found = path.read_bytes(), 0, []
    while at < len(raw):
        size, at = read_varint(raw, at)
        found.append(raw[at : at + size])
        at += size
    return found


def attributes(node: bytes) -> dict[str, object]:
    found = {}
    for attribute in every(node, 10):
        name = first(attribute, 1).decode()
        value = next(value for field in (7, 9, 13, 27, 29) if (value := first(attribute, field)) is not None)
        found[name] = value.decode() if isinstance(value, bytes) else value
    return found


def test_chakra_has_each_rank_with_its_dependencies(tmp_path: Path) -> None:
    graph = as_graph(pipeline())
    folder = written(graph, "chakra", tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["comm_groups.json", "trace.0.et", "trace.1.et"]
    assert json.loads((folder / "comm_groups.json").read_text()) == {"1": [0, 1], "2": [0, 1], "3": [0], "4": [1]}
    for rank in (0, 1):
        head, *nodes = messages(folder / f"trace.{rank}.et")
        assert first(head, 1) == b"0.0.4"
        found = {
            (src, first(node, 1)) for node in nodes for packed in every(node, 5) for src in read_packed(packed)
        }  # fmt: skip
        assert found == data_edges(graph, rank)
        numbers = [first(node, 1) for node in nodes]
        assert numbers == sorted(numbers)
        seen: set[int] = set()
        for number, node in zip(numbers, nodes, strict=True):
            assert all(src in seen for packed in every(node, 5) for src in read_packed(packed))
            seen.add(number)


def test_chakra_knows_communications_as_simulators_need_them(tmp_path: Path) -> None:
    folder = written(as_graph(pipeline(num_microbatches=1)), "chakra", tmp_path)
    talk = [node for node in messages(folder / "trace.0.et")[1:] if first(node, 3) in (5, 6, 7)]
    told = [(first(node, 3), first(node, 2).decode(), attributes(node)) for node in talk]
    assert [kind for kind, _, _ in told] == [7, 7, 5, 6, 7, 7, 7]
    by_label = {label: said for _, label, said in told}
    exchange = by_label["all-to-all ep"]
    assert (exchange["comm_type"], exchange["pg_name"], exchange["comm_size"]) == (6, "3", 32)
    assert exchange["is_cpu_op"] == 0
    send, receive = by_label["send pp"], by_label["receive pp"]
    assert [send[name] for name in ("comm_src", "comm_dst", "comm_tag", "comm_size")] == [0, 1, 0, 32]
    assert [receive[name] for name in ("comm_src", "comm_dst", "comm_tag")] == [1, 0, 0]
    assert by_label["all-reduce"]["comm_type"] == 0


def test_chakra_tells_messages_between_two_ranks_apart(tmp_path: Path) -> None:
    folder = written(as_graph(pipeline(num_microbatches=3)), "chakra", tmp_path)
    sent, received = [], []
    for rank in (0, 1):
        for node in messages(folder / f"trace.{rank}.et")[1:]:
            said = attributes(node)
            if "comm_tag" in said:
                (sent if first(node, 3) == 5 else received).append(
                    (said["comm_src"], said["comm_dst"], said["comm_tag"])
                )
    assert len(set(sent)) == len(sent) == 6
    assert sorted(sent) == sorted(received)


def test_chakra_does_not_say_whom_a_message_reaches_that_has_no_other_end(tmp_path: Path) -> None:
    graph = as_graph(pipeline(num_microbatches=1)).subgraph(ranks=[1])
    done = export(graph, FORMATS["chakra"], tmp_path / "chakra", show=quiet)
    assert done.counts["num_open_messages"] == 2
    told = {
        first(node, 3): {name: value for name, value in attributes(node).items() if name.startswith("comm_")}
        for node in messages(tmp_path / "chakra" / "trace.1.et")[1:]
        if first(node, 3) in (5, 6)
    }
    assert told == {5: {"comm_src": 1, "comm_size": 32}, 6: {"comm_dst": 1, "comm_size": 32}}


def test_chakra_times_are_those_of_the_operators_and_of_moving_data(tmp_path: Path) -> None:
    dag = SmallDag(num_ranks=2)
    group = dag.group("tp", [0, 1])
    one = dag.node(rank=0, time=(1_000, 8_500), flops=12)
    reduce = dag.node("collective", -1, (one,), time=(9_000, 30_000), label="all-reduce tp")
    dag.meet(reduce, group, 0, (9_000, 20_000, 30_000))
    dag.meet(reduce, group, 1, (20_000, 20_000, 29_000))
    other = dag.node("collective", -1, time=(31_000, 90_000), label="all-reduce tp")
    dag.meet(other, group, 0, (31_000, None, 90_000))  # nobody knows when the last came
    folder = written(as_graph(dag), "chakra", tmp_path)
    _, operator, meeting, unknown = messages(folder / "trace.0.et")
    assert (first(unknown, 6), first(unknown, 7)) == (None, None)
    assert "duration_ns" not in attributes(unknown)
    assert (first(operator, 6), first(operator, 7)) == (1, 8)
    assert (attributes(operator)["duration_ns"], attributes(operator)["num_ops"]) == (7_500, 12)
    assert (first(meeting, 6), first(meeting, 7)) == (20, 10)


def test_chakras_own_schema_reads_it(tmp_path: Path) -> None:
    schema = pytest.importorskip("chakra.schema.protobuf.et_def_pb2", reason="Chakra is not installed")
    graph = as_graph(pipeline())
    folder = written(graph, "chakra", tmp_path)
    for rank in (0, 1):
        head, *nodes = messages(folder / f"trace.{rank}.et")
        assert schema.GlobalMetadata.FromString(head).version == "0.0.4"
        read = [schema.Node.FromString(node) for node in nodes]
        for node in read:
            size = node.ByteSize()
            node.DiscardUnknownFields()
            assert node.ByteSize() == size, "a field that the schema does not have"
        assert {(src, node.id) for node in read for src in node.data_deps} == data_edges(graph, rank)
        kinds = {schema.NodeType.Name(node.type) for node in read}
        assert kinds == {"COMP_NODE", "COMM_COLL_NODE", "COMM_SEND_NODE", "COMM_RECV_NODE"}
        talk = [node for node in read if node.name == "all-to-all ep"]
        names = {attribute.name: attribute for attribute in talk[0].attr}
        assert schema.CollectiveCommType.Name(names["comm_type"].int64_val) == "ALL_TO_ALL"
        assert names["is_cpu_op"].WhichOneof("value") == "bool_val"
        assert read[0].inputs.shapes == "[[2, 4]]"


@pytest.mark.parametrize("fold", [None, "layer"])
def test_networkx_reads_graphml_back(tmp_path: Path, fold: str | None) -> None:
    graph = as_graph(pipeline())
    read = nx.read_graphml(written(graph, "graphml", tmp_path, fold=fold), node_type=int, force_multigraph=True)
    assert nx.is_directed_acyclic_graph(read)
    if fold is None:
        nodes = graph.nodes.collect()
        assert {node: read.nodes[node]["label"] for node in read} == dict(nodes.select("node", "label").iter_rows())
        assert read.nodes[0]["bytes_read"] == 0
        edges = graph.edges.select("src", "dst").collect()
        assert sorted((src, dst) for src, dst in read.edges()) == sorted(edges.iter_rows())
        assert {data["shape"] for *_, data in read.edges(data=True)} == {"2 4"}
    else:
        folded = graph.fold("layer")
        assert len(read) == len(folded.nodes) < graph.nodes.select(pl.len()).collect().item()
        assert sum(data["num_nodes"] for _, data in read.nodes(data=True)) == len(graph.nodes.collect())


@pytest.mark.parametrize("to", ["graphml", "node-link"])
def test_any_text_and_equal_edges_survive(tmp_path: Path, to: str) -> None:
    dag = SmallDag()
    one = dag.node(label='<a> & "b" \\ {} ü', module="x'y", flops=7)
    two = dag.node(after=(one, one), layer=3, module=None)
    path = written(as_graph(dag), to, tmp_path)
    if to == "graphml":
        read = nx.read_graphml(path, node_type=int)
    else:
        read = nx.node_link_graph(json.loads(path.read_text()), edges="links")
    assert (read.nodes[one]["label"], read.nodes[one]["module"]) == ('<a> & "b" \\ {} ü', "x'y")
    assert (read.nodes[one]["flops"], read.nodes[two]["layer"]) == (7, 3)
    assert {"layer", "module"} & set(read.nodes[one]) == {"module"}
    assert "module" not in read.nodes[two]
    assert [(src, dst, data["bytes"]) for src, dst, data in read.edges(data=True)] == [(one, two, 32)] * 2


def test_graphml_stays_xml_whatever_a_name_holds(tmp_path: Path) -> None:
    dag = SmallDag()
    dag.node(label="a\x00b\x1b")
    read = nx.read_graphml(written(as_graph(dag), "graphml", tmp_path), node_type=int)
    assert read.nodes[0]["label"] == "a\ufffdb\ufffd"


@pytest.mark.parametrize("to", ["graphml", "node-link"])
def test_more_rows_than_are_written_at_once_are_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    whole = written(as_graph(pipeline()), to, tmp_path).read_bytes()
    monkeypatch.setattr(networks, "_AT_ONCE", 5)
    assert written(as_graph(pipeline()), to, tmp_path, replace=True).read_bytes() == whole


def test_networkx_reads_node_link_back(tmp_path: Path) -> None:
    graph = as_graph(pipeline())
    data = json.loads(written(graph, "node-link", tmp_path, order=True).read_text())
    read = nx.node_link_graph(data, edges="links")
    assert read.number_of_nodes() == len(graph.nodes.collect())
    assert read.number_of_edges() == len(graph.edges.collect())
    assert read.graph["name"] == "small"


@pytest.mark.parametrize("fold", [None, "module"])
def test_model_explorer_nests_modules_under_ranks(tmp_path: Path, fold: str | None) -> None:
    collection = json.loads(written(as_graph(pipeline()), "model-explorer", tmp_path, fold=fold).read_text())
    (graph,) = collection["graphs"]
    assert collection["label"]
    ids = {node["id"] for node in graph["nodes"]}
    assert len(ids) == len(graph["nodes"])
    edges = [edge["sourceNodeId"] for node in graph["nodes"] for edge in node["incomingEdges"]]
    assert edges
    assert set(edges) <= ids
    spaces = {node["namespace"] for node in graph["nodes"]}
    assert "rank 0/forward/microbatch 0/decoder/layers/0/attention" in spaces
    assert all(node["label"] for node in graph["nodes"])
    assert all(isinstance(attr["value"], str) for node in graph["nodes"] for attr in node["attrs"])


def test_csv_holds_the_tables(tmp_path: Path) -> None:
    graph = Graph.open(pipeline().write(tmp_path / "dag"))
    pl.DataFrame({"node": []}, schema={"node": pl.Int64}).write_parquet(tmp_path / "dag" / "kernels.parquet")
    folder = written(graph, "csv", tmp_path)
    nodes = pl.read_csv(folder / "nodes.csv", infer_schema_length=None)
    expected = graph.nodes.collect()
    assert nodes["node"].to_list() == expected["node"].to_list()
    assert nodes["start_ns"].to_list() == expected["start_ns"].to_list()
    assert pl.read_csv(folder / "groups.csv")["ranks"].to_list() == ["0 1", "0 1", "0", "1"]
    assert pl.read_csv(folder / "edges.csv")["shape"].unique().to_list() == ["2 4"]


def test_too_much_is_refused_with_ways_out(tmp_path: Path) -> None:
    graph = as_graph(pipeline())
    with pytest.raises(GraphError, match=r"has 67 nodes .* about 10: choose .*--ranks.*--window.*--fold.*--max"):
        written(graph, "graphml", tmp_path, most=10)
    with pytest.raises(
        GraphError,
        match=r"slices .* about 10: choose fewer --ranks \(slices of a rank: about 60\), a --window of time; or raise",
    ):
        written(graph, "perfetto", tmp_path, most=10)
    assert list(tmp_path.iterdir()) == []
    assert written(graph, "graphml", tmp_path, most=60, fold="stage").exists()


@pytest.mark.parametrize("to", ["perfetto", "chakra", "graphml", "csv"])
def test_an_empty_part_is_refused_with_what_there_is(tmp_path: Path, to: str) -> None:
    graph = as_graph(pipeline())
    last = graph.nodes.select(pl.col("end_ns").max()).collect().item()
    for part in (graph.subgraph(steps=7), graph.subgraph(time_ns=(last + 5, last + 9))):
        with pytest.raises(GraphError, match=r"nothing in the part .* its steps are 0, a window lies between 0ms and"):
            written(part, to, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    graph = as_graph(pipeline())
    path = written(graph, "graphml", tmp_path)
    path.write_text("mine")
    with pytest.raises(GraphError, match=r"is there already: name another with --out, or replace it with --force"):
        written(graph, "graphml", tmp_path)
    assert path.read_text() == "mine"
    written(graph, "graphml", tmp_path, replace=True)
    assert path.read_text() != "mine"
    assert [one.name for one in tmp_path.iterdir()] == ["graph.graphml"]


def test_a_timeline_cannot_be_folded_and_an_unwritable_place_is_named(tmp_path: Path) -> None:
    graph = as_graph(pipeline())
    with pytest.raises(GraphError, match=r"perfetto is not a format of nodes and edges .* graphml, node-link"):
        written(graph, "perfetto", tmp_path, fold="layer")
    (tmp_path / "file").write_text("")
    with pytest.raises(GraphError, match="cannot write"):
        export(graph, FORMATS["chrome"], tmp_path / "file" / "x.json", show=quiet)


@pytest.mark.parametrize("to", ["perfetto", "chakra", "graphml", "csv"])
def test_estimates_are_counted_and_marked_in_the_file(tmp_path: Path, to: str) -> None:
    dag = pipeline(num_microbatches=1)
    dag.nodes[0]["timing"] = "estimated"
    path = tmp_path / FORMATS[to].file
    done = export(as_graph(dag), FORMATS[to], path, show=quiet)
    assert done.num_estimated == 1
    written = sorted(path.iterdir()) if FORMATS[to].is_folder else [path]
    assert any(b"estimated" in one.read_bytes() for one in written)


def test_what_has_no_time_is_counted(tmp_path: Path) -> None:
    dag = pipeline(num_microbatches=1)
    dag.node(rank=0)
    dag.participants[0]["arrive_ns"] = None
    done = export(as_graph(dag), FORMATS["perfetto"], tmp_path / "t", show=quiet)
    assert done.num_untimed == 2


def test_chakra_is_the_same_however_many_ranks_are_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = written(as_graph(pipeline()), "chakra", tmp_path / "one")
    monkeypatch.setattr(chakra, "_AT_ONCE", 1)
    apart = written(as_graph(pipeline()), "chakra", tmp_path / "two")
    names = ["comm_groups.json", "trace.0.et", "trace.1.et"]
    assert [(together / name).read_bytes() for name in names] == [(apart / name).read_bytes() for name in names]


def test_what_is_refused_offers_only_what_helps(tmp_path: Path) -> None:
    dag = SmallDag()
    dag.node()
    dag.node()
    with pytest.raises(GraphError, match=r"choose --fold module, layer or stage; or raise"):
        written(as_graph(dag), "graphml", tmp_path, most=1)
