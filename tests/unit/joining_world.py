"""A world of ranks that communicate, and what a recorder writes of it: the known truth that joining is held against.

A program of collectives and messages over groups of which two have the same ranks and one is made again under its name.
Each rank does its part in an order of its own, as asynchronous operations and threads may; a scheduler mixes the ranks.
Messages are handed out as gloo does it: a receive that names its source is served before one from any source, whichever
was begun first. Counts and records are those of `record/counters.py` and `record/native`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from truedag.tracer.merge.nodes import CommRecord
from truedag.tracer.merge.numbering import number_communications

NS_BETWEEN = 10
_BYTES = 8


@dataclass(frozen=True, slots=True)
class Group:
    name: str
    ranks: tuple[int, ...]
    incarnation: int
    backend: str


@dataclass(frozen=True, slots=True)
class Op:
    """What one rank does: its end of the communication `number` of the program."""

    number: int
    group: Group
    op: str
    peer: int = -1  # of a receive from any source the one that it is meant to hear, whoever it hears
    tag: int = -1

    @property
    def is_message(self) -> bool:
        return self.op in ("send", "recv_", "recv_any_source_")

    @property
    def is_receive(self) -> bool:
        return self.op.startswith("recv")


@dataclass(slots=True)
class Done:
    """An operation that a rank has begun."""

    rank: int
    op: Op
    begin: int
    is_blocking: bool = False
    matched: int | None = None  # a receive: when its message was there
    work_end: int | None = None  # as recorded
    partner: Done | None = None  # a message's other end
    taken: int = 1  # of the backend's numbers


@dataclass(slots=True)
class World:
    groups: list[Group]
    done: dict[int, list[Done]]  # by rank, in the order in which it began them
    remade: int  # when the group that is made again was made
    quiet: int | None  # when nothing was under way anywhere, if there was such a moment


def make_world(chance: random.Random) -> World:
    ranks = list(range(chance.randint(2, 4)))
    some = tuple(sorted(chance.sample(ranks, chance.randint(2, len(ranks)))))
    backends = chance.choice((("gloo", "gloo", "gloo"), ("gloo", "nccl", "gloo"), ("nccl", "nccl", "nccl")))
    groups = [Group("0", tuple(ranks), 0, backends[0])]
    groups += [Group(name, some, 0, backend) for name, backend in zip("12", backends[1:], strict=True)]
    length = chance.randint(2, 40)
    again, quiet_at = sorted(chance.sample(range(length + 1), 2))
    share, from_any = chance.choice(((0.3, 0.0), (0.4, 0.15), (0.6, 0.0), (0.6, 0.4), (0.0, 0.0)))
    special = chance.choice((0.0, 0.0, 0.2))
    network = _Network(ranks)
    remade = quiet = None
    plans: dict[int, list[Op]] = {rank: [] for rank in ranks}
    for number in range(length + 1):
        if number in (again, quiet_at):
            network.run({rank: _shuffled(plan, chance) for rank, plan in plans.items()}, chance)
            plans = {rank: [] for rank in ranks}
            if number == again:
                remade = network.now
                groups[1] = replace(groups[1], incarnation=1)
            elif not network.is_busy:
                quiet = network.now
            network.now += NS_BETWEEN
        if number < length:
            _plan(number, chance.choice(groups), plans, share, from_any, special, chance)
    network.run({rank: _shuffled(plan, chance) for rank, plan in plans.items()}, chance)
    assert remade is not None
    groups.append(replace(groups[1], incarnation=0))
    return World(groups, network.done, remade, quiet)


def _plan(
    number: int,
    group: Group,
    plans: dict[int, list[Op]],
    share: float,
    from_any: float,
    special: float,
    chance: random.Random,
) -> None:
    """Add a communication to the plans of its ranks."""
    if chance.random() >= share:
        name = "allreduce_"
        if chance.random() < special:
            name = "monitored_barrier_" if group.backend == "gloo" and chance.random() < 0.5 else "reduce_scatter_"
        for rank in group.ranks:
            plans[rank].append(Op(number, group, name))
        return
    source, destination = chance.sample(group.ranks, 2)
    tag = chance.randrange(2)
    plans[source].append(Op(number, group, "send", destination, tag))
    is_from_any = group.backend == "gloo" and chance.random() < from_any
    plans[destination].append(Op(number, group, "recv_any_source_" if is_from_any else "recv_", source, tag))


def _shuffled(plan: list[Op], chance: random.Random) -> list[Op]:
    """A rank's own order: collectives of one group keep theirs, everything else may be overtaken."""
    for _ in range(2):
        for i in range(len(plan) - 1):
            here, after = plan[i : i + 2]
            is_tied = here.group == after.group and not here.is_message and not after.is_message
            if not is_tied and chance.random() < 0.3:
                plan[i : i + 2] = after, here
    return plan


