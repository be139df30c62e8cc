"""Random programs of some ranks with times as a run would have: what each waits for ends before it begins.

Ranks run operators on one or two threads with pauses between them, meet in collectives, blocking or not, and exchange
messages. Clocks may be wrong by some nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from small_dag import SmallDag


@dataclass
class Run:
    """What has happened so far, in ns of the true time."""

    dag: SmallDag
    draw: st.DrawFn
    num_threads: int
    skew: dict[int, int]
    time: dict[tuple[int, int], int] = field(default_factory=dict)  # of each thread
    last: dict[tuple[int, int], int] = field(default_factory=dict)
    made: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # nodes, and when each rank has them

    def some(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def told(self, rank: int, *times: int) -> tuple[int, ...]:
        return tuple(max(time + self.skew[rank], 0) for time in times)

    def chain(self, key: tuple[int, int], node: int) -> None:
        if key in self.last and self.last[key] != node:
            self.dag.edges.append(
                {"src": self.last[key], "dst": node, "kind": "order", "bytes": 0, "dtype": None, "shape": None}
            )

    def read(self, rank: int, before: int) -> list[int]:
        known = [node for node, when in self.made[rank] if when <= before]
        return self.draw(st.lists(st.sampled_from(known), max_size=2, unique=True)) if known else []

    def operator(self, rank: int) -> None:
        key = (rank, self.some(0, self.num_threads - 1))
        begin = self.time[key] + self.some(0, 20)
        end = begin + self.some(0, 30)
        node = self.dag.node(
            rank=rank, after=self.read(rank, begin), time=self.told(rank, begin, end), thread=key[1],
            timing="measured",
        )  # fmt: skip
        self.chain(key, node)
        self.time[key], self.last[key] = end, node
        self.made[rank].append((node, end))

    def collective(self, ranks: list[int]) -> None:
        group = self.dag.group("tp", ranks)
        is_async = self.draw(st.booleans())
        came = {rank: self.time[rank, 0] + self.some(0, 10) for rank in ranks}
        queued = {rank: came[rank] + (self.some(0, 15) if is_async else 0) for rank in ranks}
        last = max(queued.values())
        ends = {rank: last + self.some(0, 25) for rank in ranks}
        reads = {node for rank in ranks for node in self.read(rank, came[rank])}
        arrivals = {rank: self.told(rank, queued[rank])[0] for rank in ranks}
        met = max(arrivals.values())
        told = {rank: max(met, self.told(rank, ends[rank])[0]) for rank in ranks}
        node = self.dag.node(
            "collective", -1, sorted(reads), time=(min(arrivals.values()), max(told.values())), thread=-1,
        )  # fmt: skip
        for rank in ranks:
            self.dag.meet(node, group, rank, (arrivals[rank], met, told[rank]))
            self.chain((rank, 0), node)
            self.made[rank].append((node, ends[rank]))
            if is_async:
                self.time[rank, 0] = came[rank]
            else:
                self.time[rank, 0], self.last[rank, 0] = ends[rank], node

    def message(self, source: int, destination: int) -> None:
        group = self.dag.group("pp", [source, destination])
        left, came = (self.time[rank, 0] + self.some(0, 10) for rank in (source, destination))
        last = max(left, came)
        gone, got = (last + self.some(0, 20) for _ in range(2))
        if self.draw(st.booleans()):
            gone = left + self.some(0, 5)  # it need not wait for the receiver
        (leaves,), (arrives,) = self.told(source, left), self.told(destination, came)
        met = max(leaves, arrives)
        ends = max(self.told(source, gone)[0], leaves), max(self.told(destination, got)[0], met)
        send = self.dag.node("send", source, self.read(source, left), time=(leaves, ends[0]))
        recv = self.dag.node("recv", destination, time=(arrives, ends[1]))
        self.dag.edges.append({"src": send, "dst": recv, "kind": "p2p", "bytes": 4, "dtype": "f", "shape": [1]})
        self.dag.meet(send, group, source, (leaves, min(met, ends[0]), ends[0]))
        self.dag.meet(recv, group, destination, (arrives, met, ends[1]))
        for node, rank, end in ((send, source, gone), (recv, destination, got)):
            self.chain((rank, 0), node)
            self.time[rank, 0], self.last[rank, 0] = end, node
            self.made[rank].append((node, end))


@st.composite
def timed_programs(draw: st.DrawFn) -> SmallDag:
    num_ranks = draw(st.integers(1, 3))
    skew = {rank: draw(st.integers(-3, 3)) for rank in range(num_ranks)}
    run = Run(SmallDag(num_ranks=num_ranks), draw, draw(st.integers(1, 2)), skew)
    for rank in range(num_ranks):
        run.made[rank] = []
        for thread in range(run.num_threads):
            run.time[rank, thread] = 5
    run.operator(draw(st.integers(0, num_ranks - 1)))  # one rank has nobody to send to: messages alone are nothing
    for _ in range(draw(st.integers(0, 24))):
        what = draw(st.sampled_from(["operator", "operator", "operator", "collective", "message"]))
        if what == "operator":
            run.operator(draw(st.integers(0, num_ranks - 1)))
        elif what == "collective":
            run.collective(sorted(draw(st.sets(st.integers(0, num_ranks - 1), min_size=1))))
        elif num_ranks > 1:
            source, destination = draw(st.permutations(range(num_ranks)))[:2]
            run.message(source, destination)
    return run.dag
