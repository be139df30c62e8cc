"""Ranks that begin and stop recording where they like: what both ends recorded is joined rightly, the rest is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron_ranks import run_ranks

from truedag.tracer.merge.match import Matched, match_communications
from truedag.tracer.merge.rank_graph import build_rank_graph
from truedag.tracer.record import counters
from truedag.tracer.record.recording import RecorderName, record
from truedag.tracer.record.trace import read_trace

NUM_STEPS = 8
# By rank, the steps that it records: begun and stopped at different ones.
WINDOWS = ((2, 6), (4, 8), (3, 7))


def run_steps(folder: Path, recorder: RecorderName) -> None:
    """Equal messages in flight over every step: what is sent in one is received in the next."""
    import contextlib

    import torch
    from torch import distributed

    counters.install()
    rank, size = distributed.get_rank(), distributed.get_world_size()
    after, before = (rank + 1) % size, (rank - 1) % size
    first, last = WINDOWS[rank]
    works: list[distributed.Work] = []
    with contextlib.ExitStack() as recording:
        for step in range(NUM_STEPS):
            if step == first:
                path = folder / f"rank-{rank:05d}.trace"
                recording.enter_context(record(path, recorder=recorder, synchronize=False))
            if step == last:
                recording.close()
            outgoing = torch.full((4,), float(step))
            works.append(distributed.isend(outgoing, after))
            if step:
                incoming = torch.empty(4)
                distributed.recv(incoming, before)
                assert incoming[0] == step - 1
            distributed.all_reduce(torch.ones(2))
            if rank == 0:
                for _ in range(size - 1):
                    distributed.recv(torch.empty(3), tag=1000)
            else:
                distributed.send(torch.full((3,), float(rank)), 0, tag=1000)
            if step % 3 == 1:
                distributed.monitored_barrier()
        distributed.recv(torch.empty(4), before)
        for work in works:
            work.wait()


def matched_in(folder: Path) -> Matched:
    graphs = [build_rank_graph(read_trace(path)) for path in sorted(folder.glob("*.trace"))]
    return match_communications({graph.rank: graph.nodes.comms for graph in graphs})


def recorded_steps(rank: int) -> range:
    return range(*WINDOWS[rank])


@pytest.mark.parametrize("recorder", ["native", "python"])
def test_windows_of_different_steps_fit_together(recorder: RecorderName, tmp_path: Path) -> None:
    run_ranks(3, run_steps, tmp_path, recorder, timeout_s=60)
    matched = matched_in(tmp_path)
    everywhere = set(recorded_steps(0)) & set(recorded_steps(1)) & set(recorded_steps(2))
    barriers = sum(step % 3 == 1 for step in everywhere)
    assert len(matched.collectives) == len(everywhere) + barriers
    around: dict[tuple[int, int], list[int]] = {}
    for message in matched.messages:
        around.setdefault((message.source, message.destination), []).append(message.order)
        if message.send.tag == 0:  # sent in one step, received in the next
            assert message.order in recorded_steps(message.source)
            assert message.order + 1 in (*recorded_steps(message.destination), NUM_STEPS)
    for source in range(3):
        destination = (source + 1) % 3
        received = {step - 1 for step in recorded_steps(destination)}
        if WINDOWS[destination][1] == NUM_STEPS:
            received.add(NUM_STEPS - 1)
        ring = set(recorded_steps(source)) & received
        reports = set(recorded_steps(source)) & set(recorded_steps(0)) if destination == 0 else set()
        assert sorted(around[source, destination]) == sorted([*ring, *reports])
    assert sorted(around[1, 0]) == sorted(set(recorded_steps(1)) & set(recorded_steps(0)))
    assert {one.what for one in matched.unmatched} <= {
        "ranks are missing",
        "send without receive",
        "receive without send",
    }


def count_late(folder: Path) -> None:
    """A message is under way when the ranks meet and record for the first time; nobody counted it."""
    import torch
    from torch import distributed

    rank = distributed.get_rank()
    distributed.all_reduce(torch.ones(1))
    early = distributed.isend(torch.zeros(4), 1) if rank == 0 else None
    with record(folder / f"rank-{rank:05d}.trace"):
        if rank == 0:
            distributed.send(torch.ones(4), 1)
        else:
            distributed.recv(torch.empty(4), 0)
            distributed.recv(torch.empty(4), 0)
    if early is not None:
        early.wait()


def test_a_message_that_nobody_counted_makes_its_lane_unsure(tmp_path: Path) -> None:
    run_ranks(2, count_late, tmp_path, timeout_s=60)
    matched = matched_in(tmp_path)
    assert matched.messages == []
    assert [one.what.partition(":")[0] for one in matched.unmatched] == ["ambiguous"] * 3


def count_from_the_start(folder: Path) -> None:
    counters.install()
    count_late(folder)


def test_a_message_that_was_under_way_keeps_its_number(tmp_path: Path) -> None:
    run_ranks(2, count_from_the_start, tmp_path, timeout_s=60)
    matched = matched_in(tmp_path)
    (message,) = matched.messages
    assert (message.order, message.receive.order) == (1, 1)
    (alone,) = matched.unmatched
    assert (alone.what, alone.present, alone.missing) == ("receive without send", (1,), (0,))


def make_the_group_again(folder: Path) -> None:
    """Rank 0 records both lives of the default group, rank 1 the second alone."""
    import contextlib
    import os

    import torch
    from torch import distributed

    counters.install()
    rank = int(os.environ["RANK"])
    with contextlib.ExitStack() as recording:
        for life in range(2):
            if life == rank:
                recording.enter_context(record(folder / f"rank-{rank:05d}.trace", synchronize=False))
            meeting = f"file://{folder / f'life-{life}'}"
            distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
            distributed.all_reduce(torch.full((2,), float(life)))
            if rank == 0:
                distributed.send(torch.zeros(2), 1)
            else:
                distributed.recv(torch.zeros(2), 0)
            distributed.destroy_process_group()


def test_lives_of_a_group_are_told_apart_by_one_who_saw_only_the_second(tmp_path: Path) -> None:
    run_ranks(2, make_the_group_again, tmp_path, timeout_s=60, process_group=False)
    matched = matched_in(tmp_path)
    (second,) = matched.collectives
    assert [second.records[rank].incarnation for rank in range(2)] == [1, 1]
    assert [message.send.incarnation for message in matched.messages] == [1]
    assert sorted(one.what for one in matched.unmatched) == ["ranks are missing", "send without receive"]
