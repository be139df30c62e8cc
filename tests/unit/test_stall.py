"""Which communication is said to hang, and who is said to be missing, from how far each rank has come."""

from __future__ import annotations

from truedag.launch.progress import Call, GroupProgress, Operation, Progress
from truedag.launch.stall import RankReport, describe_stalls, list_ranks


def group(name: str, ranks: tuple[int, ...], begun: int, ended: int, op: str = "all_reduce") -> GroupProgress:
    last = tuple(Operation(number=number, name=op, age_s=1.0, timeout_s=9.0) for number in range(1, begun + 1))
    return GroupProgress(name=name, axis=name, ranks=ranks, begun=begun, ended=ended, last=last)


def report(*groups: GroupProgress, call: Call | None = None, waits: bool = True) -> RankReport:
    progress = Progress(place="here.py:1 work", stack=(), call=call, waits=waits, groups=groups)
    return RankReport(phase="warm-up step", progress=progress)


def test_the_rank_that_has_not_begun_it_is_missing() -> None:
    said = describe_stalls(
        {0: report(group("dp", (0, 4), 37, 36)), 4: report(group("dp", (0, 4), 36, 36), waits=False)}, 5
    )
    assert said.splitlines()[0] == (
        "all_reduce number 37 of group dp (ranks 0, 4) hangs: rank 0 is in it, rank 4 is missing."
    )
    assert "  rank 4: warm-up step, at here.py:1 work" in said
    assert "  ranks 1-3 did not answer." in said


def test_what_the_others_wait_for_is_named_and_not_what_follows_from_it() -> None:
    # 0 waits for 1 in tp; 1 waits for 2 in dp; 2 works.
    tp, dp = (0, 1), (1, 2)
    said = describe_stalls(
        {
            0: report(group("tp", tp, 3, 2)),
            1: report(group("tp", tp, 2, 2), group("dp", dp, 8, 7)),
            2: report(group("dp", dp, 7, 7), waits=False),
        },
        3,
    )
    assert "all_reduce number 8 of group dp (ranks 1-2) hangs: rank 1 is in it, rank 2 is missing." in said
    assert "group tp" not in said


def test_ranks_that_wait_for_each_other_are_all_named() -> None:
    said = describe_stalls(
        {
            0: report(group("a", (0, 1), 1, 0), group("b", (0, 1), 0, 0)),
            1: report(group("a", (0, 1), 0, 0), group("b", (0, 1), 1, 0)),
        },
        2,
    )
    assert said.startswith("Ranks wait for each other")
    assert "group a" in said
    assert "group b" in said


def test_different_collectives_in_one_place_are_a_mismatch() -> None:
    said = describe_stalls(
        {0: report(group("tp", (0, 1), 5, 4, "all_reduce")), 1: report(group("tp", (0, 1), 5, 4, "barrier"))}, 2
    )
    assert "is not the same one on its ranks: all_reduce on rank 0, barrier on rank 1." in said


def test_a_rank_that_does_not_answer_is_missing() -> None:
    said = describe_stalls({0: report(group("world", (0, 1), 2, 1))}, 2)
    assert "rank 0 is in it, rank 1 is missing" in said
    assert "rank 1: does not answer" in said


def test_a_message_that_was_not_sent_names_both_ends() -> None:
    pp = group("pp", (0, 1), 0, 0)
    said = describe_stalls(
        {0: report(pp, waits=False), 1: report(pp, call=Call(name="receive", group="pp", peer=0))}, 2
    )
    assert said.startswith("the message from rank 0 to rank 1 on group pp has not come: rank 1 waits for it.")
    assert "  rank 0: warm-up step, at here.py:1 work" in said


def test_nothing_hangs_where_all_have_come_equally_far() -> None:
    assert describe_stalls({rank: report(group("tp", (0, 1), 5, 5)) for rank in (0, 1)}, 2) == ""


def test_a_collective_that_all_are_in_is_no_stall_of_a_missing_rank() -> None:
    assert describe_stalls({rank: report(group("tp", (0, 1), 5, 4)) for rank in (0, 1)}, 2) == ""


def test_many_ranks_are_named_in_short() -> None:
    assert list_ranks([3]) == "rank 3"
    assert list_ranks([*range(5), 9]) == "ranks 0-4, 9"
    assert list_ranks(range(0, 40, 2)) == "ranks 0, 2, 4, 6, 8, 10, 12, 14 and 12 more"
