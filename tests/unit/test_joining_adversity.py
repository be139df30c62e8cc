"""Whatever is missing, doubled, out of order or contradictory: nothing is joined that did not meet, and all that is
beyond doubt is.

Each case is a world (`joining_world`), recorded by each rank from where and as it likes, and then damaged. Its joins
are compared with what truly met:

- a join that is not in the truth is an error, always;
- what `beyond_doubt` names must be joined: it says, apart from the code under test, what a rank's counts decide;
- every other record is listed once, with those of the same communication, and with the ranks that lack one.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from joining_world import NS_BETWEEN, Done, Group, Recording, Terms, World, make_world, record_rank

from truedag.tracer.merge.match import Matched, match_communications
from truedag.tracer.merge.nodes import CommRecord

NUM_CASES = 10_000
NUM_QUICK = 800


def draw_terms(world: World, chance: random.Random) -> dict[int, Terms]:
    begun = [one.begin for mine in world.done.values() for one in mine]
    last = max(*begun, world.remade, world.quiet or 0) + 2 * NS_BETWEEN
    is_hard = chance.random() < 0.5
    is_barrier = world.quiet is not None and chance.random() < 0.35
    all_terms = {}
    for rank in world.done:
        if is_hard and chance.random() < 0.1:
            continue  # it recorded nothing
        if is_barrier and world.quiet is not None:
            begin = world.quiet + 1
        else:
            begin = 1 if chance.random() < 0.4 else chance.randrange(1, last) // (1 if is_hard else 3) + 1
        stop = last if chance.random() < (0.4 if is_hard else 0.8) else chance.randrange(begin, last + 1)
        begin_read = begin if chance.random() < 0.85 else min(stop, begin + chance.randrange(4) * NS_BETWEEN)
        if begin <= world.remade <= begin_read:
            begin_read = begin
        hears_all = not is_hard or chance.random() < 0.7
        all_terms[rank] = Terms(
            begin=begin,
            stop=max(stop, begin_read),
            counts_from=begin_read if chance.random() < 0.2 else 0,
            synchronized=is_barrier,
            begin_read=begin_read,
            is_busy=is_hard and chance.random() < 0.06,
            has_end=not hears_all or chance.random() < 0.75,
            hears_all=hears_all,
            unheard=chance.choice((0.0, 0.3)),
            keeps_work_ends=hears_all,
            failing=chance.choice((0.0, 0.0, 0.1)) if is_hard else 0.0,
        )
    late = {terms.counts_from > world.remade for terms in all_terms.values() if terms.counts_from}
    if len(late) > 1 and not is_barrier:  # numbering believes that those who count late saw the same groups first
        all_terms = {rank: replace(terms, counts_from=0) for rank, terms in all_terms.items()}
    return all_terms


def damage(recording: Recording, chance: random.Random) -> None:
    """Lose, contradict, double and reorder what was recorded."""
    if chance.random() < 0.4:
        lose(recording, chance)
    if recording.records and chance.random() < 0.15:
        at = chance.randrange(len(recording.records))
        recording.records[at] = altered(recording, at, chance)
    for _ in range(chance.choice((0, 0, 0, 1, 2)) if recording.records else 0):
        at = chance.randrange(len(recording.records))
        record, one = recording.records[at]
        node = len(recording.starts)
        recording.starts[node] = recording.starts[record.node]
        recording.group_of[node] = recording.group_of[record.node]
        if record.node in recording.altered:
            recording.altered.add(node)
        recording.records.append((replace(record, node=node), one))
        if chance.random() < 0.2:
            recording.records[-1] = altered(recording, len(recording.records) - 1, chance)
    if chance.random() < 0.3:
        chance.shuffle(recording.records)


def lose(recording: Recording, chance: random.Random) -> None:
    num = len(recording.records)
    where = chance.choice(("start", "middle", "end", "anywhere"))
    count = chance.randint(1, 3)
    at = {"start": 0, "middle": chance.randrange(num + 1), "end": max(num - count, 0)}.get(where, 0)
    some = set(range(at, at + count)) if where != "anywhere" else {i for i in range(num) if chance.random() < 0.2}
    # Numbering believes that none of what is missing failed, or was begun before the counts were read.
    begin_read = recording.terms.begin_read
    some -= {i for i, (_, one) in enumerate(recording.records) if one is None or one.begin < begin_read}
    if not recording.terms.has_end:
        # A rank that was killed has written all up to then: of a group's messages the last are not lost alone.
        groups = recording.group_of
        last = {groups[record.node]: i for i, (record, _) in enumerate(recording.records) if record.is_p2p}
        some -= set(last.values())
    recording.lost = [one for i, one in enumerate(recording.records) if i in some]
    recording.records = [one for i, one in enumerate(recording.records) if i not in some]


def altered(recording: Recording, at: int, chance: random.Random) -> tuple[CommRecord, Done | None]:
    record, one = recording.records[at]
    changes = [{"dtypes": "int32"}, {"sent_bytes": record.sent_bytes + 4, "received_bytes": record.received_bytes + 4}]
    if not record.is_p2p:
        changes += [{"reduce_op": 3}, {"peer": record.group[0]}]
        changes += [{"op": "c10d::_allgather_base_"}] if record.op == "c10d::allreduce_" else []
    if record.op in ("c10d::monitored_barrier_", "c10d::recv_any_source_"):
        changes = changes[:1]
    recording.altered.add(record.node)
    return replace(record, **chance.choice(changes)), one


def label(recording: Recording, group: Group) -> object:
    """Which of the groups of its name a rank takes a group for."""
    terms = recording.terms
    if terms.synchronized or not terms.counts_from:
        return group.incarnation
    return "late", group.incarnation - (terms.counts_from > recording.world.remade and group.name == "1")


def orders_lost(recording: Recording, group: Group, *, messages: bool) -> list[int]:
    """The recorder's numbers of what is missing, or is there in two ways; -1 for what it never heard."""
    lost = [record.order for record, _ in recording.lost if is_of(recording, record, group, messages=messages)]
    by_order: dict[int, set[str]] = {}
    for record, _ in recording.records:
        if is_of(recording, record, group, messages=messages):
            by_order.setdefault(record.order, set()).add(str(replace(record, node=0)))
    unheard = [-1 for one in recording.unheard if one.op.group == group and one.op.is_message == messages]
    return lost + unheard + [order for order, some in by_order.items() if len(some) > 1]


