"""Ranks that compare their clocks over the process group's store, on real gloo ranks that pretend to be on hosts."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from clock_worlds import WrongClock, make_trace
from megatron_ranks import run_ranks
from torch import distributed

from truedag.tracer.merge.align import align_clocks
from truedag.tracer.record.clock_measuring import ClockMeasuring
from truedag.tracer.record.clock_peers import CHILDREN, Leader, Peers
from truedag.tracer.record.counters import install

RIGHT = WrongClock()


def compare(
    folder: Path, hosts: list[str | None], windows: int
) -> tuple[list[list[dict[str, Any]]], int, tuple[int, int]]:
    """Record so many times on the host that is told; None: this rank records nothing."""
    install()
    host = hosts[distributed.get_rank()]
    begin = time.monotonic_ns()
    told: list[list[dict[str, Any]]] = []
    for window in range(windows):
        told.append([])
        done = folder / f"compared-{window}"
        if host is not None:
            measuring = ClockMeasuring(host, told[-1].append)
            measuring.join(is_rank_told=False)
            measuring.join(is_rank_told=False)  # as often as the program's groups change
            while not done.exists():
                time.sleep(0.05)
                if told[-1]:
                    done.touch()
            measuring.end()
        distributed.barrier()
    return told, distributed.group.WORLD._get_sequence_number_for_group(), (begin, time.monotonic_ns())  # type: ignore[union-attr]


def test_one_process_of_each_host_compares_its_clock_in_every_window(tmp_path: Path) -> None:
    hosts: list[str | None] = ["a", "a", "b", "b", None]
    told = run_ranks(5, compare, tmp_path, hosts, 2, timeout_s=60)
    for window in range(2):
        measured = [rank for rank in range(5) if told[rank][0][window]]
        assert len(measured) == 1, "the other host's leader has a smaller number"
        for sample in told[measured[0]][0][window]:
            assert sample["clock"] == hosts[measured[0]]
            assert {sample["clock"], sample["peer_clock"]} == {"a", "b"}
            assert sample["num_pings"] >= len(sample["pings"]) > 0
    assert {sequence for _, sequence, _ in told} == {2}, "the program's group has carried its two barriers only"
    traces = [
        make_trace(rank, 5, RIGHT, host, [sample for window in told[rank][0] for sample in window], told[rank][2])
        for rank, host in enumerate(hosts)
        if host is not None
    ]
    clocks = align_clocks(traces)
    assert [clocks[rank].error_ns for rank in (0, 1)] == [0, 1_000]
    for rank in (2, 3):
        error = clocks[rank].error_ns
        assert error is not None
        times = np.linspace(*told[rank][2], 20).astype(np.int64)
        assert (np.abs(clocks[rank].correct(times) - times) <= error).all()


def end_early(folder: Path) -> float:
    """Rank 0 leads the first host and is gone before the other's recording ends."""
    told: list[dict[str, Any]] = []
    rank = distributed.get_rank()
    measuring = ClockMeasuring(f"host{rank}", told.append)
    if rank == 0:
        measuring.join(is_rank_told=False)
        (folder / "first").touch()
        while not (folder / "second").exists():
            time.sleep(0.01)
        from truedag.tracer.record import clock_measuring

        clock_measuring._SERVICE.responder.stop()  # type: ignore[union-attr]
        (folder / "gone").touch()
        return 0.0
    while not (folder / "first").exists():
        time.sleep(0.01)
    measuring.join(is_rank_told=False)
    while not told:
        time.sleep(0.01)
    (folder / "second").touch()
    while not (folder / "gone").exists():
        time.sleep(0.01)
    began = time.monotonic()
    measuring.end()
    num_told = len(told)
    time.sleep(0.5)
    assert len(told) == num_told, "nothing is written when the recording has ended"
    return time.monotonic() - began


def test_a_host_that_goes_away_costs_the_others_no_more_than_a_moment(tmp_path: Path) -> None:
    assert run_ranks(2, end_early, tmp_path, timeout_s=60)[1] < 30


def claim(rank_hosts: list[str]) -> list[tuple[int, int | None]]:
    """Take numbers one after the other, and find each one's parent."""
    store = distributed.distributed_c10d._get_default_store()
    peers = Peers(store)
    found: list[tuple[int, int | None]] = []
    for i, host in enumerate(rank_hosts):
        number = peers.publish(Leader(clock=host, host=host, token="00", port=i, addresses=("127.0.0.1",)))
        parent = peers.find_parent(number, host) if number else None
        found.append((number, None if parent is None else parent.port))
    assert peers.lead("x")
    assert not peers.lead("x")
    peers.resign("x")
    assert peers.lead("x")
    assert store.num_keys() > 0
    return found


def test_leaders_make_a_tree() -> None:
    hosts = [f"host{i}" for i in range(40)]
    (found,) = run_ranks(1, claim, [*hosts, "host1", "host2"], timeout_s=60)
    assert found[0] == (0, None)
    assert all(parent == (number - 1) // CHILDREN for number, parent in found[1:40])
    # A later leader of a host is not compared with its own host.
    assert found[40] == (40, 2)
    assert found[41] == (41, 0)


def compare_through_a_firewall(folder: Path) -> tuple[int, str]:
    """Nothing gets to the addresses that the leaders tell: they are reserved for documents (RFC 5737)."""
    from truedag.tracer.record import clock_measuring

    told: list[dict[str, Any]] = []
    clock_measuring.list_addresses = lambda: ["192.0.2.1"]
    said, sys.stderr = sys.stderr, io.StringIO()
    measuring = ClockMeasuring(f"host{distributed.get_rank()}", told.append)
    measuring.join(is_rank_told=False)
    while not (folder / "told").exists():
        time.sleep(0.05)
        if sys.stderr.getvalue():
            (folder / "told").touch()
    measuring.end()
    words, sys.stderr = sys.stderr.getvalue(), said
    return len(told), words


def test_hosts_that_cannot_reach_each_other_say_so_once(tmp_path: Path) -> None:
    told = run_ranks(2, compare_through_a_firewall, tmp_path, timeout_s=60)
    assert [num for num, _ in told] == [0, 0]
    (line,) = "".join(words for _, words in told).splitlines()
    assert "was not compared with another's" in line
    assert "192.0.2.1" in line
