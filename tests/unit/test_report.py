"""The report: every number can be added up by hand, and what is unknown is not zero."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console
from small_dag import SmallDag, pipeline

from truedag.tracer.analysis.report import ExpertPlace, make_report, write_report
from truedag.tracer.analysis.spans import union
from truedag.tracer.errors import GraphError


def two_ranks() -> SmallDag:
    """Rank 0 computes 0-40 and 70-100; rank 1 computes 0-60. They all-reduce: from 40 and 60 on, data move 60-80.

    Rank 0: compute 0-40, waiting 40-60, transfer 60-70 (70-80 is behind compute), compute 70-100.
    Rank 1: compute 0-60, transfer 60-80, the host's 80-100.
    """
    dag = SmallDag(num_ranks=2)
    dag.stages = {0: 0, 1: 0}
    group = dag.group("tp", [0, 1])
    first = dag.node(rank=0, time=(0, 40), expert=0, layer=0)
    second = dag.node(rank=1, time=(0, 60), expert=1, layer=0)
    reduce = dag.node("collective", -1, (first, second), time=(40, 80), label="all-reduce tp")
    dag.meet(reduce, group, 0, (40, 60, 80))
    dag.meet(reduce, group, 1, (60, 60, 80))
    dag.node(rank=0, after=(reduce,), time=(70, 100), expert=0, layer=1)
    return dag


def test_the_shares_of_a_step_are_those_added_up_by_hand(tmp_path):
    report = make_report(two_ranks().write(tmp_path / "dag"))
    assert report.steps_ns == {0: 100}
    first, second = report.ranks
    assert (first.compute_ns, first.transfer_ns, first.waiting_ns, first.bubble_ns, first.host_ns) == (70, 10, 20, 0, 0)
    assert first.overlap_ns == 10
    assert (second.compute_ns, second.transfer_ns, second.waiting_ns, second.host_ns) == (60, 20, 0, 20)


def test_communication_is_counted_by_axis_with_waiting_apart_from_transfer(tmp_path):
    (total,) = make_report(two_ranks().write(tmp_path / "dag")).communications
    assert (total.axis, total.kind, total.num, total.num_groups, total.num_bytes) == ("tp", "all-reduce", 1, 1, 64)
    assert (total.wait_ns, total.transfer_ns, total.num_participants) == (20, 20 + 20, 2)


def test_a_message_counts_once_though_it_has_two_ends(tmp_path):
    report = make_report(pipeline(num_microbatches=3).write(tmp_path / "dag"))
    (messages,) = [one for one in report.communications if one.kind == "message"]
    assert (messages.axis, messages.num, messages.num_participants) == ("pp", 6, 12)


def test_an_unknown_end_makes_a_share_unknown_and_never_zero(tmp_path):
    dag = two_ranks()
    dag.participants[0]["end_ns"] = None
    report = make_report(dag.write(tmp_path / "dag"))
    assert report.ranks[0].compute_ns is None
    assert report.ranks[1].compute_ns == 60
    assert report.communications[0].transfer_ns is None
    assert report.communications[0].wait_ns == 20
    assert "unknown" in shown(report, 100)


def test_estimated_times_enter_no_measurement(tmp_path):
    dag = two_ranks()
    for node in dag.nodes:
        node["timing"] = "estimated"
    report = make_report(dag.write(tmp_path / "dag"))
    assert report.steps_ns == {}
    assert report.communications[0].transfer_ns is None
    assert all(one.compute_ns is None for one in report.ranks)
    assert "time of step unknown" in shown(report, 100)


def test_experts_are_placed_on_the_ranks_where_they_ran(tmp_path):
    report = make_report(two_ranks().write(tmp_path / "dag"))
    assert set(report.experts) == {
        ExpertPlace(layers=(0, 1), experts=(0,), ranks=(0,)),
        ExpertPlace(layers=(0,), experts=(1,), ranks=(1,)),
    }


def test_the_files_hold_what_was_returned(tmp_path):
    report = write_report(two_ranks().write(tmp_path / "dag"), tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["nodes"] == report.nodes == {"compute": 3, "collective": 1}
    assert stored["edges"] == {"data": 3}
    assert [one["compute_ns"] for one in stored["ranks"]] == [70, 60]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 0 | 0 | 70.0 % | 10.0 % | 20.0 % | 0.0 % | 0.0 % | 50.0 % |" in text


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_shows_whole_lines(tmp_path, width):
    report = make_report(two_ranks().write(tmp_path / "dag"))
    text = shown(report, width)
    assert max(map(len, text.splitlines())) <= width
    assert "70.0 %" in text
    assert "4 nodes: 3 compute, 1 collective" in text
    assert "\x1b" not in text


def test_a_missing_dataset_is_named(tmp_path):
    with pytest.raises(GraphError, match=r"no meta\.json"):
        make_report(tmp_path)


def test_spans_that_touch_or_overlap_are_joined():
    spans = np.array([[5, 9], [0, 2], [2, 3], [6, 7], [20, 20]], np.int64)
    assert union(spans).tolist() == [[0, 3], [5, 9]]


def shown(report, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(report.render())
    return out.getvalue()
