"""The critical path of programs that real gloo ranks ran: it is the step, and knows who was waited for."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch
from megatron_ranks import run_ranks
from torch import distributed

from truedag.tracer.analysis.critical_path import find_critical_path
from truedag.tracer.analysis.shares import measure_steps
from truedag.tracer.annotate import scope
from truedag.tracer.graph import Graph
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.record.recording import record

STEPS = (4, 5)


def work(folder: Path) -> bool:
    """Two steps: a blocking collective, one that computes meanwhile, a broadcast, a ring of messages."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    weight = torch.full((64, 64), 0.5)
    with record(folder / f"rank-{rank:05d}.trace") as recording:
        for step in STEPS:
            with scope(step=step):
                value = torch.ones(64, 64)
                for _ in range(4 * (rank + 1)):
                    value = value @ weight
                distributed.all_reduce(value)
                pending = distributed.all_reduce(value.clone(), async_op=True)
                other = value.exp()
                pending.wait()
                distributed.broadcast(other, 0)
                received = torch.empty(64, 64)
                sent = distributed.isend(other, (rank + 1) % size)
                got = distributed.irecv(received, (rank - 1) % size)
                value = other * 2
                got.wait()
                sent.wait()
                (value + received).sum()
    return recording.switched_off == ""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    folder = tmp_path_factory.mktemp("critical")
    assert run_ranks(3, work, folder, timeout_s=60) == [True] * 3
    merge_traces(folder, folder / "dag")
    return Graph.open(folder / "dag")


@pytest.mark.parametrize("step", STEPS)
def test_its_pieces_follow_each_other_from_the_steps_first_start_to_its_last_end(graph: Graph, step: int) -> None:
    path = find_critical_path(graph, step)
    begin, end = measure_steps(graph.nodes.collect(), graph.participants.collect())[step]
    assert path.pieces["start_ns"].to_list() == [begin, *path.pieces["end_ns"][:-1].to_list()]
    assert path.pieces["end_ns"][-1] == end
    assert path.length_ns == end - begin
    assert path.num_untimed == 0
    assert path.error_ns is not None
    assert set(path.pieces["kind"]) <= {"compute", "collective", "send", "recv"}
    assert path.pieces.filter(pl.col("spent") == "compute").height > 0


@pytest.mark.parametrize("step", STEPS)
def test_who_came_last_is_who_arrived_last(graph: Graph, step: int) -> None:
    path = find_critical_path(graph, step)
    collectives = graph.nodes.filter((pl.col("kind") == "collective") & (pl.col("step") == step)).select("node")
    met = graph.participants.join(collectives, on="node", how="semi").collect()
    waited = met.group_by("node").agg(
        pl.col("rank").sort_by("arrive_ns").last(),
        late_ns=pl.col("arrive_ns").max() - pl.col("arrive_ns").sort(descending=True).get(1),
        waited_ns=(pl.col("start_ns") - pl.col("arrive_ns")).sum(),
    )
    assert len(waited) == 3
    told = path.stragglers.join(collectives.collect(), on="node", how="semi")
    assert told.select("node", "rank", "late_ns", "waited_ns").sort("node").rows() == waited.sort("node").rows()
    spent = [pl.col(f"late_{kind}_ns") for kind in ("compute", "transfer", "waiting", "host")]
    assert (told.select(total=sum(spent, pl.lit(0)))["total"] <= told["late_ns"]).all()
    assert (told["held_ns"] <= told["late_ns"]).all()


def test_every_part_of_a_step_may_be_later_but_the_path(graph: Graph) -> None:
    path = find_critical_path(graph, STEPS[0])
    assert path.slack["slack_ns"].min() == 0
    inside = graph.subgraph(steps=STEPS[0]).nodes.filter(~pl.col("kind").is_in(["parameter", "input", "output"]))
    assert set(path.slack["node"]) == set(inside.collect()["node"])


def test_ranks_that_ran_the_same_program_are_of_one_class(graph: Graph) -> None:
    """Each rank multiplies more often than the one before it, in what else they do they are alike."""
    assert graph.rank_classes()["rank_class"].to_list() == [0, 1, 2]
    rest = graph.subgraph(where=pl.col("op") != "aten::mm")
    assert rest.rank_classes()["rank_class"].to_list() == [0, 1, 1]  # rank 0 is the broadcast's root
