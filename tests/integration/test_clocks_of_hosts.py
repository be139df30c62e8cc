"""Clocks of two hosts under torchrun, played by namespaces of the kernel: of time, and of the network between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from clock_worlds import WrongClock
from slow_link import DEVICE, Delay, Link

from truedag.tracer.graph import Graph
from truedag.tracer.merge.align import align_clocks, find_violations
from truedag.tracer.merge.causality import Moments, find_order
from truedag.tracer.merge.match import match_communications
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.merge.rank_graph import build_rank_graph
from truedag.tracer.record.trace import Trace, read_trace

TIMEOUT_S = 120
SKEW_S = 10
PROGRAM = """
import time
import torch
from torch import distributed

distributed.init_process_group("gloo")
rank = distributed.get_rank()
for _ in range(10):
    tensor = torch.ones(100)
    distributed.all_reduce(tensor)
    distributed.broadcast(tensor, 1)
    if rank == 0:
        distributed.send(tensor, 1)
        distributed.recv(tensor, 1)
    else:
        distributed.recv(tensor, 0)
        distributed.send(tensor, 0)
    time.sleep(0.1)
distributed.barrier()
distributed.destroy_process_group()
"""
OF_TIME = ("--time", "--monotonic", str(SKEW_S))
OF_NETWORK = ("--net",)


def unshare(*namespaces: str) -> list[str]:
    """Return what runs a command in namespaces of its own."""
    return ["unshare", "--user", "--map-root-user", *namespaces, "--fork", "--kill-child"]


def is_allowed(*namespaces: str) -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*unshare(*namespaces), "true"], capture_output=True, check=False).returncode == 0


needs_time = pytest.mark.skipif(not is_allowed(*OF_TIME), reason="this kernel gives out no namespaces of time")
needs_network = pytest.mark.skipif(
    not is_allowed(*OF_NETWORK) or not os.access("/dev/net/tun", os.R_OK | os.W_OK) or shutil.which("ip") is None,
    reason="no namespaces of the network here, no TUN devices or no iproute2",
)


def agent(folder: Path, node: int, address: str, port: int) -> list[str]:
    """Return the command of one of two torchrun agents."""
    place = ("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node), "--rdzv-backend", "static")
    return [
        sys.executable, "-m", "torch.distributed.run", *place, "--rdzv-endpoint", f"{address}:{port}",
        "-m", "truedag.tracer.attach", "--out", str(folder / "out"), str(folder / "program.py"),
    ]  # fmt: skip


def run_all(folder: Path, commands: Sequence[Sequence[str]], **environment: str) -> None:
    """Run the agents to their end."""
    (folder / "program.py").write_text(PROGRAM)
    processes = [
        subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, words in zip(processes, said, strict=True):
        assert process.returncode == 0, words
        assert "was not compared" not in words


def play_two_times(folder: Path, port: int) -> None:
    """Two hosts whose clocks differ by ten seconds."""
    run_all(
        folder,
        [agent(folder, 0, "127.0.0.1", port), [*unshare(*OF_TIME), *agent(folder, 1, "127.0.0.1", port)]],
    )


def play_slow_link(folder: Path, port: int) -> None:
    """The same, with a network between them whose way back takes longer, and never equally long."""
    link = Link(folder / "link", Delay(least_s=0.0005, jitter_s=0.0003), Delay(least_s=0.003, jitter_s=0.001))
    side = [sys.executable, str(Path(__file__).with_name("slow_link.py")), str(folder / "link")]
    try:
        run_all(
            folder,
            [
                [
                    *unshare(*OF_NETWORK, *namespaces),
                    *side,
                    f"10.77.0.{node + 1}",
                    *agent(folder, node, "10.77.0.1", port),
                ]
                for node, namespaces in enumerate(((), OF_TIME))
            ],
            GLOO_SOCKET_IFNAME=DEVICE,
        )
    finally:
        link.close()


@pytest.mark.parametrize(
    "play",
    [
        pytest.param(play_two_times, marks=needs_time, id="two times"),
        pytest.param(play_slow_link, marks=[needs_time, needs_network], id="a slow link"),
    ],
)
def test_two_hosts_come_onto_one_clock(tmp_path: Path, play: Callable[[Path, int], None], free_port: int) -> None:
    play(tmp_path, free_port)
    traces = [read_trace(tmp_path / "out" / "traces" / f"rank-{rank:05d}.trace") for rank in range(2)]
    assert sum(len(trace.clock_samples) for trace in traces) >= 1
    merge_traces(tmp_path / "out" / "traces", tmp_path / "out" / "dag")
    graph = Graph.open(tmp_path / "out")
    offsets, errors = (graph.ranks.sort("rank").collect()[f"clock_{name}_ns"].to_list() for name in ("offset", "error"))
    ahead = [int("+" in trace.meta["boot_id"]) for trace in traces]  # which rank the second agent has
    assert sorted(ahead) == [0, 1]
    assert errors[0] == 0
    assert errors[1] is not None
    assert abs(offsets[1] - (ahead[0] - ahead[1]) * SKEW_S * 10**9) <= errors[1]
    check_causality(graph)
    check_with_drift(traces)


def check_causality(graph: Graph) -> None:
    """No collective ends before its last participant arrived, no message is there before it was sent."""
    parts = graph.participants.collect()
    nodes = graph.nodes.collect().select("node", "kind", "op")
    parts = parts.join(nodes, on="node")
    assert parts["end_ns"].null_count() == 0
    reduced = parts.filter(pl.col("op") == "c10d::allreduce_").group_by("node").agg(
        pl.col("arrive_ns").max(), pl.col("end_ns").min()
    )  # fmt: skip
    assert len(reduced) == 10
    assert (reduced["end_ns"] >= reduced["arrive_ns"]).all()
    edges = graph.edges.filter(pl.col("kind") == "p2p").collect()
    assert len(edges) == 20
    arrive, end = (dict(parts.select("node", name).iter_rows()) for name in ("arrive_ns", "end_ns"))
    assert all(end[dst] >= arrive[src] for src, dst in edges.select("src", "dst").iter_rows())


def check_with_drift(traces: Sequence[Trace]) -> None:
    """What was recorded, as if the second rank's clock had gone wrong: it is set right, within the error."""
    found = align_clocks(traces)[1]
    for drift in (2e-4, -2e-4):
        origin = int(traces[1].meta["clock_begin"]["monotonic_ns"])
        wrong = WrongClock(offset_ns=int(-drift * origin) - 7 * 10**9, drift=drift)
        skewed = [_skew(traces[0], WrongClock(), {}), _skew(traces[1], wrong, {traces[1].meta["boot_id"]: wrong})]
        if not traces[1].clock_samples:  # the first rank measured: the second's clock is what it was told
            skewed[0] = _skew(traces[0], WrongClock(), {traces[1].meta["boot_id"]: wrong})
        graphs = [build_rank_graph(trace, None) for trace in skewed]
        matched = match_communications({graph.rank: graph.nodes.comms for graph in graphs})
        order = find_order(matched, {graph.rank: Moments.of(graph) for graph in graphs}, align_clocks(skewed))
        assert len(order.before_ns) >= 30
        clocks = align_clocks(skewed, order)
        assert len(find_violations(order, clocks)) == 0
        error = clocks[1].error_ns
        assert error is not None
        assert found.error_ns is not None
        times = np.linspace(origin, origin + 10**9, 20).astype(np.int64)
        shown = np.array([wrong(time) for time in times.tolist()])
        assert (np.abs(clocks[1].correct(shown) - found.correct(times)) <= error + found.error_ns).all()


