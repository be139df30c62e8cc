"""Which rank a failed run is blamed on, told from what the ranks and torchrun left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from truedag.launch.failure import describe_failure, describe_timeout
from truedag.launch.nodes import Nodes
from truedag.launch.rank_state import Phase, RankError, RankState
from truedag.launch.run_folder import RunFolder
from truedag.launch.torchrun import read_exit_codes

HERE = Nodes(num_nodes=1, node=0, ranks_per_node=2, rendezvous=())

TORCHRUN_LOG = """\
Failures:
[1]:
  time      : 2026-01-01_00:00:00
  host      : here
  rank      : 0 (local_rank: 0)
  exitcode  : {other} (pid: 100)
  error_file: <N/A>
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : here
  rank      : 1 (local_rank: 1)
  exitcode  : {first} (pid: 101)
  error_file: <N/A>
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(root=tmp_path / "out")
    made.make(replace=False)
    made.torchrun_log(0).write_text("")
    return made


def put_state(folder: RunFolder, rank: int, *, phase: Phase = "recorded step", failed_at_ns: int | None = None) -> None:
    error = None
    if failed_at_ns is not None:
        error = RankError(message=f"Error of {rank}", traceback=f"Traceback of {rank}\n", time_ns=failed_at_ns)
    state = RankState(rank=rank, pid=100 + rank, phase=phase, coordinates={"tp": rank, "pp": 0}, error=error)
    state.write(folder.state(rank))


def test_torchruns_root_cause_comes_first(folder: RunFolder) -> None:
    folder.torchrun_log(0).write_text(TORCHRUN_LOG.format(other=-15, first=-9))
    assert list(read_exit_codes(folder.torchrun_log(0)).items()) == [(1, -9), (0, -15)]


def test_the_earliest_error_is_to_blame(folder: RunFolder) -> None:
    put_state(folder, 0, failed_at_ns=200)
    put_state(folder, 1, failed_at_ns=100)
    said = describe_failure(folder, HERE, 1)
    assert said.startswith("rank 1 (tp=1 pp=0) failed in phase 'recorded step': Error of 1\nTraceback of 1\n")
    assert "Traceback of 0" not in said


def test_a_killed_rank_is_to_blame_for_the_errors_of_its_peers(folder: RunFolder) -> None:
    put_state(folder, 0, failed_at_ns=100)
    put_state(folder, 1)
    folder.torchrun_log(0).write_text(TORCHRUN_LOG.format(other=1, first=-11))
    assert describe_failure(folder, HERE, 1).startswith(
        "rank 1 (tp=1 pp=0) was killed by SIGSEGV in phase 'recorded step'"
    )


def test_a_rank_that_ended_before_it_could_say_why_shows_what_it_printed(folder: RunFolder) -> None:
    folder.torchrun_log(0).write_text(TORCHRUN_LOG.format(other=-15, first=1))
    folder.log(1).write_text("the last words\n")
    assert describe_failure(folder, HERE, 1).startswith("rank 1 ended with exit code 1:\nthe last words\n")


def test_torchruns_own_failure_shows_what_it_printed(folder: RunFolder) -> None:
    folder.torchrun_log(0).write_text("no free port\n")
    said = describe_failure(folder, HERE, 1)
    assert said.startswith("torchrun ended before this node's 2 ranks did:\nno free port\n")
    assert "Nothing had been recorded" in said


def test_a_timeout_says_where_the_ranks_were(folder: RunFolder) -> None:
    put_state(folder, 0, phase="building")
    folder.trace(0).write_bytes(b"recorded")
    folder.trace(1).write_bytes(b"")
    said = describe_timeout(folder, HERE, 30.0)
    assert "after 30 s" in said
    assert "1 in building, 1 in starting" in said
    assert "What 1 of 2 ranks had recorded is kept" in said


def test_a_rank_of_another_node_is_named_with_its_node_and_what_hung(folder: RunFolder) -> None:
    put_state(folder, 0, failed_at_ns=300)
    error = RankError(message="Error of 7", traceback="Traceback of 7\n", time_ns=200, stalls="rank 8 is missing")
    RankState(rank=7, pid=1, node=3, host="far", phase="later step", error=error).write(folder.cause)
    said = describe_failure(folder, HERE, 1)
    assert said.startswith("rank 7 on node 3 (far) failed in phase 'later step': Error of 7\nrank 8 is missing\n")
    assert "Error of 0" not in said


def test_a_rank_that_was_told_to_end_elsewhere_is_no_failure_of_this_node(folder: RunFolder) -> None:
    put_state(folder, 0, failed_at_ns=300)
    RankState(rank=7, pid=1, node=3, host="far", stopped=True).write(folder.cause)
    assert describe_failure(folder, HERE, 1).startswith("rank 7 on node 3 (far) was told to end")


def test_a_killed_torchrun_is_named(folder: RunFolder) -> None:
    assert describe_failure(folder, HERE, -9).startswith("torchrun was killed by SIGKILL")


def test_nodes_that_cannot_be_heard_any_more_are_said(folder: RunFolder) -> None:
    folder.lost(0).touch()
    assert describe_failure(folder, HERE, 1).startswith("torchrun has ended on the node where the nodes meet")


FIRST_OF_TWO = Nodes(num_nodes=2, node=0, ranks_per_node=1, rendezvous=("--rdzv-endpoint=host:29500",))
TAKEN = "DistNetworkError: The server socket has failed to listen. port: 29500, name: EADDRINUSE, message: {words}\n"


def test_a_taken_port_is_said_in_a_line(folder: RunFolder) -> None:
    folder.torchrun_log(0).write_text("Traceback\n" + TAKEN.format(words="address already in use"))
    first, second = describe_failure(folder, FIRST_OF_TWO, 1).splitlines()[:2]
    assert first.startswith("the port of --rdzv-endpoint host:29500 is taken on this node, by another run or")
    assert "a second node with --node-rank 0" in first
    assert second.startswith("Nothing had been recorded")


def test_the_error_of_a_rank_comes_before_a_taken_port(folder: RunFolder) -> None:
    folder.torchrun_log(0).write_text(TAKEN.format(words="address already in use"))
    put_state(folder, 0, failed_at_ns=100)
    assert describe_failure(folder, FIRST_OF_TWO, 1).startswith("rank 0 (tp=0 pp=0) failed")


def test_nodes_that_never_met_are_told_what_to_check(folder: RunFolder) -> None:
    said = describe_timeout(folder, FIRST_OF_TWO, 30.0)
    assert said.startswith("no rank had started after 30 s: not all of the 2 nodes reached --rdzv-endpoint host:29500.")
    assert "--node-rank is 0 to 1, each once; this is node 0." in said
    put_state(folder, 0, phase="building")
    assert "1 in building" in describe_timeout(folder, FIRST_OF_TWO, 30.0)
