"""Says in one message why a run did not end well: which rank failed first, with what, and what was kept."""

from __future__ import annotations

import shlex
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from truedag.launch.console import shorten
from truedag.launch.nodes import Nodes
from truedag.launch.rank_state import RankState, read_cause, read_states
from truedag.launch.run_folder import RunFolder
from truedag.launch.stall import RankReport, describe_stalls
from truedag.launch.torchrun import is_port_taken, read_exit_codes


def describe_failure(folder: RunFolder, nodes: Nodes, exit_code: int) -> str:
    """Name the rank that failed first, its place, what hung, and its traceback or the end of what it printed.

    Args:
        folder: the run's folder.
        nodes: this node and the others.
        exit_code: torchrun's; negative: the signal that killed it.
    """
    return f"{_describe_cause(folder, nodes, exit_code)}\n{describe_kept(folder, nodes)}"


def _describe_cause(folder: RunFolder, nodes: Nodes, exit_code: int) -> str:
    states = read_states(folder.ranks)
    codes = read_exit_codes(folder.torchrun_log(nodes.node))
    killed = [rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM]
    failed = [state for state in states.values() if state.error is not None]
    cause = read_cause(folder.cause)
    silent = [rank for rank in codes if rank not in states or not (states[rank].error or states[rank].stopped)]
    if killed:
        # Ranks that lose a peer fail too, often before torchrun looks: who was killed was first.
        return _describe_killed(killed[0], codes[killed[0]], states)
    if exit_code < 0:
        return f"torchrun was killed by {_name_signal(-exit_code)}; the ranks of this node have been stopped."
    if cause is not None and cause.error is not None:
        return _describe_error(cause, nodes)
    if cause is not None and cause.node != nodes.node:
        return (
            f"{_name(cause.rank, {cause.rank: cause})} on node {cause.node} ({cause.host}) was told to end; what was "
            "said there says why. The ranks of this node have been stopped."
        )
    if failed:
        first = min(failed, key=lambda state: state.error.time_ns if state.error is not None else 0)
        return _describe_error(first, nodes)
    if silent:
        rank = silent[0]
        words = _tail(folder.log(rank).read_text(errors="replace")) if folder.log(rank).exists() else ""
        return f"{_name(rank, states)} ended with exit code {codes[rank]}:\n{words}"
    if folder.lost(nodes.node).exists():
        return (
            "torchrun has ended on the node where the nodes meet, or that node is out of reach; what was said there "
            "says why. The ranks of this node have been stopped."
        )
    if nodes.endpoint is not None and is_port_taken(folder.torchrun_log(nodes.node)):
        return (
            f"the port of {nodes.endpoint} is taken on this node, by another run or by a second node with "
            "--node-rank 0: choose another port, or give each node its own --node-rank."
        )
    words = _tail(folder.torchrun_log(nodes.node).read_text(errors="replace"))
    return f"torchrun ended before this node's {nodes.ranks_per_node} ranks did:\n{words}"


def describe_silence(folder: RunFolder, nodes: Nodes, ranks: Sequence[int]) -> str:
    """Say which ranks of this node do not run any more."""
    states = read_states(folder.ranks)
    names = ", ".join(_name(rank, states) for rank in ranks)
    phase = states[ranks[0]].phase
    return (
        f"{names} no longer {'runs' if len(ranks) == 1 else 'run'}, though not ended: stopped by a signal, or stuck "
        f"in a call that lets no other thread run, in phase {phase!r}. This node's ranks have been stopped.\n"
        + describe_kept(folder, nodes)
    )


def describe_timeout(folder: RunFolder, nodes: Nodes, timeout_s: float) -> str:
    """Say what the ranks were at when the time was up, and what hung."""
    states = read_states(folder.ranks)
    own = {rank: state for rank, state in states.items() if state.node == nodes.node}
    phases = Counter(state.phase for state in own.values())
    phases["starting"] += nodes.ranks_per_node - len(own)
    places = ", ".join(f"{count} in {phase}" for phase, count in phases.items() if count)
    reports = {
        rank: RankReport(phase=state.phase, progress=state.progress)
        for rank, state in states.items()
        if state.progress is not None
    }
    stalls = describe_stalls(reports, nodes.num_nodes * nodes.ranks_per_node)
    if nodes.num_nodes > 1 and not states:
        return (
            f"no rank had started after {timeout_s:g} s: not all of the {nodes.num_nodes} nodes reached "
            f"{nodes.endpoint}. Check that it is the same on all of them and within their reach, and that "
            f"--node-rank is 0 to {nodes.num_nodes - 1}, each once; this is node {nodes.node}.\n"
            + describe_kept(folder, nodes)
        )
    return (
        f"the ranks had not ended after {timeout_s:g} s and have been stopped; they were: {places}. "
        "backend.run_timeout_s gives them more time.\n"
        + (f"{stalls}\n" if stalls else "")
        + describe_kept(folder, nodes)
    )


def describe_kept(folder: RunFolder, nodes: Nodes) -> str:
    """Say what was recorded and how to make use of it, the command last."""
    num_traces = sum(path.stat().st_size > 0 for path in folder.traces.glob("*.trace"))
    traces, logs, dag = (_quote(path) for path in (folder.traces, folder.logs, folder.dag))
    if num_traces == 0:
        return f"Nothing had been recorded. What each rank printed is in {logs}.\nnext: tail {logs}/*"
    return (
        f"What {num_traces} of {nodes.num_nodes * nodes.ranks_per_node} ranks had recorded is kept in {traces}; "
        f"what each rank printed is in {logs}.\n"
        f"next: truedag merge {traces} --out {dag}"
    )


def _quote(path: Path) -> str:
    return shlex.quote(str(shorten(path)))


def _describe_killed(rank: int, code: int, states: Mapping[int, RankState]) -> str:
    name = _name_signal(-code)
    cause = " (the system kills the largest process when memory runs out)" if name == "SIGKILL" else ""
    phase = f" in phase {states[rank].phase!r}" if rank in states else ""
    return f"{_name(rank, states)} was killed by {name}{phase}{cause}; the other ranks have been stopped."


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _describe_error(state: RankState, nodes: Nodes) -> str:
    assert state.error is not None
    where = f" on node {state.node} ({state.host})" if state.node != nodes.node else ""
    lines = [f"{_name(state.rank, {state.rank: state})}{where} failed in phase {state.phase!r}: {state.error.message}"]
    if state.error.stalls:
        lines.append(state.error.stalls)
    lines += [state.error.traceback.rstrip(), "The other ranks have been stopped."]
    return "\n".join(lines)


def _name(rank: int, states: Mapping[int, RankState]) -> str:
    place = states[rank].coordinates if rank in states else {}
    return f"rank {rank}" + (f" ({' '.join(f'{axis}={at}' for axis, at in place.items())})" if place else "")


def _tail(text: str, lines: int = 20) -> str:
    return "\n".join(text.rstrip().splitlines()[-lines:])