def _skew(trace: Trace, clock: WrongClock, clocks: dict[str, WrongClock]) -> Trace:
    """Show a trace's times by another clock, and in its pings those of hosts by theirs."""

    def show(records: np.ndarray, *names: str) -> np.ndarray:
        shown = records.copy()
        for name in names:
            shown[name] = [clock(time) for time in records[name].tolist()]
        return shown

    threads = [
        replace(
            thread,
            events=show(thread.events, "start_ns", "end_ns"),
            works=show(thread.works, "start_ns", "end_ns"),
            waits=show(thread.waits, "start_ns", "end_ns"),
            frees=show(thread.frees, "time_ns"),
        )
        for thread in trace.threads
    ]
    meta = dict(trace.meta)
    for moment in ("clock_begin", "clock_end"):
        meta[moment] = meta[moment] | {"monotonic_ns": clock(int(meta[moment]["monotonic_ns"]))}
    lanes = [
        lane | {name: clock(lane[name]) for name in ("time_ns", "made_ns") if lane.get(name)} for lane in trace.lanes
    ]
    samples = []
    for sample in trace.clock_samples:
        here, there = (clocks.get(sample[name], WrongClock()) for name in ("clock", "peer_clock"))
        pings = [[here(sent), there(come), there(left), here(back)] for sent, come, left, back in sample["pings"]]
        samples.append(sample | {"pings": pings})
    return replace(trace, threads=threads, meta=meta, lanes=lanes, clock_samples=samples)


@pytest.fixture
def free_port() -> int:
    """A port that the system does not give out by itself."""
    import random
    import socket

    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
