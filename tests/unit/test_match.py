"""Joining communications: whole ones are joined, others are listed with what is missing, nothing is guessed."""

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truedag.tracer.merge.match import match_communications
from truedag.tracer.merge.nodes import CommRecord
from truedag.tracer.merge.sequences import FAILED, MISSING, TWICE, UNKNOWN_SOURCE


def record(
    op: str,
    group: tuple[int, ...],
    order: int,
    *,
    name: str = "g",
    peer: int = -1,
    tag: int = 0,
    sequence: int = -1,
    sent: int = 0,
    received: int = 0,
    incarnation: int = 0,
    number: int | None = None,
    reduce_op: int = 0,
    dtypes: str = "",
    doubt: str = "",
) -> CommRecord:
    """A record of a rank whose recording began at a barrier of all."""
    return CommRecord(
        node=order,
        op=op,
        group=group,
        group_name=name,
        order=order,
        backend_sequence=sequence,
        peer=peer,
        tag=tag,
        reduce_op=reduce_op,
        is_async=False,
        work_start_ns=None,
        work_end_ns=None,
        sent_bytes=sent,
        received_bytes=received,
        incarnation=incarnation,
        number=number,
        dtypes=dtypes,
        doubt=doubt,
        from_barrier=True,
    )


def test_two_groups_over_the_same_ranks_stay_apart() -> None:
    ranks = {rank: [record("c10d::allreduce_", (0, 1), 0, name=name) for name in ("a", "b")] for rank in (0, 1)}
    matched = match_communications(ranks)
    assert [collective.group_name for collective in matched.collectives] == ["a", "b"]
    assert matched.unmatched == []


def test_a_rank_alone_in_its_group_began_at_one_point_with_itself() -> None:
    alone = [dataclasses.replace(record("c10d::allreduce_", (3,), order), from_barrier=False) for order in range(2)]
    matched = match_communications({3: alone})
    assert [collective.order for collective in matched.collectives] == [0, 1]
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


def test_what_is_in_doubt_is_listed_by_itself_with_the_reason() -> None:
    lone = record("c10d::recv_any_source_", (0, 1), 0, doubt=UNKNOWN_SOURCE)
    sends = [
        record("c10d::send", (0, 1), order, peer=0, number=order, doubt=doubt)
        for order, doubt in enumerate(("", MISSING))
    ]
    receives = [record("c10d::recv_", (0, 1), order + 1, peer=1, number=order) for order in range(2)]
    matched = match_communications({0: [lone, *receives], 1: sends})
    assert [(one.order, one.send.node, one.receive.node) for one in matched.messages] == [(0, 0, 1)]
    assert sorted((one.what, one.present, one.missing) for one in matched.unmatched) == [
        (MISSING, (1,), ()),
        (UNKNOWN_SOURCE, (0,), ()),
        ("receive without send", (0,), (1,)),
    ]


def test_a_message_whose_ends_differ_in_bytes_is_not_joined_nor_are_later_ones() -> None:
    ranks = {
        0: [record("c10d::send", (0, 1), order, peer=1, sent=count) for order, count in enumerate((8, 8, 12, 8))],
        1: [record("c10d::recv_", (0, 1), order, peer=0, received=count) for order, count in enumerate((8, 12, 8, 8))],
    }
    matched = match_communications(ranks)
    assert [one.order for one in matched.messages] == [0]
    assert len(matched.unmatched) == 6
    assert {"send and receive differ in bytes: 8 and 12"} <= {one.what for one in matched.unmatched}