class _Network:
    """Hands messages out, and knows what time it is."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.now = NS_BETWEEN
        self.done: dict[int, list[Done]] = {rank: [] for rank in ranks}
        self._sent: list[Done] = []  # nobody has received them
        self._waiting: list[Done] = []  # receives

    @property
    def is_busy(self) -> bool:
        return bool(self._sent or self._waiting)

    def run(self, plans: dict[int, list[Op]], chance: random.Random) -> None:
        """Let the ranks do their plans to the end, mixed at random; one that blocks waits while others can go on."""
        left = {rank: list(reversed(plan)) for rank, plan in plans.items() if plan}
        blocked: dict[int, Done] = {}
        while left:
            free = [rank for rank in left if rank not in blocked or blocked[rank].matched is not None]
            rank = chance.choice(free or list(left))
            self.now += NS_BETWEEN
            begun = Done(rank, left[rank].pop(), self.now)
            if not left[rank]:
                del left[rank]
            blocked.pop(rank, None)
            self.done[rank].append(begun)
            self._begin(begun)
            if begun.op.is_receive and chance.random() < 0.5:
                begun.is_blocking = True
                blocked[rank] = begun
        self.now += NS_BETWEEN
        for mine in self.done.values():
            for one in mine:
                if one.op.is_receive and one.matched is not None and one.work_end is None:
                    late = 1 if one.is_blocking else chance.randrange(1, 6 * NS_BETWEEN)
                    one.work_end = one.matched + late

    def _begin(self, begun: Done) -> None:
        op = begun.op
        if op.op == "monitored_barrier_":
            begun.taken = 2 * (len(op.group.ranks) - 1) if begun.rank == op.group.ranks[0] else 2
        elif op.op == "reduce_scatter_" and op.group.backend == "gloo":
            begun.taken = len(op.group.ranks)
        elif op.op == "send":
            fits = [one for one in self._waiting if _fit(begun, one)]
            fits.sort(key=lambda one: one.op.op == "recv_any_source_")  # those that name the source come first
            self._match(begun, fits[0]) if fits else self._sent.append(begun)
        elif op.is_receive:
            sent = next((one for one in self._sent if _fit(one, begun)), None)
            self._match(sent, begun) if sent else self._waiting.append(begun)

    def _match(self, send: Done, receive: Done) -> None:
        send.partner, receive.partner = receive, send
        receive.matched = self.now
        self._sent = [one for one in self._sent if one is not send]
        self._waiting = [one for one in self._waiting if one is not receive]


def _fit(send: Done, receive: Done) -> bool:
    is_named = receive.op.op == "recv_" and receive.op.peer != send.rank
    ends = send.op.group == receive.op.group and send.op.peer == receive.rank and send.op.tag == receive.op.tag
    return ends and not is_named


@dataclass(slots=True, kw_only=True)
class Terms:
    """How one rank records."""

    begin: int  # when; what is begun later is recorded
    stop: int
    counts_from: int  # when it began to count; 0: before everything
    synchronized: bool = False
    begin_read: int = 0  # when the counts were read, not before `begin`
    is_busy: bool = False
    has_end: bool = True
    hears_all: bool = True
    unheard: float = 0.0  # share of lanes and groups that a thread which is not heard serves
    keeps_work_ends: bool = True
    failing: float = 0.0  # share of operations that are tried once before in a way that fails


@dataclass(slots=True)
class Count:
    """What a rank knows of a group, as `record.counters` keeps it."""

    group: Group
    made_ns: int
    incarnation: int
    absolute: bool
    messages: int = 0
    excess: int = 0
    counted: bool | None = None
    sent: Counter[tuple[int, int]] = field(default_factory=Counter)
    received: Counter[tuple[int, int]] = field(default_factory=Counter)
    open: dict[int, Done] = field(default_factory=dict)
    sources: dict[int, int] = field(default_factory=dict)

    def resolve(self, now: int) -> None:
        for number, one in list(self.open.items()):
            if one.matched is not None and one.matched <= now:
                assert one.partner is not None
                source = self.group.ranks.index(one.partner.rank)
                del self.open[number]
                self.received[source, one.op.tag] += 1
                self.sources[number] = source

    def add(self, one: Done) -> None:
        self.resolve(one.begin)
        self.counted = self.group.backend == "gloo"
        if one.op.op == "recv_any_source_":
            self.open[self.messages] = one
        else:
            lanes = self.sent if one.op.op == "send" else self.received
            lanes[self.group.ranks.index(one.op.peer), one.op.tag] += 1
        self.messages += 1

    def begin(self, terms: Terms, now: int, sequence: int, at: Literal["begin", "made"]) -> dict[str, Any]:
        return {
            "at": at,
            "name": self.group.name,
            "made_ns": self.made_ns,
            "incarnation": self.incarnation,
            "absolute": self.absolute,
            "synchronized": terms.synchronized,
            "time_ns": now,
            "messages": self.messages,
            "sequence": sequence,
            "excess": self.excess,
            "counted": self.counted,
            "busy": terms.is_busy and at == "begin",
            "lanes": [
                [peer, tag, self.sent[peer, tag], self.received[peer, tag]]
                for peer, tag in sorted(self.sent.keys() | self.received.keys())
            ],
            "open": [[number, one.op.tag] for number, one in self.open.items()],
        }

    def end(self) -> dict[str, Any]:
        told = {"at": "end", "name": self.group.name, "made_ns": self.made_ns, "messages": self.messages}
        return told | {"sources": [[number, source] for number, source in self.sources.items()]}


@dataclass(slots=True)
class Recording:
    """What one rank recorded, before it is numbered; each record with what it is of (None: of one that failed)."""

    world: World
    rank: int
    terms: Terms
    records: list[tuple[CommRecord, Done | None]]
    starts: dict[int, int]  # by node
    lanes: list[dict[str, Any]]
    lost: list[tuple[CommRecord, Done | None]] = field(default_factory=list)  # what was there, and is not any more
    unheard: list[Done] = field(default_factory=list)
    altered: set[int] = field(default_factory=set)  # nodes whose records do not say what the others do
    counts: dict[Group, Count] = field(default_factory=dict)
    group_of: dict[int, Group] = field(default_factory=dict)  # by node

    def numbered(self) -> list[CommRecord]:
        records = [record for record, _ in self.records]
        starts = [self.starts[record.node] for record in records]
        return number_communications(records, starts, self.lanes, hears_all=self.terms.hears_all)


def record_rank(world: World, rank: int, terms: Terms, chance: random.Random) -> Recording:
    """Record a rank's part of the world."""
    mine = world.done[rank]
    recording = Recording(world, rank, terms, [], {}, [])
    counts = recording.counts
    sequences: Counter[Group] = Counter()
    orders: Counter[tuple[Group, bool]] = Counter()
    seen: dict[str, list[Group]] = {}
    threads = dict.fromkeys(_served_by(one.op) for one in mine)
    deaf = {key for key in threads if not terms.hears_all and chance.random() < terms.unheard}
    groups = [group for group in world.groups if rank in group.ranks]
    events: list[tuple[int, int, Any]] = [(one.begin, 4, one) for one in mine if one.begin < terms.stop]
    events += [(0 if group.incarnation == 0 else world.remade, 2, group) for group in groups]
    events += [(terms.counts_from, 1 if not terms.counts_from else 3, "count"), (terms.begin_read, 3, "begin")]
    is_counting = has_begun = False
    alive: dict[str, Group] = {}
    made: Counter[str] = Counter()
    for now, _, event in sorted(events, key=lambda one: one[:2]):
        if now >= terms.stop and event not in ("count", "begin"):
            continue
        if isinstance(event, Group):
            if counts and event.incarnation:
                for count in counts.values():
                    count.resolve(now)
            alive[event.name] = event
            if is_counting:
                counts[event] = Count(event, now + 1, made[event.name], absolute=True)
                made[event.name] += 1
                if has_begun:
                    recording.lanes.append(counts[event].begin(terms, now + 1, 0, "made"))
        elif event == "count":
            is_counting = True
            for group in alive.values():
                counts[group] = Count(group, 0, 0, absolute=sequences[group] == 0)
                made[group.name] += 1
        elif event == "begin":
            has_begun = True
            for name in alive:
                count = counts[alive[name]]
                count.resolve(now)
                count.sources.clear()
                recording.lanes.append(count.begin(terms, now, sequences[count.group], "begin"))
        else:
            _do(event, recording, sequences, orders, seen, is_deaf=_served_by(event.op) in deaf, chance=chance)
            if is_counting and event.op.is_message:
                counts[event.op.group].add(event)
            elif is_counting and event.op.op == "monitored_barrier_":
                counts[event.op.group].excess += event.taken - 1
    for count in counts.values():
        count.resolve(terms.stop)
        if terms.has_end and any(
            entry["made_ns"] == count.made_ns and entry["name"] == count.group.name for entry in recording.lanes
        ):
            recording.lanes.append(count.end())
    return recording


