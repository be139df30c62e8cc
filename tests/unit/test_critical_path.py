"""The critical path: it adds up to the step, is what networkx finds longest, and says what a person would say."""

from __future__ import annotations

import json
from io import StringIO
from itertools import pairwise

import networkx as nx
import numpy as np
import polars as pl
import pytest
from dag_source import DagSource, as_graph
from hypothesis import given, settings
from rich.console import Console
from small_dag import SmallDag
from timed_programs import timed_programs

from truedag.tracer.analysis.activities import Activities, list_activities
from truedag.tracer.analysis.critical_path import CriticalPath, find_critical_path, longest_delays
from truedag.tracer.analysis.critical_path_text import render_critical_path, summarise
from truedag.tracer.analysis.shares import measure_steps
from truedag.tracer.errors import GraphError
from truedag.tracer.graph import Graph


def weights(activities: Activities) -> np.ndarray:
    """What each edge adds: the pause and the own time of its head, less what its tail had not done yet."""
    src, dst = activities.src, activities.dst
    lag = np.minimum(activities.start_ns[dst] - activities.end_ns[src], 0)
    return (activities.end_ns - activities.ready_ns)[dst] + lag


def finish(activities: Activities, late: dict[int, int]) -> list[int]:
    """When each activity ends if some end later than they did: forward, each from what leads to it."""
    into: dict[int, list[tuple[int, int]]] = {}
    for src, dst, weight in zip(activities.src, activities.dst, weights(activities), strict=True):
        into.setdefault(int(dst), []).append((int(src), int(weight)))
    ends: list[int] = []
    for at, own in enumerate(activities.end_ns.tolist()):
        reached = max((ends[src] + weight for src, weight in into.get(at, [])), default=own)
        ends.append(reached + late.get(at, 0))
    return ends


@settings(max_examples=60, deadline=None)
@given(timed_programs())
def test_the_pieces_add_up_to_the_step_and_no_path_is_longer(dag: SmallDag) -> None:
    graph = as_graph(dag)
    path = find_critical_path(graph)
    (window,) = measure_steps(graph.nodes.collect(), graph.participants.collect()).values()
    assert (path.start_ns, path.end_ns) == window
    pieces = path.pieces
    if window[0] < window[1]:
        assert [pieces["start_ns"][0], *pieces["end_ns"]] == [*pieces["start_ns"], window[1]]
        assert pieces["start_ns"][0] == window[0]
    assert (pieces["start_ns"] < pieces["end_ns"]).all()
    assert path.length_ns == window[1] - window[0]
    assert path.total()["total_ns"].item() == path.length_ns
    activities = list_activities(graph, 0)
    assert (activities.src < activities.dst).all()
    network = nx.DiGraph()
    network.add_nodes_from(range(len(activities.node)), weight=0)
    for src, dst, weight in zip(activities.src.tolist(), activities.dst.tolist(), weights(activities), strict=True):
        network.add_edge(src, dst, weight=int(weight))
    for at in [at for at in network if not network.in_degree(at)]:
        network.add_edge("begin", at, weight=int(activities.end_ns[at]) - window[0])
    assert nx.dag_longest_path_length(network) == activities.end_ns.max() - window[0]


@settings(max_examples=40, deadline=None)
@given(timed_programs())
def test_an_activity_may_end_later_by_its_slack_and_not_by_more(dag: SmallDag) -> None:
    graph = as_graph(dag)
    activities = list_activities(graph, 0)
    slack = longest_delays(activities)
    assert finish(activities, {}) == activities.end_ns.tolist()
    last = max(activities.window_ns[1], *activities.end_ns.tolist())
    for at, delay in enumerate(slack.tolist()):
        assert delay >= 0
        assert max(finish(activities, {at: delay})) <= last
        assert max(finish(activities, {at: delay + 1})) == last + 1
    on_path = int(activities.end_ns.argmax())
    while on_path >= 0:
        assert slack[on_path] == last - activities.end_ns.max()
        on_path = int(activities.cause[on_path])


def spent(path: CriticalPath) -> list[tuple[str, int, int, int]]:
    return path.pieces.select("spent", "rank", "node", pl.col("end_ns") - pl.col("start_ns")).rows()