def is_of(recording: Recording, record: CommRecord, group: Group, *, messages: bool) -> bool:
    return recording.group_of[record.node] == group and record.is_p2p == messages


def is_numbered(recording: Recording, one: Done, order: int) -> bool:
    """Whether the rank's counts say beyond doubt which of its group's or lane's this is."""
    op, terms = one.op, recording.terms
    count = recording.counts[op.group]
    is_absolute = is_counted_from_the_start(recording, op.group)
    lost, lost_collectives = (orders_lost(recording, op.group, messages=messages) for messages in (True, False))
    is_early = one.begin < terms.begin_read  # by another thread, before the counts were read
    if op.is_message:
        is_lossy = bool(lost) and (not terms.hears_all or terms.begin_read > terms.begin)
        if terms.is_busy or is_early or is_lossy or not is_absolute or any(other < order for other in lost):
            return False
        return not op.is_receive or is_served_alone(recording, one, lost)
    if op.group.backend == "nccl":
        return True
    if not is_absolute:
        return False
    takes_more = any(special(recording.world, op.group))
    if takes_more and any(other < order for other in lost_collectives):
        return False
    if not count.messages and not any(is_of(recording, one, op.group, messages=True) for one, _ in recording.records):
        return True
    return not (terms.is_busy or is_early or lost or lost_collectives)


def is_counted_from_the_start(recording: Recording, group: Group) -> bool:
    """Whether a rank's counts are of all that happened on a group; one that it found there may have sent unseen."""
    count = recording.counts[group]
    return count.absolute and (count.made_ns > 0 or group.backend == "gloo")


def is_placed(recording: Recording, one: Done) -> bool:
    """Whether its place since the barrier is beyond doubt, where nobody counted."""
    op, terms = one.op, recording.terms
    lost = orders_lost(recording, op.group, messages=op.is_message)
    if not op.is_message:
        return True
    from_any = any(
        other.op.op == "recv_any_source_" and other.op.group == op.group
        for other in recording.world.done[recording.rank]
    )
    return not (lost or terms.is_busy or one.begin < terms.begin_read or from_any or recording.altered)


