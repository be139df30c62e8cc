"""Whatever part of a program each rank recorded: what both ends recorded is joined, and nothing else."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from truedag.tracer.merge.match import Matched, match_communications
from truedag.tracer.merge.nodes import CommRecord
from truedag.tracer.merge.numbering import number_communications

NS_BETWEEN = 10


@dataclass(frozen=True, slots=True)
class Group:
    name: str
    ranks: tuple[int, ...]
    incarnation: int
    made_at: int  # place in the program


@dataclass(frozen=True, slots=True)
class Step:
    """A communication of the program."""

    number: int
    group: Group
    op: str  # allreduce_, monitored_barrier_ or message
    source: int = -1
    destination: int = -1
    tag: int = -1
    from_anybody: bool = False


@dataclass(frozen=True, slots=True)
class End:
    """What one rank does of a communication."""

    step: Step
    op: str
    peer: int = -1
    numbers_taken: int = 1  # by a collective, of the backend's

    @property
    def lane(self) -> tuple[Group, int, int, bool]:
        return self.step.group, self.peer, self.step.tag, self.op == "send"


def program(random_state: random.Random, num_ranks: int, length: int) -> list[Step]:
    """A program of messages and collectives over one group of all, and one that is made again in the middle."""
    some = tuple(sorted(random_state.sample(range(num_ranks), 2)))
    groups = [Group("0", tuple(range(num_ranks)), 0, 0), Group("1", some, 0, 0)]
    steps = []
    for number in range(length):
        if number == length // 2:
            groups[1] = replace(groups[1], incarnation=1, made_at=number)
        group = random_state.choice(groups)
        if random_state.random() < 0.4:
            op = "monitored_barrier_" if random_state.random() < 0.2 else "allreduce_"
            steps.append(Step(number, group, op))
        else:
            source, destination = random_state.sample(group.ranks, 2)
            tag, anybody = random_state.randrange(2), random_state.random() < 0.3
            steps.append(Step(number, group, "message", source, destination, tag, anybody))
    return steps


def ends_on(rank: int, steps: Sequence[Step], random_state: random.Random) -> list[End]:
    """What a rank does, in its own order: messages of different lanes overtake each other."""
    ends = []
    for step in steps:
        if step.op != "message":
            size, is_first = len(step.group.ranks), rank == step.group.ranks[0]
            taken = 1 if step.op == "allreduce_" else 2 * (size - 1) if is_first else 2
            ends.extend([End(step, step.op, numbers_taken=taken)] if rank in step.group.ranks else [])
        elif rank == step.source:
            ends.append(End(step, "send", step.destination))
        elif rank == step.destination:
            ends.append(End(step, "recv_any_source_" if step.from_anybody else "recv_", step.source))
    for i in range(len(ends) - 1):
        here, after = ends[i], ends[i + 1]
        alike = here.step.op == after.step.op == "message" and here.step.group == after.step.group
        if alike and here.lane != after.lane and random_state.random() < 0.3:
            ends[i : i + 2] = after, here
    return ends


@dataclass(slots=True)
class Count:
    """What a rank knows of a group, as `record.counters` keeps it."""

    group: Group
    made_ns: int
    sequence: int = 0
    messages: int = 0
    excess: int = 0
    done: Counter[tuple[int, int, bool]] = field(default_factory=Counter)  # by peer, tag, whether sent
    open: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # tag, source, when it will be done
    sources: dict[int, int] = field(default_factory=dict)

    def settle(self, now: int) -> None:
        for number, (tag, source, when) in list(self.open.items()):
            if when <= now:
                del self.open[number]
                self.done[source, tag, False] += 1
                self.sources[number] = source

    def begin(self, now: int, *, counted: bool) -> dict[str, Any]:
        lanes = {(peer, tag) for peer, tag, _ in self.done}
        return {
            "at": "begin",
            "name": self.group.name,
            "made_ns": self.made_ns,
            "incarnation": self.group.incarnation,
            "absolute": True,
            "synchronized": False,
            "time_ns": now,
            "messages": self.messages,
            "excess": self.excess,
            "counted": counted if self.messages else None,
            "busy": False,
            "lanes": [[peer, tag, self.done[peer, tag, True], self.done[peer, tag, False]] for peer, tag in lanes],
            "open": [[number, tag] for number, (tag, _, _) in self.open.items()],
        }

    def end(self) -> dict[str, Any]:
        told = {"at": "end", "name": self.group.name, "made_ns": self.made_ns, "messages": self.messages}
        return told | {"sources": [[number, source] for number, source in self.sources.items()]}


def recorded(
    ends: Sequence[End], start: int, stop: int, *, waits: int, counted: bool
) -> tuple[list[CommRecord], dict[int, Step]]:
    """What a recording of ends[start:stop] holds, numbered; the step of each of its nodes.

    `waits`: receives from any source are done so many communications after they began. `counted`: the backend counts
    messages among the collectives.
    """
    alive: dict[str, Count] = {}
    gone: list[Count] = []
    orders: Counter[tuple[Group, bool]] = Counter()
    records: list[CommRecord] = []
    lanes: list[Mapping[str, Any]] = []
    truth: dict[int, Step] = {}
    for i, end in enumerate(ends[:stop]):
        group, step, now = end.step.group, end.step, i * NS_BETWEEN
        for other in alive.values():
            other.settle(i)
        if i == start:
            lanes.extend(other.begin(now, counted=counted) for other in alive.values())
            for other in alive.values():
                other.sources.clear()
        count = alive.get(group.name)
        if count is None or count.group != group:
            gone.extend([count] if count is not None and i >= start else [])
            count = alive[group.name] = Count(group, made_ns=now)
            if i >= start:
                lanes.append(count.begin(now, counted=counted) | {"at": "made"})
        if i >= start:
            is_message = step.op == "message"
            truth[i] = step
            records.append(
                CommRecord(
                    node=i,
                    op=f"c10d::{end.op}",
                    group=group.ranks,
                    group_name=group.name,
                    order=orders[group, is_message],
                    backend_sequence=count.sequence,
                    peer=-1 if end.op == "recv_any_source_" else end.peer,
                    tag=step.tag,
                    reduce_op=0,
                    is_async=False,
                    work_start_ns=None,
                    work_end_ns=None,
                    sent_bytes=8,
                    received_bytes=8,
                )
            )
            orders[group, is_message] += 1
        if step.op == "message":
            peer = group.ranks.index(end.peer)
            if end.op == "recv_any_source_":
                count.open[count.messages] = (step.tag, peer, i + waits)
            else:
                count.done[peer, step.tag, end.op == "send"] += 1
            count.messages += 1
            count.sequence += counted
        else:
            taken = end.numbers_taken
            count.sequence += taken
            count.excess += taken - 1
    for count in (*alive.values(), *gone):
        count.settle(stop)
        lanes.append(count.end())
    return number_communications(records, [record.node * NS_BETWEEN for record in records], lanes), truth


def joined(matched: Matched, truth: Mapping[int, Mapping[int, Step]]) -> set[Step]:
    """The communications that were joined; each of its records must be of the same one."""
    found = []
    for collective in matched.collectives:
        steps = {truth[rank][record.node] for rank, record in collective.records.items()}
        assert len(steps) == 1
        found.append(steps.pop())
    for message in matched.messages:
        step = truth[message.source][message.send.node]
        assert step == truth[message.destination][message.receive.node]
        found.append(step)
    assert len(set(found)) == len(found)
    return set(found)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 4), st.integers(2, 40), st.booleans())
def test_what_all_its_ranks_recorded_is_joined_wherever_they_began(
    seed: int, num_ranks: int, length: int, counted: bool
) -> None:
    chance = random.Random(seed)
    steps = program(chance, num_ranks, length)
    records: dict[int, list[CommRecord]] = {}
    truth: dict[int, dict[int, Step]] = {}
    for rank in range(num_ranks):
        if num_ranks > 2 and chance.random() < 0.15:
            continue  # it recorded nothing at all
        ends = ends_on(rank, steps, chance)
        start, stop = sorted(chance.randrange(len(ends) + 1) for _ in range(2))
        records[rank], truth[rank] = recorded(ends, start, stop, waits=1, counted=counted)
    matched = match_communications(records)
    seen = {rank: set(found.values()) for rank, found in truth.items()}
    whole = {
        step
        for step in steps
        if all(
            step in seen.get(rank, ())
            for rank in ((step.source, step.destination) if step.op == "message" else step.group.ranks)
        )
    }
    assert joined(matched, truth) == whole
    alone = Counter(rank for one in matched.unmatched for rank in one.records)
    for rank, found in truth.items():
        assert alone[rank] == sum(step not in whole for step in found.values())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 4), st.integers(2, 30), st.integers(1, 12))
def test_receives_from_any_source_that_are_done_late_are_never_taken_for_others(
    seed: int, num_ranks: int, length: int, waits: int
) -> None:
    chance = random.Random(seed)
    steps = program(chance, num_ranks, length)
    records: dict[int, list[CommRecord]] = {}
    truth: dict[int, dict[int, Step]] = {}
    for rank in range(num_ranks):
        ends = ends_on(rank, steps, chance)
        start = chance.randrange(len(ends) + 1)
        records[rank], truth[rank] = recorded(ends, start, len(ends), waits=waits, counted=True)
    joined(match_communications(records), truth)
