"""What a rank's counts tell of each of its communications, and what they cannot: one situation after the other.

`test_joining_adversity` puts them together at random and holds the joins against the truth.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from truedag.tracer.merge.nodes import CommRecord
from truedag.tracer.merge.numbering import number_communications
from truedag.tracer.merge.sequences import (
    FAILED,
    FROM_ANYBODY,
    MAY_FOLLOW_MONITORED,
    MISSING,
    REPEATED,
    TWICE,
    UNCOUNTED,
    UNKNOWN_SOURCE,
)

NS = 10


@dataclass
class Rank:
    """Rank 0 of a group of three, and its recording, in which it does one thing every 10 ns."""

    backend: str = "gloo"
    sequence: int = 0
    records: list[CommRecord] = field(default_factory=list)

    def do(self, op: str, *, peer: int = -1, tag: int = -1, failed: bool = False, end_ns: int | None = None) -> None:
        is_p2p = op in ("send", "recv_", "recv_any_source_")
        self.records.append(
            CommRecord(
                node=len(self.records),
                op=f"c10d::{op}",
                group=(0, 1, 2),
                group_name="g",
                order=sum(one.is_p2p == is_p2p for one in self.records),
                backend_sequence=self.sequence,
                peer=peer,
                tag=tag,
                reduce_op=0,
                is_async=False,
                work_start_ns=None,
                work_end_ns=end_ns,
                backend=self.backend,
                is_failed=failed,
            )
        )
        if not (failed or (is_p2p and self.backend == "nccl")):
            self.sequence += {"monitored_barrier_": 4, "reduce_scatter_": 3}.get(op, 1)

    def numbered(
        self,
        lanes: Sequence[Mapping[str, Any]],
        *,
        lost: Sequence[int] = (),
        hears_all: bool = True,
    ) -> list[tuple[int | None, str]]:
        """Each record's number and the doubt of it, without those that were lost."""
        records = [record for record in self.records if record.node not in lost]
        found = number_communications(records, [NS * (one.node + 1) for one in records], lanes, hears_all=hears_all)
        assert [one.node for one in found] == [one.node for one in records]
        return [(one.number, one.doubt) for one in found]


def begin(**told: Any) -> dict[str, Any]:
    return {
        "at": "begin",
        "name": "g",
        "made_ns": 1,
        "incarnation": 0,
        "absolute": True,
        "synchronized": False,
        "time_ns": 5,
        "messages": 0,
        "counted": None,
        "sequence": 0,
        "excess": 0,
        "busy": False,
        "lanes": [],
        "open": [],
    } | told


def end(messages: int, sources: Mapping[int, int] | None = None, made_ns: int = 1) -> dict[str, Any]:
    told = [[number, source] for number, source in (sources or {}).items()]
    return {"at": "end", "name": "g", "made_ns": made_ns, "messages": messages, "sources": told}


def test_messages_go_on_from_the_counts_of_their_lanes() -> None:
    rank = Rank(sequence=9)
    for peer, tag in ((1, 0), (1, 0), (2, 0), (1, 5)):
        rank.do("send", peer=peer, tag=tag)
        rank.do("recv_", peer=peer, tag=tag)
    told = begin(messages=9, sequence=9, counted=True, lanes=[[1, 0, 4, 2], [1, 5, 0, 3]])
    numbers = [number for number, _ in rank.numbered([told, end(17)])]
    assert numbers == [4, 2, 5, 3, 0, 0, 0, 3]


def test_from_a_missing_message_on_all_of_its_group_are_in_doubt() -> None:
    rank = Rank()
    for peer in (1, 2, 1, 2):
        rank.do("send", peer=peer, tag=0)
    for lanes in ([begin()], [begin(), end(4)]):
        found = rank.numbered(lanes, lost=[1])
        assert [doubt for _, doubt in found] == ["", MISSING, MISSING]
        assert found[0] == (0, "")


@pytest.mark.parametrize("hears_all", [True, False])
def test_what_was_counted_and_not_recorded_was_lost_at_the_end_if_the_recorder_hears_all(hears_all: bool) -> None:
    rank = Rank()
    for _ in range(3):
        rank.do("send", peer=1, tag=0)
    found = rank.numbered([begin(), end(3)], lost=[2], hears_all=hears_all)
    assert found == ([(0, ""), (1, "")] if hears_all else [(None, MISSING)] * 2) or not hears_all
    assert all(doubt == ("" if hears_all else MISSING) for _, doubt in found)


def test_a_recording_without_an_end_is_believed_up_to_there() -> None:
    rank = Rank()
    rank.do("send", peer=1, tag=0)
    rank.do("allreduce_")
    assert rank.numbered([begin(messages=2, counted=True, sequence=0, lanes=[[1, 0, 2, 0]])])[0] == (2, "")


def test_more_records_than_were_counted_show_that_counts_are_wrong() -> None:
    rank = Rank()
    for _ in range(3):
        rank.do("send", peer=1, tag=0)
    assert {doubt for _, doubt in rank.numbered([begin(), end(2)])} == {MISSING}


