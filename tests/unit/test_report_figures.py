"""The report's figures against those worked out by hand: a bubble, a straggler, an overlap, bandwidths, tokens."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import polars as pl
import pytest
from dag_source import DagSource, as_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from report_examples import META, gpipe, overlapping, prompts, report_of, three_steps
from small_dag import SmallDag
from timed_programs import timed_programs

from truedag.tracer.analysis.communications import bus_factor
from truedag.tracer.analysis.memory import count_bytes
from truedag.tracer.analysis.report import make_report
from truedag.tracer.analysis.report_text import write_markdown
from truedag.tracer.analysis.shares import RankSpans
from truedag.tracer.analysis.spread import Spread
from truedag.tracer.graph import Graph


@pytest.mark.parametrize(("num_microbatches", "num_stages"), [(2, 2), (4, 2), (4, 4), (1, 3)])
def test_the_bubble_of_a_pipeline_is_what_the_formula_says(num_microbatches: int, num_stages: int) -> None:
    report = report_of(gpipe(num_microbatches, num_stages, 10))
    slots = num_microbatches + num_stages - 1
    assert report.steps_ns == {0: 2 * slots * 10}
    for one in report.ranks:
        assert one.bubble_ns == 2 * (num_stages - 1) * 10
        assert (one.compute_ns, one.transfer_ns, one.waiting_ns) == (2 * num_microbatches * 10, 0, 0)
        assert one.host_ns == 0
        assert one.fractions is not None
        assert one.fractions[3] == pytest.approx((num_stages - 1) / slots)


def test_waiting_for_the_own_stage_is_no_bubble_and_for_another_is() -> None:
    dag = SmallDag(num_ranks=4)
    dag.stages = {0: 0, 1: 0, 2: 1, 3: 1}
    tp, pp = dag.group("tp", [0, 1]), dag.group("pp", [0, 2])
    for rank in range(4):
        dag.node(rank=rank, time=(0, 10))
        dag.node(rank=rank, time=(95, 100))
    for group, ranks, begin in ((tp, (0, 1), 10), (pp, (0, 2), 50)):
        node = dag.node("collective", -1, time=(begin, begin + 30), label="all-reduce x")
        for rank, arrive in zip(ranks, (begin, begin + 20), strict=True):
            dag.meet(node, group, rank, (arrive, begin + 20, begin + 30))
    first = report_of(dag).ranks[0]
    assert (first.compute_ns, first.transfer_ns, first.waiting_ns, first.bubble_ns, first.host_ns) == (
        15,
        20,
        20,
        20,
        25,
    )


def test_a_message_within_a_stage_keeps_nobody_in_a_bubble() -> None:
    dag = SmallDag(num_ranks=3)
    dag.stages = {0: 0, 1: 0, 2: 1}
    world = dag.group("pp", [0, 1, 2])
    send = dag.node("send", 0, time=(20, 20), label="send pp")
    dag.meet(send, world, 0, (20, 20, 20))
    recv = dag.node("recv", 1, time=(0, 20), label="receive pp")
    dag.meet(recv, world, 1, (0, 20, 20))
    dag.edges.append({"src": send, "dst": recv, "kind": "p2p", "bytes": 8, "dtype": "float32", "shape": [2]})
    for rank in range(3):
        dag.node(rank=rank, time=(20, 30))
    second = report_of(dag).ranks[1]
    assert (second.waiting_ns, second.bubble_ns, second.compute_ns) == (20, 0, 10)


def test_a_receive_that_was_posted_early_makes_nobody_wait_before_the_program_does() -> None:
    dag = SmallDag(num_ranks=2)
    group = dag.group("dp", [0, 1])
    send = dag.node("send", 1, time=(90, 95), label="send dp")
    dag.meet(send, group, 1, (90, 90, 95))
    recv = dag.node("recv", 0, time=(0, 95), label="receive dp")
    dag.meet(recv, group, 0, (0, 90, 95))
    dag.edges.append({"src": send, "dst": recv, "kind": "p2p", "bytes": 8, "dtype": "float32", "shape": [2]})
    dag.node(rank=0, time=(0, 40))
    dag.node(rank=1, time=(0, 90))
    graph = as_graph(dag)
    frames = graph._source.frames
    graph._source.meta = META | {"world_size": 2}
    unseen = make_report(graph).ranks[0]
    assert (unseen.waiting_ns, unseen.host_ns) == (50, 0)
    # The program was 20 ns inside of the wait: 75 to 95; from 40 to 75 it did something else.
    frames["participants"] = frames["participants"].with_columns(waited_ns=pl.Series([None, 20], dtype=pl.Int64))
    seen = make_report(graph).ranks[0]
    assert (seen.compute_ns, seen.waiting_ns, seen.transfer_ns, seen.host_ns) == (40, 15, 5, 35)


def test_an_overlap_is_told_as_hidden_and_the_rest_as_exposed() -> None:
    report = report_of(overlapping())
    first, second = report.ranks
    assert (first.compute_ns, first.transfer_ns, first.overlap_ns, first.host_ns) == (40, 20, 20, 10)
    assert (second.compute_ns, second.transfer_ns, second.overlap_ns) == (30, 40, 0)
    (total,) = report.communications
    assert (total.transfer_ns, total.exposed_ns, total.hidden_ns) == (80, 60, 20)


def test_bandwidth_is_that_of_nccl_tests() -> None:
    (total,) = report_of(overlapping()).communications
    assert total.algorithm_bytes_per_s == pytest.approx(4000 / 40e-9)
    assert total.bus_bytes_per_s == pytest.approx(4000 / 40e-9 * 2 * (2 - 1) / 2)
    assert bus_factor("all-reduce", 8) == pytest.approx(1.75)
    assert bus_factor("all-gather", 8) == bus_factor("reduce-scatter", 8) == bus_factor("all-to-all", 8) == 0.875
    assert bus_factor("broadcast", 8) == bus_factor("message", 8) == 1
    assert bus_factor("barrier", 8) is None


@pytest.mark.parametrize("kind", ["gather", "scatter"])
def test_the_size_of_a_rooted_exchange_is_what_its_root_has(kind: str) -> None:
    dag = SmallDag(num_ranks=4)
    group = dag.group("tp", range(4))
    node = dag.node("collective", -1, time=(0, 10), label=f"{kind} tp")
    for rank in range(4):
        many = 400 if rank == 0 else 0
        sent, received = (100, many) if kind == "gather" else (many, 100)
        dag.meet(node, group, rank, (0, 0, 10), send_bytes=sent, recv_bytes=received)
    (total,) = report_of(dag).communications
    assert total.algorithm_bytes_per_s == pytest.approx(400 / 10e-9)
    assert total.bus_bytes_per_s == pytest.approx(400 / 10e-9 * 3 / 4)


def test_messages_that_were_not_matched_count_each() -> None:
    dag = SmallDag(num_ranks=2)
    group = dag.group("pp", [0, 1])
    ends = [dag.node("send", 0, label="send pp"), dag.node("recv", 1, label="receive pp")]
    alone = [dag.node("send", 0, label="send pp"), dag.node("recv", 1, label="receive pp")]
    for node in (*ends, *alone):
        dag.meet(node, group, int(dag.nodes[node]["rank"]), (None, None, None))
    dag.edges.append({"src": ends[0], "dst": ends[1], "kind": "p2p", "bytes": 8, "dtype": "float32", "shape": [2]})
    (total,) = report_of(dag).communications
    assert total.num == 3


def test_a_gathers_size_is_what_all_ranks_give_together() -> None:
    dag = SmallDag(num_ranks=4)
    group = dag.group("tp", range(4))
    for begin, span in ((0, 10), (100, 50)):
        node = dag.node("collective", -1, time=(begin, begin + span), label="all-gather tp")
        for rank in range(4):
            dag.meet(node, group, rank, (begin, begin, begin + span), send_bytes=100, recv_bytes=400)
    (total,) = report_of(dag).communications
    assert total.algorithm_bytes_per_s == pytest.approx(800 / 60e-9)
    assert total.bus_bytes_per_s == pytest.approx(800 / 60e-9 * 3 / 4)
    assert total.median_bus_bytes_per_s == pytest.approx((400 / 10e-9 + 400 / 50e-9) / 2 * 3 / 4)


def test_who_is_late_is_named_with_the_operators_that_made_it_so() -> None:
    dag = SmallDag(num_ranks=3)
    group = dag.group("dp", range(3))
    ends = []
    for rank, (matmul, norm) in enumerate(((30, 10), (30, 10), (80, 12))):
        first = dag.node(rank=rank, time=(0, matmul), op="aten::mm", label="mm")
        ends.append(dag.node(rank=rank, after=(first,), time=(matmul, matmul + norm), op="aten::norm", label="norm"))
    reduce = dag.node("collective", -1, ends, time=(40, 100), label="all-reduce dp")
    for rank, arrive in enumerate((40, 40, 92)):
        dag.meet(reduce, group, rank, (arrive, 92, 100))
    first, *others = report_of(dag).stragglers
    assert (first.rank, first.num_last, first.waited_ns, first.late_for) == (2, 1, 104, "compute")
    assert (first.compute_ns, first.excess_ns) == (92, 52)
    assert [(slow.op, slow.num, slow.excess_ns) for slow in first.slow] == [("aten::mm", 1, 50), ("aten::norm", 1, 2)]
    assert [(one.num_last, one.excess_ns, one.slow) for one in others] == [(0, 0, ()), (0, 0, ())]


def test_the_critical_path_adds_up_to_the_steps() -> None:
    report = report_of(gpipe(4, 2, 10))
    path = report.critical_path
    assert path.length_ns == sum(report.steps_ns.values()) == sum(path.by_kind.values())
    assert path.by_kind["compute"] == 100
    assert [(row["op"], row["total_ns"], row["compute_ns"]) for row in path.by_op] == [("aten::compute", 100, 100)]
    # Of what overlaps only what was waited for is on the path.
    path = report_of(overlapping()).critical_path
    assert path.by_kind == {"compute": 30, "transfer": 40, "waiting": 0, "host": 0}
    assert {row["op"]: row["total_ns"] for row in path.by_op} == {"aten::compute": 30, "aten::collective": 40}


def test_flops_are_told_with_their_convention() -> None:
    dag = SmallDag()
    dag.node(time=(0, 40), phase="forward", flops=1000)
    dag.node(time=(40, 80), phase="backward", flops=1000)  # computed again
    dag.node(time=(80, 100), phase="backward", flops=2000)
    done = report_of(dag, peak_flops_per_s=1e11).throughput
    assert (done.flops, done.model_flops) == (4000, 3000)
    assert done.flops_per_s == pytest.approx(4000 / 100e-9)
    assert (done.mfu, done.hfu) == (pytest.approx(0.3), pytest.approx(0.4))
    assert report_of(dag).throughput.mfu is None
    dag.nodes.pop()
    dag.nodes.pop()
    assert report_of(dag).throughput.model_flops == 1000


def test_what_runs_between_steps_and_steps_that_overlap_do_not_raise_the_rate() -> None:
    dag = SmallDag()
    told = {"op": "aten::embedding", "phase": "forward", "inputs": "float32[128,16] int64[2,8]"}
    for step, span in ((0, (0, 100)), (1, (50, 150)), (-1, (150, 200)), (2, (200, 250))):
        dag.node(time=span, flops=1000, step=step, **told)
    done = report_of(dag).throughput
    assert (done.flops, done.num_tokens) == (3000, 48)
    assert done.flops_per_s == pytest.approx(3000 / 200e-9)
    assert done.tokens_per_s == pytest.approx(48 / 200e-9)


def test_tokens_and_how_long_they_took() -> None:
    dag = prompts()
    source = DagSource(dag)
    source.meta = META | {"world_size": 2}
    source.frames["ranks"] = source.frames["ranks"].with_columns(tp=pl.Series([0, 1], dtype=pl.Int32))
    report = make_report(Graph(source))
    first, second = report.generations
    assert (first.num_prompts, first.num_prompt_tokens, first.first_token_ns, first.output_token_ns) == (2, 16, 90, 100)
    assert (second.num_prompts, second.num_prompt_tokens, second.first_token_ns) == (1, 16, 170)
    assert second.output_token_ns == 60
    assert report.throughput.num_tokens == 16 + 16 + 3 + 3
    assert report.throughput.tokens_per_s == pytest.approx(38 / 290e-9)
    assert report.throughput.tokens_per_s_per_rank == pytest.approx(38 / 290e-9 / 2)


def test_the_load_of_experts_is_the_rows_of_their_first_product() -> None:
    dag = SmallDag(num_ranks=2)
    for expert in range(4):
        dag.node("parameter", expert // 2, layer=3, expert=expert)
    for microbatch, counts in enumerate(((5, 0, 1), (3, 0, 1))):
        for expert, rows in enumerate(counts):
            told = {"layer": 3, "expert": expert, "microbatch": microbatch, "rank": expert // 2}
            dag.node(**told, op="aten::mm", flops=rows, inputs=f"float32[{rows},8] float32[8,4]", phase="forward")
            dag.node(**told, op="aten::mm", flops=rows, inputs=f"float32[{rows},4] float32[4,8]", phase="forward")
            dag.node(**told, op="aten::mm", flops=99, inputs="float32[77,4] float32[4,8]", phase="backward")
    (load,) = report_of(dag).expert_loads
    assert load.tokens == {0: 8, 1: 0, 2: 2, 3: 0}
    assert (load.busiest, load.num_idle, load.imbalance) == (0, 2, 3.2)


def test_memory_is_what_is_there_and_what_is_still_to_be_read() -> None:
    dag = SmallDag()
    weight = dag.node("parameter", outputs="float32[100]")
    state = dag.node("input", outputs="bfloat16[50] int64[]")
    one = dag.node(after=(weight,), time=(0, 1), label="a")
    two = dag.node(after=(one, state), time=(1, 2), label="b", phase="forward")
    three = dag.node(after=(two,), time=(2, 3), label="c")
    four = dag.node(after=(one,), time=(3, 4), label="d")
    sizes = {(one, two): 1000, (one, four): 300, (two, three): 500, (weight, one): 400, (state, two): 100}
    for edge in dag.edges:
        edge["bytes"] = sizes[edge["src"], edge["dst"]]
    (memory,) = report_of(dag).memory
    assert (memory.parameter_bytes, memory.state_bytes) == (400, 108)
    # After b: a's 1000 are just being read, b's 500 are there.
    assert (memory.live_bytes, memory.peak_node, memory.peak_label, memory.peak_phase) == (1500, two, "b", "forward")


@pytest.mark.parametrize(
    ("types", "expected"),
    [("float32[2,4]", 32), ("bfloat16[3] bool[5]", 11), ("int64[]", 8), ("float8_e4m3fn[7]", 7), ("complex64[2]", 16),
     ("float32[0,512]", 0), ("", 0)],
)  # fmt: skip
def test_bytes_follow_from_types(types: str, expected: int) -> None:
    assert count_bytes(types) == expected


def test_several_steps_are_told_as_distributions() -> None:
    report = report_of(three_steps())
    assert report.steps_ns == {0: 10, 1: 20, 2: 60}
    assert report.step_spread == Spread(num=3, least=10, median=20, p90=52, most=60, mean=30)
    assert [one.compute_ns for one in report.ranks] == [90, 45]
    assert [(one.step, one.rank, one.compute_ns, one.host_ns) for one in report.ranks_by_step if one.rank] == [
        (0, 1, 5, 5), (1, 1, 10, 10), (2, 1, 30, 30),
    ]  # fmt: skip
    text = write_markdown(report)
    assert "| step time | 10 ns | 20 ns | 30 ns | 52 ns | 60 ns |" in text
    assert "| compute | 50.0 % | 75.0 % | 75.0 % | 100.0 % | 100.0 % |" in text
    assert report.critical_path.length_ns == 90


@settings(max_examples=40, deadline=None)
@given(timed_programs())
def test_shares_add_up_to_the_step_whatever_ran(dag: SmallDag) -> None:
    report = report_of(dag)
    for one in report.ranks:
        if one.parts is not None:
            assert sum(one.parts) == sum(report.steps_ns.values())
            assert min(one.parts) >= 0
    for one in report.ranks_by_step:
        assert one.parts is not None
        assert sum(one.parts) == report.steps_ns[one.step]


spans = st.lists(st.tuples(st.integers(-5, 60), st.integers(0, 20)), max_size=6).map(
    lambda pairs: np.array([(begin, begin + size) for begin, size in pairs], np.int64).reshape(-1, 2)
)


@given(spans, spans, spans, spans, st.booleans())
def test_a_moment_counts_once_as_the_first_that_it_is(compute, transfer, waiting, bubble, is_staged) -> None:
    low, high = 3, 47
    split = RankSpans(compute=compute, transfer=transfer, waiting=waiting, bubble=bubble, is_staged=is_staged).split(
        low, high
    )
    kinds = [
        next((place for place, kind in enumerate((compute, transfer, waiting, bubble))
              if any(begin <= moment < end for begin, end in kind)), 4)
        for moment in range(low, high)
    ]  # fmt: skip
    if is_staged:
        active = [place for place, kind in enumerate(kinds) if kind < 4]
        first, last = (active[0], active[-1]) if active else (len(kinds), -1)
        kinds = [3 if kind == 4 and not first <= place <= last else kind for place, kind in enumerate(kinds)]
    assert split[:5] == tuple(kinds.count(kind) for kind in range(5))
    hidden = sum(
        any(begin <= moment < end for begin, end in compute) and any(begin <= moment < end for begin, end in transfer)
        for moment in range(low, high)
    )
    assert split[5] == hidden


def test_a_graph_without_times_is_told_as_far_as_it_is_known() -> None:
    dag = SmallDag(num_ranks=2)
    weight = dag.node("parameter", outputs="float32[100]")
    dag.node(after=(weight,), flops=100, phase="forward")
    group = dag.group("tp", [0, 1])
    reduce = dag.node("collective", -1, label="all-reduce tp")
    for rank in (0, 1):
        dag.meet(reduce, group, rank, (None, None, None), send_bytes=10)
    report = report_of(dag, peak_flops_per_s=1e9)
    assert report.steps_ns == {}
    assert report.step_spread is None
    assert (report.throughput.flops, report.throughput.mfu) == (100, None)
    (total,) = report.communications
    assert (total.num, total.num_bytes, total.transfer_ns, total.bus_bytes_per_s) == (1, 20, None, None)
    assert report.critical_path.reason == "nothing has a measured time"
    assert report.memory[0].parameter_bytes == 400
    assert "unknown" in write_markdown(report)
    assert json.dumps(asdict(report))


def test_estimates_are_in_no_figure_and_that_is_said() -> None:
    dag = gpipe(2, 2, 10)
    for node in dag.nodes:
        node["timing"] = "estimated"
        node["flops"] = 100
    report = report_of(dag, peak_flops_per_s=1e9)
    assert (report.is_estimated, report.num_estimated) == (True, len(dag.nodes))
    assert report.steps_ns == {}
    (total,) = report.communications
    assert (total.num, total.num_bytes > 0) == (4, True)
    assert (total.wait_ns, total.transfer_ns, total.algorithm_bytes_per_s) == (None, None, None)
    assert (report.throughput.flops_per_s, report.throughput.mfu) == (None, None)
    assert {one.waited_ns for one in report.stragglers} == {None}
    assert f"ESTIMATED: the times of {len(dag.nodes)} nodes are estimates" in write_markdown(report)
    assert "| MFU | unknown: the steps have no measured time |" in write_markdown(report)
    # One estimate among measurements: the path would lead through it.
    dag = three_steps()
    dag.nodes[1]["timing"] = "estimated"
    report = report_of(dag)
    assert report.steps_ns == {0: 10, 1: 20, 2: 60}
    assert report.critical_path.reason == "some times are estimates: truedag critical-path shows what they come to"
    assert [one.parts is None for one in report.ranks] == [False, True]
