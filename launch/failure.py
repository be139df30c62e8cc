"""Says in one message why a run did not end well: which rank failed first, with what, and what was kept."""

from __future__ import annotations

import shlex
import signal
from collections import Counter
from collections.abc import Mapping

from truedag.launch.console import shorten
from truedag.launch.rank_state import RankState, read_states
from truedag.launch.run_folder import RunFolder
from truedag.launch.torchrun import read_exit_codes


def describe_failure(folder: RunFolder, world_size: int) -> str:
    """Name the rank that failed first, its place, and its traceback or the end of what it printed."""
    states = read_states(folder.ranks)
    codes = read_exit_codes(folder.torchrun_log)
    killed = [rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM]
    failed = [state for state in states.values() if state.error is not None]
    silent = [rank for rank in codes if rank not in states or states[rank].error is None]
    if killed:
        # Ranks that lose a peer fail too, often before torchrun looks: who was killed was first.
        return f"{_describe_killed(killed[0], codes[killed[0]], states)}\n{describe_kept(folder, world_size)}"
    if failed:
        first = min(failed, key=lambda state: state.error.time_ns if state.error is not None else 0)
        return f"{_describe_error(first)}\n{describe_kept(folder, world_size)}"
    if silent:
        rank = silent[0]
        words = _tail(folder.log(rank).read_text(errors="replace")) if folder.log(rank).exists() else ""
        return (
            f"{_name(rank, states)} ended with exit code {codes[rank]}:\n{words}\n{describe_kept(folder, world_size)}"
        )
    words = _tail(folder.torchrun_log.read_text(errors="replace"))
    return f"torchrun ended before the {world_size} ranks did:\n{words}\n{describe_kept(folder, world_size)}"


def describe_timeout(folder: RunFolder, world_size: int, timeout_s: float) -> str:
    """Say what the ranks were at when the time was up."""
    states = read_states(folder.ranks)
    phases = Counter(states[rank].phase if rank in states else "starting" for rank in range(world_size))
    places = ", ".join(f"{count} in {phase}" for phase, count in phases.items())
    return (
        f"the ranks had not ended after {timeout_s:g} s and have been stopped; they were: {places}. "
        f"backend.run_timeout_s gives them more time.\n{describe_kept(folder, world_size)}"
    )


def describe_kept(folder: RunFolder, num_ranks: int) -> str:
    """Say what was recorded and how to make use of it, the command last."""
    num_traces = sum(path.stat().st_size > 0 for path in folder.traces.glob("*.trace"))
    traces, logs, dag = (shlex.quote(str(shorten(path))) for path in (folder.traces, folder.logs, folder.dag))
    if num_traces == 0:
        return f"Nothing had been recorded. What each rank printed is in {logs}.\nnext: tail {logs}/*"
    return (
        f"What {num_traces} of {num_ranks} ranks had recorded is kept in {traces}; "
        f"what each rank printed is in {logs}.\n"
        f"next: truedag merge {traces} --out {dag}"
    )


def _describe_killed(rank: int, code: int, states: Mapping[int, RankState]) -> str:
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    cause = " (the system kills the largest process when memory runs out)" if name == "SIGKILL" else ""
    phase = f" in phase {states[rank].phase!r}" if rank in states else ""
    return f"{_name(rank, states)} was killed by {name}{phase}{cause}; the other ranks have been stopped."


def _describe_error(state: RankState) -> str:
    assert state.error is not None
    return (
        f"{_name(state.rank, {state.rank: state})} failed in phase {state.phase!r}: {state.error.message}\n"
        f"{state.error.traceback.rstrip()}\nThe other ranks have been stopped."
    )


def _name(rank: int, states: Mapping[int, RankState]) -> str:
    place = states[rank].coordinates if rank in states else {}
    return f"rank {rank}" + (f" ({' '.join(f'{axis}={at}' for axis, at in place.items())})" if place else "")


def _tail(text: str, lines: int = 20) -> str:
    return "\n".join(text.rstrip().splitlines()[-lines:])