def test_a_receive_from_any_source_takes_its_place_in_the_lane_of_its_source() -> None:
    rank = Rank()
    rank.do("recv_any_source_", tag=0, end_ns=15)
    rank.do("recv_", peer=2, tag=0)
    rank.do("recv_", peer=1, tag=0)
    assert rank.numbered([begin(), end(3, {0: 2})]) == [(0, ""), (1, ""), (0, "")]


@pytest.mark.parametrize("end_ns", [21, None])
def test_one_that_waited_may_have_been_overtaken_by_a_receive_that_names_the_source(end_ns: int | None) -> None:
    rank = Rank()
    rank.do("recv_any_source_", tag=0, end_ns=end_ns)
    rank.do("recv_", peer=2, tag=0)
    rank.do("recv_", peer=1, tag=0)
    found = rank.numbered([begin(), end(3, {0: 2})])
    assert [doubt for _, doubt in found] == [FROM_ANYBODY, FROM_ANYBODY, ""]
    # What overtook it may be what is missing.
    assert rank.numbered([begin(), end(3, {0: 2})], lost=[1])[0][1] == FROM_ANYBODY
    assert rank.numbered([begin(), end(3, {0: 2})], lost=[1, 2])[0][1] == FROM_ANYBODY


def test_of_a_source_that_is_not_known_only_what_comes_before_is_sure() -> None:
    rank = Rank()
    rank.do("recv_", peer=1, tag=0)
    rank.do("recv_any_source_", tag=0)
    rank.do("recv_", peer=1, tag=0)
    rank.do("recv_", peer=1, tag=1)
    rank.do("send", peer=1, tag=0)
    doubts = [doubt for _, doubt in rank.numbered([begin()])]
    assert doubts == ["", UNKNOWN_SOURCE, FROM_ANYBODY, "", ""]


def test_one_that_was_open_when_recording_began_is_counted_where_it_ended_up() -> None:
    rank = Rank()
    rank.do("recv_", peer=1, tag=0)
    rank.do("recv_", peer=2, tag=0)
    told = begin(messages=1, counted=True, open=[[0, 0]])
    assert rank.numbered([told, end(3, {0: 2})]) == [(0, ""), (1, FROM_ANYBODY)]
    assert [doubt for _, doubt in rank.numbered([told, end(3)])] == [FROM_ANYBODY] * 2


def test_what_another_thread_sent_before_the_counts_were_read_is_not_counted_twice() -> None:
    rank = Rank()
    for _ in range(3):
        rank.do("send", peer=1, tag=0)
    told = begin(time_ns=15, messages=6, counted=True, lanes=[[1, 0, 6, 0]])
    assert rank.numbered([told, end(8)]) == [(5, ""), (6, ""), (7, "")]
    assert {doubt for _, doubt in rank.numbered([told | {"busy": True}, end(8)])} == {MISSING}


def test_a_group_that_was_found_there_may_have_carried_messages_that_its_backend_did_not_count() -> None:
    for backend, number in (("gloo", 0), ("nccl", None)):
        rank = Rank(backend)
        rank.do("send", peer=1, tag=0)
        assert rank.numbered([begin(made_ns=0), end(1, made_ns=0)]) == [(number, "")]


def test_collectives_are_counted_without_the_messages_between_them() -> None:
    rank = Rank(sequence=7)
    for op in ("allreduce_", "send", "allreduce_", "recv_", "send", "allreduce_"):
        rank.do(op, peer=1 if op != "allreduce_" else -1, tag=0)
    told = begin(messages=3, sequence=7, counted=True)
    found = rank.numbered([told, end(6)])
    assert [found[i] for i in (0, 2, 5)] == [(4, ""), (5, ""), (6, "")]
    # A message that is missing may have been on either side of the collective around which it is missing.
    for lost, expected in ((1, [4, None, 6]), (3, [4, None, 6]), (4, [4, 5, None])):
        numbers = [number for number, _ in rank.numbered([told, end(6)], lost=[lost])]
        kept = [i for i in range(6) if i != lost]
        assert [numbers[kept.index(i)] for i in (0, 2, 5)] == expected


def test_a_backend_that_counts_collectives_alone_needs_no_other_counts() -> None:
    rank = Rank("nccl", sequence=30)
    for op in ("allreduce_", "send", "allreduce_", "allreduce_"):
        rank.do(op, peer=1 if op == "send" else -1, tag=0)
    told = begin(made_ns=0, absolute=False, sequence=30)
    assert [number for number, _ in rank.numbered([told], lost=[1, 2])] == [30, 32]


def test_a_backend_that_may_count_messages_does_when_nobody_saw_how_many() -> None:
    rank = Rank(sequence=30)
    rank.do("allreduce_")
    told = begin(made_ns=0, absolute=False, sequence=30)
    assert rank.numbered([told, end(0, made_ns=0)]) == [(None, "")]


