"""The tables of a trace tell what was recorded."""

from pathlib import Path

import polars as pl
import pytest
import torch
import torch.distributed as dist

from truedag.tracer import annotate
from truedag.tracer.record.columns import table
from truedag.tracer.record.recording import RecorderName, record
from truedag.tracer.record.trace import Trace, read_trace


@pytest.fixture(params=["native", "python"])
def trace(request: pytest.FixtureRequest, tmp_path: Path) -> Trace:
    recorder: RecorderName = request.param
    model = torch.nn.Linear(3, 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with record(tmp_path / "rank-00000.trace", recorder=recorder, watch=[("model", model)]):
            with annotate.scope(step=4, microbatch=1, phase="forward"):
                out = model(torch.ones(5, 3))
            out.sum().backward()
            dist.broadcast(torch.ones(7), 0)
            torch.eye(3).to_sparse()
    finally:
        dist.destroy_process_group()
    return read_trace(tmp_path / "rank-00000.trace")


def test_events_say_what_ran_where(trace: Trace) -> None:
    events = table(trace, "events")
    assert events["event"].to_list() == list(range(sum(len(thread.events) for thread in trace.threads)))
    (linear,) = events.filter(pl.col("op") == "aten::addmm").rows(named=True)
    said = {name: linear[name] for name in ("module", "step", "microbatch", "phase", "in_backward", "comm", "group")}
    assert said == {
        "module": "model",
        "step": 4,
        "microbatch": 1,
        "phase": "forward",
        "in_backward": False,
        "comm": None,
        "group": None,
    }
    backward = events.filter("in_backward", pl.col("op") == "aten::mm")
    assert len(backward) == 1
    assert backward["module"].to_list() == [None]
    assert backward["backward_sequence"].to_list() == [linear["sequence"]]
    assert (events["end_ns"] >= events["start_ns"]).all()


def test_tensors_say_what_went_in_and_came_out(trace: Trace) -> None:
    tensors = table(trace, "tensors").join(table(trace, "events").select("event", "op"), on="event")
    linear = tensors.filter(pl.col("op") == "aten::addmm").sort("role", "arg")
    assert linear["role"].to_list() == ["input"] * 3 + ["output"]
    assert linear["arg"].to_list() == [0, 1, 2, 0]
    assert linear["shape"].to_list() == [[2], [5, 3], [3, 2], [5, 2]]
    assert linear["strides"].to_list() == [[1], [3, 1], [1, 3], [2, 1]]
    assert linear["bytes"].to_list() == [8, 60, 24, 40]
    assert set(linear["dtype"]) == {"float32"}
    assert linear["storage"].is_not_null().all()
    sparse = tensors.filter(pl.col("op") == "aten::_to_sparse", pl.col("role") == "output")
    assert sparse.select("storage", "shape", "bytes").rows() == [(None, None, None)]


def test_communications_join_their_events_and_works(trace: Trace) -> None:
    comms, events, works = (table(trace, name) for name in ("comms", "events", "works"))
    (comm,) = comms.rows(named=True)
    assert (comm["op"], comm["group_size"], comm["peer"], comm["reduce_op"]) == ("c10d::broadcast_", 1, 0, None)
    assert events.filter(pl.col("comm") == comm["comm"])["event"].to_list() == [comm["event"]]
    assert events["comm"].null_count() == len(events) - 1
    assert set(works["comm"]) <= {comm["comm"]}
    assert (works["end_ns"] >= works["start_ns"]).all()


def test_tables_of_several_ranks_lie_under_each_other(trace: Trace) -> None:
    for name in ("events", "tensors", "comms", "works", "waits", "frees", "storages"):
        one = table(trace, name)
        assert len(pl.concat([one, one])) == 2 * len(one)
    storages = table(trace, "storages").filter(pl.col("event").is_null())
    assert storages["storage"].to_list() == list(range(1, len(trace.storages) + 1))