@pytest.mark.parametrize(
    ("op", "good", "bad"),
    [
        ("allreduce_", [(8, 8), (8, 8)], [(8, 8), (4, 4)]),
        ("reduce_", [(8, 8), (8, 0)], [(8, 8), (4, 0)]),
        ("broadcast_", [(8, 0), (0, 8)], [(8, 0), (0, 4)]),
        ("allgather_", [(4, 12), (8, 12)], [(4, 12), (8, 8)]),
        ("_allgather_base_", [(0, 0), (0, 0)], [(4, 8), (4, 4)]),
        ("reduce_scatter_", [(12, 4), (12, 8)], [(12, 4), (8, 8)]),
        ("alltoall_base_", [(0, 4), (12, 8)], [(8, 4), (12, 8)]),
        ("gather_", [(4, 8), (4, 0)], [(4, 8), (8, 0)]),
        ("scatter_", [(8, 4), (0, 4)], [(8, 4), (0, 8)]),
        ("barrier", [(0, 0), (0, 0)], None),
    ],
)
def test_bytes_must_agree(op: str, good: list[tuple[int, int]], bad: list[tuple[int, int]] | None) -> None:
    for counts in (good, bad):
        if counts is None:
            continue
        peer = 0 if op in ("broadcast_", "reduce_", "gather_", "scatter_") else -1
        ranks = {
            rank: [record(f"c10d::{op}", (0, 1), 0, sent=sent, received=received, peer=peer)]
            for rank, (sent, received) in enumerate(counts)
        }
        matched = match_communications(ranks)
        assert len(matched.collectives) == (counts is good)
        assert all("bytes" in one.what for one in matched.unmatched)


def test_after_a_barrier_places_are_what_counts_if_nothing_was_numbered() -> None:
    for message in (True, False):  # in the recording, or before it
        first = [record("c10d::allreduce_", (0, 1), order, sequence=order + 7) for order in range(2)]
        second = [record("c10d::allreduce_", (0, 1), order, sequence=order + 6) for order in range(2)]
        if message:
            first.insert(0, record("c10d::send", (0, 1), 0, peer=1))
            second.append(record("c10d::recv_", (0, 1), 0, peer=0))
        matched = match_communications({0: first, 1: second})
        assert [one.order for one in matched.collectives] == [0, 1]
        assert matched.unmatched == []


def test_groups_made_again_under_one_name_stay_apart() -> None:
    ranks = {
        rank: [
            record("c10d::allreduce_", (0, 1), 0, sent=8 * (1 + again), received=8, incarnation=again)
            for again in range(2)
        ]
        for rank in range(2)
    }
    matched = match_communications(ranks)
    assert [one.records[0].sent_bytes for one in matched.collectives] == [8, 16]
    assert matched.unmatched == []


def test_a_record_is_never_put_in_place_of_another() -> None:
    twice = [record("c10d::allreduce_", (0, 1), 0), dataclasses.replace(record("c10d::allreduce_", (0, 1), 0), node=9)]
    matched = match_communications({0: twice, 1: twice[:1]})
    assert [one.records[0].node for one in matched.collectives] == [0]
    assert [(one.what, one.records[0].node) for one in matched.unmatched] == [("recorded twice", 9)]


def test_many_collectives_are_all_joined() -> None:
    group = tuple(range(8))
    ranks = {rank: [record("c10d::allreduce_", group, i, sent=8, received=8) for i in range(1600)] for rank in group}
    assert len(match_communications(ranks).collectives) == 1600


def test_places_are_not_compared_where_recordings_began_at_different_points() -> None:
    def begun(op: str, order: int, **told: int) -> CommRecord:
        return dataclasses.replace(record(op, (0, 1), order, **told), from_barrier=False)

    ranks = {
        0: [begun("c10d::send", 0, peer=1), begun("c10d::allreduce_", 0)],
        1: [begun("c10d::recv_", 0, peer=0), begun("c10d::allreduce_", 0)],
    }
    matched = match_communications(ranks)
    assert matched.messages == []
    assert matched.collectives == []
    assert [one.what.partition(":")[0] for one in matched.unmatched] == ["ambiguous"] * 4