def test_monitored_barriers_and_lists_that_are_scattered_take_more_numbers() -> None:
    rank = Rank(sequence=8)
    for op in ("allreduce_", "monitored_barrier_", "allreduce_", "reduce_scatter_", "allreduce_"):
        rank.do(op)
    told = begin(excess=3, sequence=8)
    assert rank.numbered([told, end(0)]) == [(5, ""), (6, ""), (7, ""), (8, ""), (11, "")]
    # The barrier took more on some ranks than on others: without its record nobody knows.
    found = rank.numbered([told, end(0)], lost=[1])
    assert found == [(5, ""), *[(None, MAY_FOLLOW_MONITORED)] * 3]
    assert rank.numbered([told, end(0)], lost=[0])[0] == (6, "")
    assert rank.numbered([told, end(0)], lost=[0, 1])[0] == (None, MAY_FOLLOW_MONITORED)


def test_what_failed_took_no_number() -> None:
    rank = Rank()
    for failed in (True, False, True, False):
        rank.do("allreduce_", failed=failed)
        rank.do("send", peer=1, tag=0, failed=failed)
    found = rank.numbered([begin(), end(2)])
    assert found[:2] == [(None, FAILED)] * 2
    assert found[2:4] == [(0, ""), (0, "")]
    assert found[6:] == [(1, ""), (1, "")]


def test_what_the_backend_counted_as_one_cannot_be_told_apart() -> None:
    rank = Rank("nccl")
    for _ in range(6):
        rank.do("allreduce_")
    sequences = (0, 1, 2, 2, 3, 4)  # two of them were begun as one
    rank.records = [
        replace(one, backend_sequence=sequence) for one, sequence in zip(rank.records, sequences, strict=True)
    ]
    assert [number for number, _ in rank.numbered([begin()])] == [None, 1, None, None, 3, None]
    assert rank.numbered([begin()])[2][1] == REPEATED


def test_a_backend_that_does_not_count_leaves_the_recorders_own_numbers() -> None:
    rank = Rank("fake", sequence=-1)
    rank.do("allreduce_")
    rank.do("barrier")
    rank.records = [replace(one, backend_sequence=-1) for one in rank.records]
    assert rank.numbered([begin(at="made", sequence=-1)], lost=[0]) == [(1, "")]
    assert rank.numbered([begin(sequence=-1)], lost=[0]) == [(None, "")]


def test_a_record_that_is_there_twice_has_one_number_unless_it_differs() -> None:
    rank = Rank()
    for _ in range(3):
        rank.do("send", peer=1, tag=0)
    rank.records.append(replace(rank.records[1], node=3))
    assert [number for number, _ in rank.numbered([begin(), end(3)])] == [0, 1, 2, 1]
    rank.records[3] = replace(rank.records[3], peer=2)
    assert [doubt for _, doubt in rank.numbered([begin(), end(3)])] == ["", TWICE, MISSING, TWICE]


def test_the_order_in_which_records_come_does_not_matter() -> None:
    rank = Rank()
    for op in ("allreduce_", "send", "recv_", "allreduce_", "send", "monitored_barrier_", "allreduce_", "recv_"):
        rank.do(op, peer=1 if op in ("send", "recv_") else -1, tag=0)
    starts = {one.node: NS * (one.node + 1) for one in rank.records}
    lanes = [begin(), end(4)]
    once = number_communications(rank.records, list(starts.values()), lanes)
    mixed = random.Random(3).sample(rank.records, len(rank.records))
    again = number_communications(mixed, [starts[one.node] for one in mixed], lanes)
    assert sorted(again, key=lambda one: one.node) == once
    assert all(one.number is not None for one in once)


def test_which_of_the_groups_of_a_name_it_is_is_known_to_who_counted_from_the_first() -> None:
    rank = Rank()
    rank.do("allreduce_")
    rank.do("allreduce_")
    starts = [10, 20]
    lives = [begin(), begin(at="made", made_ns=15, incarnation=1)]
    late = [begin(made_ns=0), begin(at="made", made_ns=15, incarnation=1)]
    met = [entry | {"synchronized": True} for entry in late]
    found = [
        [one.incarnation for one in number_communications(rank.records, starts, lanes)] for lanes in (lives, late, met)
    ]
    assert found == [[0, 1], [-1, -2], [0, 1]]


def test_a_group_of_which_nothing_was_told_has_no_numbers() -> None:
    rank = Rank()
    rank.do("allreduce_")
    rank.do("send", peer=1, tag=0)
    found = number_communications(rank.records, [10, 20], [])
    assert [one.number for one in found] == [None, None]
    assert [one.from_barrier for one in found] == [None, None]


def test_between_messages_that_may_be_missing_a_collective_has_no_number() -> None:
    rank = Rank()
    rank.do("allreduce_")
    rank.do("send", peer=1, tag=0)
    found = rank.numbered([begin(messages=2, counted=True, sequence=2), end(3)], lost=[1])
    assert found == [(None, UNCOUNTED)]