def order(dag: SmallDag, *nodes: int) -> None:
    for src, dst in pairwise(nodes):
        dag.edges.append({"src": src, "dst": dst, "kind": "order", "bytes": 0, "dtype": None, "shape": None})


def late_rank() -> tuple[SmallDag, list[int]]:
    """Rank 1 computes longer; both meet, and rank 0 goes on."""
    dag = SmallDag(num_ranks=2)
    group = dag.group("tp", [0, 1])
    early = dag.node(rank=0, time=(0, 100), op="aten::mm")
    slow = dag.node(rank=1, time=(20, 700), op="aten::sort")
    joint = dag.node("collective", -1, [early, slow], time=(110, 800), label="all-reduce tp", thread=-1)
    after = dag.node(rank=0, after=[joint], time=(830, 1000), op="aten::add")
    other = dag.node(rank=1, after=[joint], time=(790, 850), op="aten::add")
    dag.meet(joint, group, 0, (110, 710, 800))
    dag.meet(joint, group, 1, (710, 710, 780))
    order(dag, early, joint, after)
    order(dag, slow, joint, other)
    return dag, [early, slow, joint, after, other]


def test_it_goes_over_to_the_rank_that_was_waited_for() -> None:
    dag, (early, slow, joint, after, other) = late_rank()
    path = find_critical_path(as_graph(dag))
    assert spent(path) == [
        ("host", 1, slow, 20),
        ("compute", 1, slow, 680),
        ("host", 1, joint, 10),
        ("transfer", 0, joint, 90),
        ("host", 0, after, 30),
        ("compute", 0, after, 170),
    ]
    assert path.slack.rows() == [
        (early, 0, 600, None), (slow, 1, 0, None), (joint, 0, 0, 600), (joint, 1, 150, 0), (after, 0, 0, None),
        (other, 1, 150, None),
    ]  # fmt: skip
    (row,) = path.stragglers.iter_rows(named=True)
    assert (row["node"], row["rank"], row["late_ns"], row["waited_ns"]) == (joint, 1, 600, 600)
    assert (row["late_compute_ns"], row["late_host_ns"]) == (590, 10)
    assert (row["held_spent"], row["held_ns"], row["held_node"], row["held_op"]) == ("compute", 590, slow, "aten::sort")
    assert path.total("rank").rows() == [(1, 680, 0, 0, 30, 710), (0, 170, 90, 0, 30, 290)]


def test_a_root_that_was_done_before_the_last_came_waited_for_nobody() -> None:
    dag = SmallDag(num_ranks=2)
    group = dag.group("tp", [0, 1])
    joint = dag.node("collective", -1, time=(0, 900), op="c10d::broadcast_", thread=-1)
    after = dag.node(rank=0, after=[joint], time=(50, 1000))
    dag.meet(joint, group, 0, (0, 40, 40))
    dag.meet(joint, group, 1, (800, 800, 900))
    path = find_critical_path(as_graph(dag))
    assert spent(path) == [("transfer", 0, joint, 40), ("host", 0, after, 10), ("compute", 0, after, 950)]
    assert dict(path.slack.filter(node=joint).select("rank", "slack_ns").rows()) == {0: 0, 1: 100}


def queued(dag: SmallDag) -> list[int]:
    """A thread starts a collective that does not block, computes, and needs it at last."""
    group = dag.group("dp", [0])
    first = dag.node(time=(0, 10))
    joint = dag.node("collective", -1, [first], time=(60, 300), thread=-1)
    beside = dag.node(time=(12, 200))
    last = dag.node(after=[joint], time=(310, 400))
    dag.meet(joint, group, 0, (60, 60, 300))
    order(dag, first, joint)
    order(dag, first, beside, last)
    return [first, joint, beside, last]


def test_a_communication_that_was_not_begun_while_its_thread_went_on_waits_for_its_turn() -> None:
    dag = SmallDag()
    first, joint, _, last = queued(dag)
    assert spent(find_critical_path(as_graph(dag))) == [
        ("compute", 0, first, 10), ("waiting", 0, joint, 50), ("transfer", 0, joint, 240), ("host", 0, last, 10),
        ("compute", 0, last, 90),
    ]  # fmt: skip