def _served_by(op: Op) -> tuple[object, ...]:
    """What one thread does: a lane, or a group's collectives."""
    return (op.group, op.op, op.peer, op.tag) if op.is_message else (op.group, "collectives")


def _do(
    one: Done,
    recording: Recording,
    sequences: Counter[Group],
    orders: Counter[tuple[Group, bool]],
    seen: dict[str, list[Group]],
    *,
    is_deaf: bool,
    chance: random.Random,
) -> None:
    terms, op = recording.terms, one.op
    if one.begin >= terms.begin:
        if is_deaf:
            recording.unheard.append(one)
        else:
            lives = seen.setdefault(op.group.name, [])
            if op.group not in lives:
                lives.append(op.group)
            for is_failed in (True, False):
                if is_failed and chance.random() >= terms.failing:
                    continue
                node = len(recording.starts)
                record = _record(one, terms, node, orders[op.group, op.is_message], sequences[op.group])
                record = replace(record, incarnation=lives.index(op.group), is_failed=is_failed)
                recording.records.append((record, None if is_failed else one))
                recording.group_of[node] = op.group
                recording.starts[node] = one.begin - 2 * is_failed
                orders[op.group, op.is_message] += 1
    sequences[op.group] += 0 if op.is_message and op.group.backend == "nccl" else one.taken


def _record(one: Done, terms: Terms, node: int, order: int, sequence: int) -> CommRecord:
    op = one.op
    has_end = op.is_receive and terms.keeps_work_ends and one.work_end is not None
    return CommRecord(
        node=node,
        op=f"c10d::{op.op}",
        group=op.group.ranks,
        group_name=op.group.name,
        order=order,
        backend_sequence=sequence,
        peer=op.peer if op.op in ("send", "recv_") else -1,
        tag=op.tag,
        reduce_op=0,
        is_async=True,
        work_start_ns=one.begin if has_end else None,
        work_end_ns=one.work_end if has_end else None,
        sent_bytes=0 if op.is_receive else _BYTES * (len(op.group.ranks) if op.op == "reduce_scatter_" else 1),
        received_bytes=0 if op.op == "send" else _BYTES,
        dtypes="float32",
        backend=op.group.backend,
    )
