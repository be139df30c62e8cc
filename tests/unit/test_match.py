"""Joining communications: whole ones are joined, others are listed with what is missing, nothing is guessed."""

import dataclasses
import itertools

from hypothesis import given
from hypothesis import strategies as st

from truedag.tracer.match import match_communications
from truedag.tracer.nodes import CommRecord


def record(op: str, group: tuple[int, ...], order: int, *, name: str = "g", peer: int = -1, tag: int = 0) -> CommRecord:
    return CommRecord(
        node=order,
        op=op,
        group=group,
        group_name=name,
        order=order,
        backend_sequence=-1,
        peer=peer,
        tag=tag,
        reduce_op=0,
        is_async=False,
        work_start_ns=None,
        work_end_ns=None,
    )


def test_two_groups_over_the_same_ranks_stay_apart() -> None:
    ranks = {rank: [record("c10d::allreduce_", (0, 1), 0, name=name) for name in ("a", "b")] for rank in (0, 1)}
    matched = match_communications(ranks)
    assert [collective.group_name for collective in matched.collectives] == ["a", "b"]
    assert matched.unmatched == []


def test_a_missing_record_is_named_with_the_ranks_that_lack_it() -> None:
    whole = [record("c10d::allreduce_", (0, 1, 2), order) for order in range(3)]
    matched = match_communications({0: whole, 1: whole[:2], 2: whole})
    assert len(matched.collectives) == 2
    (broken,) = matched.unmatched
    assert (broken.order, broken.present, broken.missing) == (2, (0, 2), (1,))


def test_ranks_that_disagree_are_not_joined() -> None:
    matched = match_communications(
        {0: [record("c10d::allreduce_", (0, 1), 0)], 1: [record("c10d::broadcast_", (0, 1), 0)]}
    )
    assert matched.collectives == []
    assert matched.unmatched[0].what == "ranks ran different operations"


def test_messages_both_ways_and_under_tags_find_their_ends() -> None:
    group = (4, 7)
    ranks = {
        4: [record("c10d::send", group, 0, peer=7), record("c10d::recv_", group, 1, peer=7),
            record("c10d::send", group, 2, peer=7, tag=5), record("c10d::send", group, 3, peer=7)],
        7: [record("c10d::recv_", group, 0, peer=4, tag=5), record("c10d::recv_", group, 1, peer=4),
            record("c10d::send", group, 2, peer=4), record("c10d::recv_", group, 3, peer=4)],
    }  # fmt: skip
    matched = match_communications(ranks)
    ends = sorted((one.source, one.send.node, one.receive.node) for one in matched.messages)
    assert ends == [(4, 0, 1), (4, 2, 0), (4, 3, 3), (7, 2, 1)]
    assert matched.unmatched == []


@given(st.integers(2, 4), st.integers(1, 6), st.data())
def test_nothing_is_dropped_or_invented_when_records_are_lost(size: int, count: int, data: st.DataObject) -> None:
    group = tuple(range(size))
    lost = data.draw(st.sets(st.sampled_from(list(itertools.product(group, range(count))))))
    ranks = {
        rank: [record("c10d::allreduce_", group, order) for order in range(count) if (rank, order) not in lost]
        for rank in group
    }
    matched = match_communications(ranks)
    whole = {order for order in range(count) if not any((rank, order) in lost for rank in group)}
    assert {one.order for one in matched.collectives} == whole
    told = {(rank, one.order) for one in matched.unmatched for rank in one.present}
    missing = {(rank, one.order) for one in matched.unmatched for rank in one.missing}
    gone = {order for order in range(count) if all((rank, order) in lost for rank in group)}
    assert missing == {(rank, order) for rank, order in lost if order not in gone}
    assert told == {(r, o) for r in group for o in range(count) if (r, o) not in lost and o not in whole}


def test_a_receive_from_anybody_is_listed_and_not_guessed() -> None:
    lone = dataclasses.replace(record("c10d::recv_any_source_", (0, 1), 0), peer=-1)
    matched = match_communications({0: [lone], 1: [record("c10d::send", (0, 1), 0, peer=0)]})
    assert matched.messages == []
    assert {one.what for one in matched.unmatched} == {"receive from any source", "send without receive"}