def special(world: World, group: Group) -> list[Done]:
    """The collectives of a group that take more than one of the backend's numbers."""
    return [one for mine in world.done.values() for one in mine if one.op.group == group and one.taken > 1]


def is_served_alone(recording: Recording, one: Done, lost: list[int]) -> bool:
    """Whether no receive from any source makes it unsure which message a receive got."""
    terms, op = recording.terms, one.op
    alike = [
        other
        for other in recording.world.done[recording.rank]
        if other.op.is_receive and other.op.group == op.group and other.op.tag == op.tag and other.begin < terms.stop
    ]
    from_any = [other for other in alike if other.op.op == "recv_any_source_"]
    if not from_any:
        return True
    if lost or not terms.has_end or not terms.keeps_work_ends:
        return False
    if any(other.begin < terms.begin and (other.matched is None or other.matched >= terms.begin) for other in from_any):
        return False
    for other in from_any:
        if other.matched is None or other.matched > terms.stop or other.work_end is None:
            return False
        if any(other.begin < later.begin < other.work_end for later in alike if later.op.op != "recv_any_source_"):
            return False
    return True


def ends_of(one: Done) -> tuple[int, ...]:
    """The ranks that must have recorded a communication for it to be whole; (): it never was."""
    if not one.op.is_message:
        return one.op.group.ranks
    return () if one.partner is None else (one.rank, one.partner.rank)


def name_of(one: Done) -> tuple[object, ...]:
    """A communication by what truly met: a collective by its number in the program, a message by its send's."""
    if not one.op.is_message:
        return "collective", one.op.number
    send = one if one.op.op == "send" or one.partner is None else one.partner
    return send.op.op, send.rank, send.op.number


def beyond_doubt(recordings: dict[int, Recording]) -> set[tuple[object, ...]]:
    """The communications that must be joined."""
    told: dict[tuple[object, ...], dict[int, tuple[Done, list[CommRecord]]]] = {}
    for rank, recording in recordings.items():
        for record, one in recording.records:
            if one is not None:
                told.setdefault(name_of(one), {}).setdefault(rank, (one, []))[1].append(record)
    whole = set()
    for name, there in told.items():
        first = next(iter(there.values()))[0]
        ends = ends_of(first)
        if not ends or set(ends) != set(there):
            continue
        some = [recordings[rank] for rank in ends]
        if any(record.node in recordings[rank].altered for rank in ends for record in there[rank][1]):
            continue
        group = first.op.group
        labels = {label(recording, group) for recording in some}
        if any(isinstance(one, tuple) for one in labels):  # then nobody may take it for another
            labels |= {label(recording, group) for rank, recording in recordings.items() if rank in group.ranks}
        if len(labels) > 1 or (isinstance(labels.pop(), tuple) and group.name == "1"):
            continue
        is_counted = [
            is_counted_from_the_start(recording, group) or (group.backend == "nccl" and not first.op.is_message)
            for recording in some
        ]
        if all(is_counted):
            is_certain = all(is_numbered(recordings[rank], one, found[0].order) for rank, (one, found) in there.items())
        elif not all(recording.terms.synchronized for recording in some):
            is_certain = False
        elif first.op.is_message:
            is_certain = is_whole_lane(first, recordings) and all(is_placed(recordings[r], there[r][0]) for r in ends)
        else:
            is_certain = not any(r.altered for r in some) and all(is_placed(recordings[r], there[r][0]) for r in ends)
        if is_certain:
            whole.add(name)
    return whole


def is_whole_lane(one: Done, recordings: dict[int, Recording]) -> bool:
    """Whether both ends of a message's lane recorded equally many."""
    assert one.partner is not None
    send, receive = (one, one.partner) if one.op.op == "send" else (one.partner, one)
    nums = [
        len(
            {
                record.order
                for record, other in recordings[end.rank].records
                if other is not None
                and (other.op.group, other.op.op, other.op.peer, other.op.tag)
                == (end.op.group, end.op.op, end.op.peer, end.op.tag)
            }
        )
        for end in (send, receive)
    ]
    return nums[0] == nums[1]


