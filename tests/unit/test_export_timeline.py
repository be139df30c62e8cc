"""Timelines as Perfetto and Chrome read them: every slice, every arrow, nested as the formats want it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from dag_source import as_graph
from hypothesis import given, settings
from protobuf_reader import every, first, read_message
from small_dag import SmallDag, pipeline
from timed_programs import timed_programs

from truedag.tracer.errors import GraphError
from truedag.tracer.export import timeline
from truedag.tracer.export.chrome import write_chrome
from truedag.tracer.export.perfetto import write_perfetto, write_timelines
from truedag.tracer.export.timeline import Timeline, count_slices, list_timelines
from truedag.tracer.export.wire import fixed_column, message_column, number_column, number_field, varint, write_rows
from truedag.tracer.graph import Graph

NAMES = {3: "category", 4: "annotation", 9: "type", 10: "name", 11: "track", 47: "flow"}


def quiet(_: str) -> None:
    """Nobody watches."""


class Trace:
    """What a reader makes of a Perfetto trace: packets sorted by time, those of one moment as they lie in the file."""

    def __init__(self, raw: bytes) -> None:
        self.processes: dict[int, str] = {}
        self.threads: dict[int, tuple[int, str]] = {}
        self.slices: list[dict[str, object]] = []
        names: dict[int, dict[int, dict[int, str]]] = {}
        events: list[tuple[int, int, int, bytes]] = []
        for place, (field, packet) in enumerate(read_message(raw)):
            assert field == 1
            sequence = first(packet, 10)
            if (descriptor := first(packet, 60)) is not None:
                self._describe(descriptor)
            if (interned := first(packet, 12)) is not None:
                assert first(packet, 13) == 1
                names[sequence] = {}
                for kind, entry in read_message(interned):
                    names[sequence].setdefault(kind, {})[first(entry, 1)] = first(entry, 2).decode()
            if (event := first(packet, 11)) is not None:
                assert first(packet, 13) == 2
                assert sequence in names, "an event before the texts that it needs"
                events.append((first(packet, 8), place, sequence, event))
        stacks: dict[int, list[dict[str, object]]] = {}
        for time, _, sequence, event in sorted(events):
            said = dict(read_message(event))
            stack = stacks.setdefault(said[11], [])
            if said[9] == 2:
                stack.pop()["end"] = time
                continue
            known = names[sequence]
            arguments = {}
            for annotation in every(event, 4):
                key = known[3][first(annotation, 1)]
                number, text = first(annotation, 4), first(annotation, 17)
                arguments[key] = number if text is None else known[29][text]
            one = {
                "name": known[2][said[10]], "category": known[1][said[3]], "start": time, "depth": len(stack),
                "pid": self.threads[said[11]][0], "track": self.threads[said[11]][1], "flow": said.get(47), **arguments,
            }  # fmt: skip
            if stack:
                assert "end" not in stack[-1]
            stack.append(one)
            self.slices.append(one)
        assert not any(stacks.values()), "a slice that never ends"

    def _describe(self, descriptor: bytes) -> None:
        uuid = first(descriptor, 1)
        if (process := first(descriptor, 3)) is not None:
            self.processes[first(process, 1)] = first(process, 6).decode()
        if (thread := first(descriptor, 4)) is not None:
            self.threads[uuid] = first(thread, 1), first(thread, 5).decode()

    def arrows(self) -> list[tuple[str, int, str, int]]:
        """Each flow leads from one slice to the next that begins: name and process of both."""
        found, last = [], {}
        for one in self.slices:
            if one["flow"] is not None:
                if one["flow"] in last:
                    before = last[one["flow"]]
                    found.append((before["name"], before["pid"], one["name"], one["pid"]))
                last[one["flow"]] = one
        return found


def perfetto(graph: Graph, tmp_path: Path) -> Trace:
    path = tmp_path / "trace"
    write_perfetto(graph, path, quiet)
    return Trace(path.read_bytes())


def two_ranks() -> SmallDag:
    """An operator each; then an all-reduce that rank 0 waits for; a message from 1 to 0, posted before it was sent."""
    dag = SmallDag(num_ranks=2)
    tp, pp = dag.group("tp", [0, 1]), dag.group("pp", [0, 1])
    one = dag.node(rank=0, time=(0, 40), label="mm", flops=600, module="decoder.layers.3.mlp", layer=3)
    two = dag.node(rank=1, time=(0, 60), label="relu")
    reduce = dag.node("collective", -1, (one, two), time=(40, 80), label="all-reduce tp", category="communication")
    dag.meet(reduce, tp, 0, (40, 60, 80))
    dag.meet(reduce, tp, 1, (60, 60, 80))
    send = dag.node("send", 1, (reduce,), time=(80, 90), label="send pp", category="communication")
    dag.meet(send, pp, 1, (90, 90, 95))
    recv = dag.node("recv", 0, (), time=(80, 100), label="receive pp", category="communication")
    dag.meet(recv, pp, 0, (85, 90, 100))
    dag.edges.append({"src": send, "dst": recv, "kind": "p2p", "bytes": 32, "dtype": "float32", "shape": [2, 4]})
    dag.node(rank=0, after=(recv,), time=(100, 100), label="view_copy")
    return dag


def test_a_person_finds_each_rank_with_its_tracks_and_slices(tmp_path: Path) -> None:
    trace = perfetto(as_graph(two_ranks()), tmp_path)
    assert [name.split(" · ")[0] for name in trace.processes.values()] == ["rank 0", "rank 1"]
    seen = [(s["pid"], s["track"], s["name"], s["start"], s["end"], s["depth"]) for s in trace.slices]
    assert sorted(seen) == [
        (1, "pp communication", "receive pp", 85, 100, 0),
        (1, "pp communication", "transfer", 90, 100, 1),
        (1, "pp communication", "waiting", 85, 90, 1),
        (1, "thread 0", "mm", 0, 40, 0),
        (1, "thread 0", "view_copy", 100, 100, 0),
        (1, "tp communication", "all-reduce tp", 40, 80, 0),
        (1, "tp communication", "transfer", 60, 80, 1),
        (1, "tp communication", "waiting", 40, 60, 1),
        (2, "pp communication", "send pp", 90, 95, 0),
        (2, "pp communication", "transfer", 90, 95, 1),
        (2, "thread 0", "relu", 0, 60, 0),
        (2, "tp communication", "all-reduce tp", 60, 80, 0),
        (2, "tp communication", "transfer", 60, 80, 1),
    ]


def test_a_slice_says_what_the_graph_knows_of_it(tmp_path: Path) -> None:
    trace = perfetto(as_graph(two_ranks()), tmp_path)
    (mm,) = [one for one in trace.slices if one["name"] == "mm"]
    assert (mm["node"], mm["op"], mm["module"], mm["layer"]) == (0, "aten::compute", "decoder.layers.3.mlp", 3)
    assert (mm["flops"], mm["inputs"], mm["category"]) == (600, "float32[2,4]", "computation")
    assert "microbatch" not in mm
    assert "expert" not in mm
    reduces = [one for one in trace.slices if one["name"] == "all-reduce tp"]
    assert [(one["group"], one["send_bytes"]) for one in reduces] == [("0 1", 32)] * 2


def test_an_arrow_leads_to_who_arrives_later_and_from_a_send_to_its_receive(tmp_path: Path) -> None:
    trace = perfetto(as_graph(two_ranks()), tmp_path)
    assert trace.arrows() == [("all-reduce tp", 1, "all-reduce tp", 2), ("send pp", 2, "transfer", 1)]


@settings(max_examples=40, deadline=None)
@given(timed_programs())
def test_any_program_is_shown_whole(tmp_path_factory: pytest.TempPathFactory, dag: SmallDag) -> None:
    graph = as_graph(dag)
    if not any(row["end_ns"] is not None for row in dag.nodes if row["kind"] == "compute") and not dag.participants:
        return
    trace = perfetto(graph, tmp_path_factory.mktemp("trace"))
    operators = [row for row in dag.nodes if row["kind"] == "compute" and row["end_ns"] is not None]
    met = [row for row in dag.participants if row["arrive_ns"] is not None]
    outer = [one for one in trace.slices if one["name"] not in ("waiting", "transfer")]
    assert len(outer) == len(operators) + len(met)
    assert len(trace.slices) <= count_slices(graph)
    assert sum(one["end"] - one["start"] for one in outer if one["track"].startswith("thread")) == sum(
        row["end_ns"] - row["start_ns"] for row in operators
    )
    waited = sum(max(0, row["start_ns"] - row["arrive_ns"]) for row in met if row["start_ns"] is not None)
    assert sum(one["end"] - one["start"] for one in trace.slices if one["name"] == "waiting") == waited
    sizes = Counter(row["node"] for row in met)
    messages = sum(edge["kind"] == "p2p" for edge in dag.edges)
    collectives = {row["node"] for row in dag.nodes if row["kind"] == "collective"}
    chains = sum(size - 1 for node, size in sizes.items() if node in collectives)
    assert len(trace.arrows()) == chains + messages


def test_what_overlaps_goes_to_lanes_of_its_own(tmp_path: Path) -> None:
    dag = SmallDag()
    group = dag.group("dp", [0])
    for begin in (0, 10, 20, 60):
        node = dag.node("collective", -1, time=(begin, begin + 50), label="all-reduce dp", category="communication")
        dag.meet(node, group, 0, (begin, begin, begin + 50))
    trace = perfetto(as_graph(dag), tmp_path)
    tracks = [(one["start"], one["track"]) for one in trace.slices if one["name"] == "all-reduce dp"]
    assert tracks == [
        (0, "dp communication"), (10, "dp communication (2)"), (20, "dp communication (3)"), (60, "dp communication"),
    ]  # fmt: skip
    assert [one["depth"] for one in trace.slices if one["name"] == "transfer"] == [1] * 4


def test_what_is_not_known_of_a_communication_is_not_drawn(tmp_path: Path) -> None:
    dag = SmallDag(num_ranks=2)
    group = dag.group("tp", [0, 1])
    for times in ((10, None, 50), (60, 70, None)):
        node = dag.node("collective", -1, time=times[::2], label="all-reduce tp")
        dag.meet(node, group, 0, times)
    trace = perfetto(as_graph(dag), tmp_path)
    assert [(one["name"], one["start"], one["end"]) for one in trace.slices] == [
        ("all-reduce tp", 10, 50), ("all-reduce tp (end unknown)", 60, 70), ("waiting", 60, 70),
    ]  # fmt: skip


def test_estimates_say_that_they_are(tmp_path: Path) -> None:
    dag = two_ranks()
    for node in (0, 2):
        dag.nodes[node]["timing"] = "estimated"
    trace = perfetto(as_graph(dag), tmp_path)
    (mm,) = [one for one in trace.slices if one["name"].startswith("mm")]
    assert (mm["name"], mm["timing"]) == ("mm (estimated)", "estimated")
    assert all("timing" not in one for one in trace.slices if one["name"] == "relu")
    told = {one["name"] for one in trace.slices if one["track"] == "tp communication"}
    assert told == {"all-reduce tp (estimated)", "waiting (estimated)", "transfer (estimated)"}


def test_kernels_are_on_their_streams_and_calls_on_their_threads(tmp_path: Path) -> None:
    dag = SmallDag()
    dag.node(time=(30, 70), label="mm", stream=7, host_start_ns=10, host_end_ns=20)
    dag.node(time=(80, 90), label="fill_", stream=7, host_start_ns=25, host_end_ns=28)
    graph = as_graph(dag)
    source = graph._source
    hosts = pl.DataFrame({"node": [0, 1], "host_start_ns": [10, 25], "host_end_ns": [20, 28]})
    source.frames["nodes"] = source.frames["nodes"].join(hosts, on="node")
    source.frames["kernels"] = pl.DataFrame(
        {"node": [0, 0], "rank": [0, 0], "device": [0, 0], "stream": [7, 7], "name": ["gemm", "epilogue"],
         "kind": ["kernel"] * 2, "start_ns": [30, 60], "end_ns": [55, 70]}
    )  # fmt: skip
    trace = perfetto(graph, tmp_path)
    seen = [(one["track"], one["name"], one["start"], one["end"]) for one in trace.slices]
    assert sorted(seen) == [
        ("stream 7", "epilogue", 60, 70), ("stream 7", "fill_", 80, 90), ("stream 7", "gemm", 30, 55),
        ("thread 0", "fill_", 25, 28), ("thread 0", "mm", 10, 20),
    ]  # fmt: skip


def test_a_part_shows_its_ranks_alone(tmp_path: Path) -> None:
    trace = perfetto(as_graph(pipeline()).subgraph(ranks=[1]), tmp_path)
    assert set(trace.processes) == {2}
    assert {one["pid"] for one in trace.slices} == {2}


def test_a_graph_without_times_is_refused_with_the_way_out() -> None:
    dag = SmallDag()
    dag.node()
    with pytest.raises(GraphError, match=r"has a time: .*graphml, node-link, model-explorer, chakra, csv"):
        count_slices(as_graph(dag))


def test_chrome_shows_the_same(tmp_path: Path) -> None:
    graph = as_graph(two_ranks())
    write_chrome(graph, tmp_path / "trace.json", quiet)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    theirs = sorted((one["pid"] + 1, one["name"], one["ts"] * 1e3, (one["ts"] + one["dur"]) * 1e3) for one in complete)
    ours = sorted((one["pid"], one["name"], one["start"], one["end"]) for one in perfetto(graph, tmp_path).slices)
    assert [(pid, name) for pid, name, *_ in theirs] == [(pid, name) for pid, name, *_ in ours]
    assert np.allclose([one[2:] for one in theirs], [one[2:] for one in ours])
    (mm,) = [event for event in complete if event["name"] == "mm"]
    assert mm["args"]["module"] == "decoder.layers.3.mlp"
    arrows = sorted((e["id"], e["ph"], e["pid"]) for e in events if e["ph"] in "stf")
    assert [(mark, rank) for _, mark, rank in arrows] == [("f", 1), ("s", 0), ("f", 0), ("s", 1)]
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {"thread 0", "tp communication", "pp communication"}


def test_quotes_in_names_survive(tmp_path: Path) -> None:
    dag = SmallDag()
    dag.node(time=(0, 5), label='a "b" \\ {} ü', module="m{x}")
    write_chrome(as_graph(dag), tmp_path / "trace.json", quiet)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    (event,) = [event for event in events if event["ph"] == "X"]
    assert (event["name"], event["args"]["module"]) == ('a "b" \\ {} ü', "m{x}")
    assert perfetto(as_graph(dag), tmp_path).slices[0]["name"] == 'a "b" \\ {} ü'


def test_a_timeline_can_be_written_from_any_slices() -> None:
    (make,) = list_timelines(as_graph(two_ranks()))
    made = make()
    tracks = made.tracks.with_columns(pl.col("rank") + 5)
    file = BytesIO()
    counts = write_timelines(
        [lambda: Timeline(names={5: "five", 6: "six"}, tracks=tracks, slices=made.slices)], file, quiet
    )
    trace = Trace(file.getvalue())
    assert counts == {"num_slices": len(trace.slices)}
    assert trace.processes == {6: "five", 7: "six"}


def test_ranks_that_are_made_and_written_apart_are_the_same_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = as_graph(pipeline())
    together = perfetto(graph, tmp_path)
    monkeypatch.setattr(timeline, "_TOGETHER", 1)
    apart = perfetto(graph, tmp_path)
    monkeypatch.setattr(timeline, "_AT_ONCE", 1)
    read_apart = perfetto(graph, tmp_path)

    def told(trace: Trace) -> list[tuple[str, ...]]:
        return sorted(tuple(f"{key}={one[key]}" for key in sorted(one)) for one in trace.slices)

    assert len(list(list_timelines(graph))) == 2
    assert told(together) == told(apart) == told(read_apart)
    assert sorted(together.arrows()) == sorted(apart.arrows()) == sorted(read_apart.arrows())
    assert together.threads == apart.threads == read_apart.threads


def rows(values: list[int]) -> Iterator[memoryview]:
    column = np.array(values, np.uint64)
    parts = message_column(7, [number_field(1, 5), *number_column(2, column), *fixed_column(3, column)])
    return write_rows(parts, len(column))


@pytest.mark.parametrize("num_bits", range(1, 65))
def test_columns_of_numbers_are_read_back(num_bits: int) -> None:
    values = [0, 1, (1 << num_bits) - 1, 1 << num_bits - 1, 0x5A5A5A5A5A5A5A5A >> 64 - num_bits]
    raw = b"".join(rows(values))
    messages = [dict(read_message(message)) for field, message in read_message(raw) if field == 7]
    assert messages == [{1: 5, 2: value, 3: value} for value in values]


def test_a_varint_is_as_protobuf_says() -> None:
    assert varint(300) == b"\xac\x02"


def test_more_rows_than_are_written_at_once() -> None:
    values = list(range(40_000))
    found = [first(message, 2) for _, message in read_message(b"".join(rows(values)))]
    assert found == values