class Told(DagSource):
    """A small graph with columns that a small graph lacks."""

    def __init__(
        self, dag: SmallDag, *, waited: list[int | None] | None = None, host: pl.DataFrame | None = None
    ) -> None:
        super().__init__(dag)
        if waited is not None:
            told = pl.Series("waited_ns", waited, pl.Int64)
            self.frames["participants"] = self.frames["participants"].with_columns(told)
        if host is not None:
            self.frames["nodes"] = pl.concat([self.frames["nodes"], host], how="horizontal")


@pytest.mark.parametrize(("waited", "cause"), [(90, "transfer"), (0, "host"), (150, "host")])
def test_what_began_after_a_wait_came_after_its_communication(waited: int, cause: str) -> None:
    """The last operator reads nothing of the collective; its thread stood still from 200 to 310."""
    dag = SmallDag()
    _, joint, beside, last = queued(dag)
    dag.edges = [edge for edge in dag.edges if (edge["src"], edge["dst"]) != (joint, last)]
    path = find_critical_path(Graph(Told(dag, waited=[waited])))
    if cause == "host":  # it did not wait, or longer than it stood still: not for this one
        assert spent(path)[-2:] == [("host", 0, last, 110), ("compute", 0, last, 90)]
        assert (beside, 0) in path.pieces.select("node", "rank").rows()
    else:
        assert spent(path)[2:] == [("transfer", 0, joint, 240), ("host", 0, last, 10), ("compute", 0, last, 90)]
        assert path.slack.filter(node=beside)["slack_ns"].item() == 100


def test_a_receive_that_was_waited_for_late_came_after_what_the_host_did_before() -> None:
    dag = SmallDag(num_ranks=2)
    group = dag.group("pp", [0, 1])
    posts = dag.node(rank=1, time=(0, 10))
    send = dag.node("send", 0, time=(5, 40))
    recv = dag.node("recv", 1, time=(12, 500))
    works = dag.node(rank=1, time=(20, 450))
    uses = dag.node(rank=1, after=[recv], time=(510, 600))
    dag.edges.append({"src": send, "dst": recv, "kind": "p2p", "bytes": 4, "dtype": "f", "shape": [1]})
    order(dag, posts, recv)
    order(dag, posts, works, uses)
    dag.meet(send, group, 0, (5, 12, 40))
    dag.meet(recv, group, 1, (12, 12, 500))
    path = find_critical_path(Graph(Told(dag, waited=[None, 20])))
    assert spent(path)[-5:] == [
        ("compute", 1, works, 430), ("host", 1, recv, 30), ("transfer", 1, recv, 20), ("host", 1, uses, 10),
        ("compute", 1, uses, 90),
    ]  # fmt: skip


def test_what_was_not_joined_is_waiting() -> None:
    dag = SmallDag(num_ranks=2)
    group = dag.group("tp", [0, 1])
    lone = dag.node("collective", 0, time=(10, 400))
    dag.node(after=[lone], time=(400, 500))
    dag.meet(lone, group, 0, (10, 10, 400))
    path = find_critical_path(as_graph(dag))
    assert path.total().row(0) == (100, 0, 390, 0, 490)


def test_a_part_of_the_ranks_waits_for_the_others_outside() -> None:
    dag, (early, _, joint, after, _) = late_rank()
    path = find_critical_path(as_graph(dag).subgraph(ranks=0))
    assert spent(path) == [
        ("compute", 0, early, 100), ("host", 0, joint, 10), ("waiting", 0, joint, 600), ("transfer", 0, joint, 90),
        ("host", 0, after, 30), ("compute", 0, after, 170),
    ]  # fmt: skip


def test_a_communication_whose_end_nobody_told_is_waited_for() -> None:
    dag, (_, _, _, after, _) = late_rank()
    for part in dag.participants:
        part["end_ns"] = None
    path = find_critical_path(as_graph(dag))
    assert spent(path)[-2:] == [("waiting", 0, after, 120), ("compute", 0, after, 170)]
    assert path.num_untimed == 1