def test_numbers_are_believed_before_places() -> None:
    def numbered(op: str, order: int, number: int, **told: int) -> CommRecord:
        return dataclasses.replace(record(op, (0, 1), order, **told), number=number)

    ranks = {
        0: [numbered("c10d::send", 0, 4, peer=1), numbered("c10d::send", 1, 5, peer=1)],
        1: [numbered("c10d::recv_", 0, 5, peer=0), numbered("c10d::recv_", 1, 6, peer=0)],
    }
    matched = match_communications(ranks)
    assert [(one.order, one.send.node, one.receive.node) for one in matched.messages] == [(5, 1, 0)]
    assert sorted(one.what for one in matched.unmatched) == ["receive without send", "send without receive"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"reduce_op": 3}, "ranks ran different reductions"),
        ({"peer": 1}, "ranks named different roots"),
        ({"op": "c10d::broadcast_"}, "ranks ran different operations"),
        ({"dtypes": "int32"}, "ranks gave different types: float32 on rank 0, int32 on rank 1"),
        ({"sent_bytes": 4}, "ranks reduce different numbers of bytes: 8 on rank 0, 4 on rank 1"),
    ],
)
def test_a_disagreement_is_named_and_numbers_go_on_after_it(change: dict[str, Any], what: str) -> None:
    ranks = {
        rank: [
            record("c10d::allreduce_", (0, 1), order, sent=8, received=8, dtypes="float32", number=order + 7)
            for order in range(3)
        ]
        for rank in range(2)
    }
    ranks[1][1] = dataclasses.replace(ranks[1][1], **change)
    matched = match_communications(ranks)
    assert [one.order for one in matched.collectives] == [7, 9]
    (broken,) = matched.unmatched
    assert (broken.what, broken.order, broken.present, broken.missing) == (what, 8, (0, 1), ())
    by_place = {rank: [dataclasses.replace(one, number=None) for one in some] for rank, some in ranks.items()}
    assert [one.order for one in match_communications(by_place).collectives] == [0]


def test_a_message_of_another_type_is_not_joined() -> None:
    send = record("c10d::send", (0, 1), 0, peer=1, sent=8, number=0, dtypes="float32")
    receive = record("c10d::recv_", (0, 1), 0, peer=0, received=8, number=0, dtypes="int64")
    matched = match_communications({0: [send], 1: [receive]})
    assert matched.messages == []
    assert {one.what for one in matched.unmatched} == {"send and receive differ in type: float32 and int64"}
    untold = dataclasses.replace(receive, dtypes="")
    assert len(match_communications({0: [send], 1: [untold]}).messages) == 1


def test_two_records_of_one_place_that_differ_make_it_unsure() -> None:
    some = [record("c10d::allreduce_", (0, 1), 0, sent=8, received=8, number=0)]
    other = dataclasses.replace(some[0], node=5, sent_bytes=4)
    matched = match_communications({0: [*some, other], 1: some})
    assert matched.collectives == []
    assert sorted((one.what, one.present) for one in matched.unmatched) == [(TWICE, (0, 1)), ("recorded twice", (0,))]


def test_groups_whose_lives_nobody_counted_are_joined_only_if_there_was_one() -> None:
    def late(life: int) -> CommRecord:
        return record("c10d::allreduce_", (0, 1), 0, incarnation=-1 - life, number=0)

    assert len(match_communications({0: [late(0)], 1: [late(0)]}).collectives) == 1
    matched = match_communications({0: [late(0), late(1)], 1: [late(0)]})
    assert matched.collectives == []
    assert ["several groups" in one.what for one in matched.unmatched] == [True] * 3


def test_what_failed_and_what_is_of_no_known_group_stays_alone() -> None:
    ranks = {
        rank: [record("c10d::allreduce_", (0, 1), 0, doubt=FAILED), record("c10d::allreduce_", (), 0)]
        for rank in (0, 1)
    }
    matched = match_communications(ranks)
    assert matched.collectives == []
    assert sorted(one.what for one in matched.unmatched) == [FAILED] * 2 + ["the ranks of its group are unknown"] * 2