def check(matched: Matched, recordings: dict[int, Recording]) -> int:
    """Hold joins against the truth; return how many there are."""
    truth = {rank: {record.node: one for record, one in recording.records} for rank, recording in recordings.items()}
    joined = []
    listed: Counter[tuple[int, int]] = Counter()
    for collective in matched.collectives:
        assert tuple(collective.records) == collective.group
        ends = [truth[rank][record.node] for rank, record in collective.records.items()]
        (name,) = {None if end is None else name_of(end) for end in ends}  # or it has joined what never met
        assert name is not None
        joined.append(name)
        listed.update((rank, record.node) for rank, record in collective.records.items())
    for message in matched.messages:
        send, receive = truth[message.source][message.send.node], truth[message.destination][message.receive.node]
        assert send is not None
        assert send.partner is receive, "joined what never met"
        joined.append(name_of(send))
        listed.update([(message.source, message.send.node), (message.destination, message.receive.node)])
    assert len(set(joined)) == len(joined)
    refused = beyond_doubt(recordings) - set(joined)
    assert not refused, f"not joined, and beyond doubt: {refused}"
    in_doubt = {
        (rank, record.node) for one in matched.unmatched if not one.missing for rank, record in one.records.items()
    }
    for one in matched.unmatched:
        assert one.what
        assert one.present == tuple(one.records)
        listed.update((rank, record.node) for rank, record in one.records.items())
        ends = [truth[rank][record.node] for rank, record in one.records.items()]
        if len(ends) > 1 or one.missing:
            (name,) = {None if end is None else name_of(end) for end in ends}  # or it lists together what never met
            assert name is not None
        if one.missing and ends[0] is not None and not ends[0].op.is_message:
            assert sorted(one.present + one.missing) == sorted(ends[0].op.group.ranks)
        for rank in one.missing if ends[0] is not None else ():
            # Of a rank that is said to be missing there is no record, or one whose number is in doubt.
            for record, end in recordings[rank].records if rank in recordings else ():
                assert end is None or name_of(end) != name_of(ends[0]) or (rank, record.node) in in_doubt
    everything = {(rank, node): 1 for rank, some in truth.items() for node in some}
    assert listed == everything
    return len(joined)


def run_case(seed: int) -> tuple[int, int]:
    """Return how many communications were joined, and how many records were left alone."""
    chance = random.Random(seed)
    world = make_world(chance)
    recordings = {rank: record_rank(world, rank, terms, chance) for rank, terms in draw_terms(world, chance).items()}
    for recording in recordings.values():
        damage(recording, chance)
    matched = match_communications({rank: recording.numbered() for rank, recording in recordings.items()})
    return check(matched, recordings), len(matched.unmatched)


def run_cases(seeds: range) -> None:
    num_joined = num_alone = 0
    for seed in seeds:
        try:
            joined, alone = run_case(seed)
        except (AssertionError, ValueError, KeyError) as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        num_joined += joined
        num_alone += alone
    # The worlds are neither all in order nor all in ruins.
    assert num_joined > len(seeds)
    assert num_alone > len(seeds)


def test_nothing_is_joined_that_did_not_meet_and_all_that_is_beyond_doubt_is() -> None:
    run_cases(range(NUM_QUICK))


@pytest.mark.slow
def test_ten_thousand_worlds() -> None:
    run_cases(range(NUM_QUICK, NUM_CASES))


def test_what_is_whole_is_all_beyond_doubt() -> None:
    """The check promises something: of ranks that record everything, all but what may be from any source."""
    for seed in range(100):
        chance = random.Random(seed)
        world = make_world(chance)
        everything = [one for mine in world.done.values() for one in mine]
        stop = max(world.remade, world.quiet or 0, *(one.begin for one in everything)) + 1
        terms = Terms(begin=1, stop=stop, counts_from=0, begin_read=1)
        recordings = {rank: record_rank(world, rank, terms, chance) for rank in world.done}
        met = {name_of(one) for one in everything if ends_of(one)}
        unsure = {(one.op.group, one.rank, one.op.tag) for one in everything if one.op.op == "recv_any_source_"}
        sure = {
            name_of(one)
            for one in everything
            if ends_of(one) and not any((one.op.group, rank, one.op.tag) in unsure for rank in ends_of(one))
        }
        assert sure <= beyond_doubt(recordings) <= met
