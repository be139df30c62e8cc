"""How well two hosts' clocks are compared, and what it costs: `python scripts/bench_clocks.py [--trials N]`.

Three worlds in which the truth is known. Simulated: clocks up to 10 s and 200 ppm wrong, ways of up to 200 µs with
jitter and stalls. Loopback: real pings between two processes whose clocks are made to go wrong by as much. Forwarded:
the same through a process that holds every message up, one way longer than the other.
"""

from __future__ import annotations

import argparse
import heapq
import multiprocessing
import os
import random
import select
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from clock_worlds import SECOND_NS, Way, WrongClock, make_trace, measure

from truedag.tracer.merge.align import Clock, align_clocks
from truedag.tracer.record.clock_measuring import FIRST_PINGS, INTERVALS_S, LATER_PINGS, PAUSE_S, ClockMeasuring
from truedag.tracer.record.clock_pings import Pinger, Responder, keep_quickest

_CONTEXT = multiprocessing.get_context("fork")
WAYS_US = ((200, 200), (1000, 200), (200, 1000), (5000, 500))
_JITTER_S = 50e-6
_NUM_RECORDINGS = 10


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="simulated ones; a tenth as many are real")
    trials = parser.parse_args().trials
    print(f"{'':<34}{'error, median':>14}{'99 %':>10}{'worst':>10}{'stated, median':>16}{'covered':>10}   µs")
    _tell("simulated", [_simulate(seed) for seed in range(trials)])
    _tell("loopback", _real(max(trials // 10, 1), None))
    for out_us, back_us in WAYS_US:
        title = f"{out_us} µs out, {back_us} back: half {abs(out_us - back_us) / 2:.0f}"
        _tell(title, _real(max(trials // 50, 1), (out_us * 1e-6, back_us * 1e-6)))
    _tell_cost()


def _tell(title: str, found: Sequence[tuple[int, int]]) -> None:
    errors, stated = (np.array(column) / 1000 for column in zip(*found, strict=True))
    print(
        f"{title:<34}{np.median(errors):>14.1f}{np.percentile(errors, 99):>10.1f}{errors.max():>10.1f}"
        f"{np.median(stated):>16.1f}{(errors <= stated).mean():>10.1%}   {len(errors)} trials"
    )


def _draw_clock(chance: np.random.Generator) -> WrongClock:
    return WrongClock(offset_ns=int(chance.uniform(-1e10, 1e10)), drift=chance.uniform(-2e-4, 2e-4))


def _judge(
    samples: Sequence[dict[str, object]], here: WrongClock, there: WrongClock, span_ns: tuple[int, int]
) -> tuple[int, int]:
    """The largest error in a span of true time, and what is stated, in ns."""
    traces = [
        make_trace(0, 2, there, "there", [], span_ns=span_ns),
        make_trace(1, 2, here, "here", samples, span_ns=span_ns),
    ]
    clock: Clock = align_clocks(traces)[1]
    moments = np.linspace(*span_ns, 50).astype(np.int64).tolist()
    shown = np.array([here(moment) for moment in moments])
    wanted = np.array([there(moment) for moment in moments])
    assert clock.error_ns is not None
    return int(np.abs(clock.correct(shown) - wanted).max()), clock.error_ns


def _simulate(seed: int) -> tuple[int, int]:
    chance = np.random.default_rng(seed)
    here, there = _draw_clock(chance), _draw_clock(chance)
    ways = [
        Way(least_ns=int(chance.uniform(5e3, 2e5)), jitter_ns=chance.uniform(1e3, 1e5), stall_ns=1e6) for _ in range(2)
    ]
    begin, duration_s = int(chance.uniform(1e9, 1e12)), float(10 ** chance.uniform(-1.5, 1.5))
    samples = measure(
        here, there, ways[0], ways[1], chance, begin_ns=begin, duration_s=duration_s, names=("here", "there")
    )
    return _judge(samples, here, there, (begin, begin + int(duration_s * SECOND_NS)))


def _real(num_trials: int, delays_s: tuple[float, float] | None) -> list[tuple[int, int]]:
    """Pings between this process and another, at both ends of a tenth of a second."""
    chance = np.random.default_rng(0)
    found = []
    for _ in range(num_trials):
        here, there = _draw_clock(chance), _draw_clock(chance)
        pipe, far = _CONTEXT.Pipe()
        answering = _CONTEXT.Process(target=_answer, args=(far, there, delays_s), daemon=True)
        answering.start()
        token, port = pipe.recv()
        pinger = Pinger(token, [("127.0.0.1", port)], 1, here)
        samples: list[dict[str, Any]] = []
        begin = time.monotonic_ns()
        for count in (FIRST_PINGS, LATER_PINGS):
            pings = pinger.ping(count, lambda: time.sleep(PAUSE_S))
            samples.append({"clock": "here", "peer_clock": "there", "pings": keep_quickest(pings)})
            time.sleep(0.1 if count == FIRST_PINGS else 0.0)
        found.append(_judge(samples, here, there, (begin, time.monotonic_ns())))
        pinger.close()
        answering.kill()
        answering.join()
    return found


def _answer(pipe: Connection, clock: WrongClock, delays_s: tuple[float, float] | None) -> None:
    responder = Responder(clock)
    if delays_s is None:
        pipe.send((responder.token, responder.port))
        time.sleep(600)
        return
    near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    near.bind(("127.0.0.1", 0))
    beyond = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    beyond.connect(("127.0.0.1", responder.port))
    pipe.send((responder.token, near.getsockname()[1]))
    if os.fork() == 0:  # a process of its own, which shares no interpreter with the one that answers
        _forward(near, beyond, delays_s)
    time.sleep(600)


def _forward(near: socket.socket, beyond: socket.socket, delays_s: tuple[float, float]) -> None:
    parent = os.getppid()
    waiting: list[tuple[float, int, bool, bytes]] = []
    pinger: Any = None
    count = 0
    while os.getppid() == parent:
        until_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.2
        for ready in select.select([near, beyond], [], [], until_s)[0]:
            is_out = ready is near
            message, address = ready.recvfrom(512)
            pinger = address if is_out else pinger
            due = time.monotonic() + delays_s[0 if is_out else 1] + random.expovariate(1 / _JITTER_S)
            count += 1
            heapq.heappush(waiting, (due, count, is_out, message))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, is_out, message = heapq.heappop(waiting)
            if is_out:
                beyond.send(message)
            else:
                near.sendto(message, pinger)
    os._exit(0)


def _tell_cost() -> None:
    """What a ping costs, and what a recording pays at its beginning and its end."""
    responder = Responder()
    pinger = Pinger(responder.token, [("127.0.0.1", responder.port)], 1)
    before, count = time.process_time(), 2000
    pinger.ping(count, lambda: None)
    per_ping_s = (time.process_time() - before) / count
    pinger.close()
    responder.stop()
    with tempfile.TemporaryDirectory() as folder:
        pipe, far = _CONTEXT.Pipe()
        ranks = [_CONTEXT.Process(target=_record, args=(rank, folder, far), daemon=True) for rank in range(2)]
        for rank in ranks:
            rank.start()
        paid = dict(pipe.recv() for _ in ranks)
        for rank in ranks:
            rank.join()
    joins, ends = ({rank: 1e6 * np.median([one[i] for one in times]) for rank, times in paid.items()} for i in (0, 1))
    print(
        f"\na ping and its answer take {per_ping_s * 1e6:.0f} µs of processor, both sides together: of "
        f"{LATER_PINGS} every {INTERVALS_S[-1]:.0f} s, {per_ping_s * LATER_PINGS / INTERVALS_S[-1]:.5%} of a core for "
        f"each host\nto begin costs a recording {max(joins.values()):.0f} µs, to end {max(ends.values()):.0f} µs"
    )


def _record(rank: int, folder: str, pipe: Connection) -> None:
    """Begin and end some recordings; send what they paid for that, in seconds."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    times = []
    for _ in range(_NUM_RECORDINGS):
        told: list[dict[str, Any]] = []
        measuring = ClockMeasuring(f"host{rank}", told.append)
        begin = time.perf_counter()
        measuring.join(is_rank_told=False)
        joined = time.perf_counter()
        time.sleep(0.4)
        ending = time.perf_counter()
        measuring.end()
        times.append((joined - begin, time.perf_counter() - ending))
        distributed.barrier()
    pipe.send((rank, times))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