def test_kernels_follow_their_calls_their_stream_and_their_data() -> None:
    """The host runs ahead, so that each kernel waits for the one before it; or the last call is late."""
    dag = SmallDag()
    one = dag.node(time=(10, 500), stream=7)
    two = dag.node(time=(505, 900), stream=7)
    three = dag.node(after=[two], time=(1210, 1300), stream=7)
    order(dag, one, two, three)
    ahead = pl.DataFrame({"host_start_ns": [0, 15, 30], "host_end_ns": [12, 25, 40]})
    assert spent(find_critical_path(Graph(Told(dag, host=ahead)))) == [
        ("host", 0, one, 10), ("compute", 0, one, 490), ("host", 0, two, 5), ("compute", 0, two, 395),
        ("host", 0, three, 310), ("compute", 0, three, 90),
    ]  # fmt: skip
    late = pl.DataFrame({"host_start_ns": [0, 15, 1190], "host_end_ns": [12, 25, 1205]})
    path = find_critical_path(Graph(Told(dag, host=late)))
    assert path.total().row(0) == (90, 0, 0, 1210, 1300)
    assert path.pieces["node"].unique(maintain_order=True).to_list() == [one, two, three]
    # The second kernel could have ended 305 later: the third's launch, not the stream, held it up.
    assert dict(path.slack.select("node", "slack_ns").rows()) == {one: 305, two: 305, three: 0}


def test_estimates_are_said_to_be() -> None:
    dag, _ = late_rank()
    assert not find_critical_path(as_graph(dag)).is_estimated
    for node in dag.nodes:
        node["timing"] = "estimated"
    assert find_critical_path(as_graph(dag)).is_estimated


def test_each_step_has_its_own_path_and_others_are_refused() -> None:
    dag = SmallDag()
    for step in (3, 4):
        first = dag.node(time=(1000 * step, 1000 * step + 10), step=step)
        order(dag, first, dag.node(after=[first], time=(1000 * step + 15, 1000 * step + 40), step=step))
    graph = as_graph(dag)
    assert [find_critical_path(graph, step).length_ns for step in (None, 3, 4)] == [40, 40, 40]
    assert find_critical_path(graph, 4).start_ns == 4000
    with pytest.raises(GraphError, match="step 5 is not in small; recorded steps: 3, 4"):
        find_critical_path(graph, 5)


def test_without_times_and_between_clocks_that_cannot_be_compared_there_is_none() -> None:
    dag = SmallDag()
    dag.node()
    with pytest.raises(GraphError, match="nothing in step 0 has a time"):
        find_critical_path(as_graph(dag))
    dag, _ = late_rank()
    for part in dag.participants:
        part["start_ns"] = None
    with pytest.raises(GraphError, match=r"ranks \[0, 1\] is unknown.*clocks cannot be compared"):
        find_critical_path(as_graph(dag))


@pytest.mark.parametrize(("errors", "expected"), [([200, 1000], 1200), ([None, 1000], None)])
def test_the_clocks_of_its_first_and_last_rank_bound_its_error(errors: list[int | None], expected: int | None) -> None:
    dag, _ = late_rank()
    source = DagSource(dag)
    source.frames["ranks"] = source.frames["ranks"].with_columns(clock_error_ns=pl.Series(errors, dtype=pl.Int64))
    assert find_critical_path(Graph(source)).error_ns == expected


def test_a_terminal_of_100_columns_shows_all_of_it() -> None:
    dag, _ = late_rank()
    path = find_critical_path(as_graph(dag))
    console = Console(width=100, record=True, file=StringIO())
    console.print(render_critical_path(path, title="small", top=1))
    shown = console.export_text()
    assert "small · step 0 · critical path 1.00 µs" in shown
    assert "transfer    90 ns    9.0 %" in shown
    assert "all-reduce tp" in shown
    assert "98 % compute" in shown
    assert "1 more" in shown  # rank 0, and operators
    assert "ESTIMATED" not in shown
    told = summarise(path, top=5)
    assert json.loads(json.dumps(told)) == told
    assert told["total"]["total_ns"] == told["length_ns"] == 1000
    assert [row["rank"] for row in told["by_rank"]] == [1, 0]
    assert told["longest"][0]["length_ns"] == 680
    assert told["stragglers"][0]["held_op"] == "aten::sort"
