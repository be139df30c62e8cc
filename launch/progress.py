"""How far a rank has come: in the communications of each of its process groups, and in its program.

Theory of operation: nothing is counted while all is well. torch's flight recorder, which is on anyway, numbers the
collectives of each group and knows which have ended; it knows no messages under gloo. What a rank waits in right now
is read off the Python frames of its threads: a function of torch.distributed and its arguments. So a rank can tell
where it is at any moment, from another thread, from a signal handler, or from the traceback of what ended it.
"""

from __future__ import annotations

import linecache
import pickle
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict

_NUM_REMEMBERED = 8
_NUM_FRAMES = 6
_SLACK_S = 0.5
_C10D = "torch/distributed/distributed_c10d.py"

_MESSAGES: Mapping[str, tuple[str, str]] = {  # where the peer's rank is: in the world, and in the group
    "send": ("dst", "group_dst"),
    "isend": ("dst", "group_dst"),
    "recv": ("src", "group_src"),
    "irecv": ("src", "group_src"),
}
# Source: megatron-core, pipeline_parallel/p2p_communication.py: what `P2PCommunicator._communicate` waits for, in the
# order in which it begins them: its local variable, the kind of message, the attribute that holds the peer.
_REQUESTS = (
    ("tensor_send_prev", "send", "prev_rank"),
    ("tensor_recv_prev", "receive", "prev_rank"),
    ("tensor_send_next", "send", "next_rank"),
    ("tensor_recv_next", "receive", "next_rank"),
)


class Operation(BaseModel):
    """A collective that a rank has begun."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int
    """Its place in its group's sequence, from 1."""

    name: str
    age_s: float
    """How long ago it was begun."""

    timeout_s: float
    """How long it may take."""


class GroupProgress(BaseModel):
    """How far a rank has come in one process group."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    axis: str
    """What the program told of it; empty: nothing."""

    ranks: tuple[int, ...]
    begun: int
    """Collectives that this rank has begun."""

    ended: int
    """Collectives that are over for this rank, up to the first that is not."""

    last: tuple[Operation, ...]
    """The newest, in order; no more than a few."""


class Call(BaseModel):
    """The communication that a rank is in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """The function of torch.distributed; or send, receive."""

    group: str | None
    """The name of its process group; None: not known."""

    peer: int | None
    """The rank at the other end of a message; None: a collective, or not known."""


class Progress(BaseModel):
    """How far a rank has come."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    place: str
    """File, line and function of the program, outside of torch."""

    stack: tuple[str, ...]
    """The innermost places, the innermost last."""

    call: Call | None
    waits: bool
    """Whether it waits for other ranks, as far as that can be seen: in `call`, or for what it began earlier."""

    groups: tuple[GroupProgress, ...]


def take_progress(frame: FrameType | None = None, error: BaseException | None = None) -> Progress:
    """Say how far this rank has come. Local; any thread may call it; it waits for nobody.

    Args:
        frame: where the main thread is, if the caller knows; else its present frame.
        error: what ended the rank, if something did: its traceback says where, and a communication that it broke off
            counts as not ended.
    """
    if error is not None and error.__traceback__ is not None:
        stacks = [_frames_of(error.__traceback__)]
    elif frame is not None:
        stacks = [_stack(frame)]
    else:
        present = sys._current_frames()
        main = threading.main_thread().ident
        stacks = [_stack(present[ident]) for ident in sorted(present, key=lambda ident: ident != main)]
    calls = [(call, stack) for stack in stacks if (call := _find_call(stack)) is not None]
    call, stack = calls[0] if calls else (None, stacks[0])
    groups = _groups()
    if error is not None:
        groups = _reopen(groups, call, error)
    places = [_describe(frame, line) for frame, line in stack if not _is_of_torch(frame)]
    return Progress(
        place=places[-1] if places else "unknown",
        stack=tuple(places[-_NUM_FRAMES:]),
        call=call,
        waits=call is not None or _is_wait(stack) or (error is not None and is_communication_error(error)),
        groups=tuple(groups),
    )


def _stack(frame: FrameType | None) -> list[tuple[FrameType, int]]:
    """The frames from the outermost to the innermost, with the lines they are at."""
    frames = []
    while frame is not None:
        frames.append((frame, frame.f_lineno))
        frame = frame.f_back
    return frames[::-1]


def _frames_of(traceback: TracebackType | None) -> list[tuple[FrameType, int]]:
    frames = []
    while traceback is not None:
        frames.append((traceback.tb_frame, traceback.tb_lineno))
        traceback = traceback.tb_next
    return frames


def _is_of_torch(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    inside = torch is not None and Path(path).is_relative_to(Path(torch).parent)
    return inside or frame.f_code.co_name == "__torch_function__" or path.endswith(("/threading.py", "/contextlib.py"))


def _is_wait(stack: list[tuple[FrameType, int]]) -> bool:
    """Whether the line that runs waits for work begun earlier: `work.wait()` leaves no frame of its own."""
    if not stack:
        return False
    frame, line = stack[-1]
    return ".wait(" in linecache.getline(frame.f_code.co_filename, line)


def _describe(frame: FrameType, line: int) -> str:
    parts = Path(frame.f_code.co_filename).parts
    return f"{'/'.join(parts[-3:])}:{line} {frame.f_code.co_name}"


def _find_call(stack: list[tuple[FrameType, int]]) -> Call | None:
    for frame, _ in reversed(stack):
        name = frame.f_code.co_name
        path = Path(frame.f_code.co_filename).as_posix()
        takes_group = "group" in frame.f_code.co_varnames[: frame.f_code.co_argcount]
        if path.endswith(_C10D) and takes_group and not name.startswith(("_", "get_")):
            return _read_call(name, frame.f_locals)
        if name == "_communicate" and "reqs" in frame.f_locals:
            return _read_request(frame.f_locals)
    return None


def _read_call(name: str, arguments: Mapping[str, Any]) -> Call:
    from torch import distributed

    group = arguments.get("group") or distributed.group.WORLD
    peer: int | None = None
    if name in _MESSAGES and group is not None:
        in_world, in_group = (arguments.get(key) for key in _MESSAGES[name])
        peer = in_world if in_group is None else distributed.get_global_rank(group, in_group)
    named = {"isend": "send", "irecv": "receive", "recv": "receive"}.get(name, name)
    return Call(name=named, group=None if group is None else group.group_name, peer=peer)


def _read_request(local: Mapping[str, Any]) -> Call | None:
    begun = [(name, kind, peer) for name, kind, peer in _REQUESTS if local.get(name) is not None]
    requests, request = local.get("reqs"), local.get("req")
    if isinstance(requests, dict):
        waited = next((f"tensor_{key}" for key, known in requests.items() if known is request), None)
    elif isinstance(requests, list) and len(requests) == len(begun):
        waited = next((begun[i][0] for i, known in enumerate(requests) if known is request), None)
    else:
        return None
    communicator = local.get("self")
    for name, kind, peer in begun:
        if name == waited:
            group = getattr(communicator, "pp_group", None)
            return Call(name=kind, group=getattr(group, "group_name", None), peer=getattr(communicator, peer, None))
    return None


def _groups() -> list[GroupProgress]:
    """The process groups of this rank that have more than one rank, in the order in which they were made."""
    if "torch.distributed" not in sys.modules:
        return []
    from torch import distributed

    from truedag.tracer.annotate import REGISTRY

    if not (distributed.is_available() and distributed.is_initialized()):
        return []
    recorded = _flight_record()
    operations: dict[str, list[Operation]] = defaultdict(list)
    unfinished: dict[str, list[int]] = defaultdict(list)
    names: dict[str, str] = {}
    now_ns = time.time_ns()
    for entry in recorded["entries"]:
        group_name = entry["process_group"][0]
        names[str(entry["pg_id"])] = group_name
        if entry["is_p2p"]:
            continue
        name = str(entry["profiling_name"]).rpartition(":")[2]
        age_s = (now_ns - entry["time_created_ns"]) / 1e9
        if _is_open(entry):
            unfinished[group_name].append(entry["collective_seq_id"])
        timeout_s = entry["timeout_ms"] / 1e3
        operations[group_name].append(
            Operation(number=entry["collective_seq_id"], name=name, age_s=age_s, timeout_s=timeout_s)
        )
    world = distributed.distributed_c10d._world
    members = [group for group in world.pg_map if isinstance(group, distributed.ProcessGroup)]
    status = _by_name(recorded["pg_status"], names, [group.group_name for group in members])
    found = []
    for group in members:
        ranks = tuple(distributed.get_process_group_ranks(group))
        if len(ranks) < 2:
            continue
        begun = max(0, status.get(group.group_name, {}).get("last_enqueued_collective", 0))
        # The recorder's own last_completed_collective is not the greatest: a backend's threads end out of order.
        ended = min(unfinished[group.group_name], default=begun + 1) - 1
        found.append(
            GroupProgress(
                name=group.group_name,
                axis=REGISTRY.axes.get(group.group_name, ""),
                ranks=ranks,
                begun=begun,
                ended=ended,
                last=tuple(operations[group.group_name][-_NUM_REMEMBERED:]),
            )
        )
    return found


def _by_name(status: Mapping[str, Any], names: Mapping[str, str], made: list[str]) -> dict[str, Any]:
    """The recorder's counts by group name. It has numbers for names: those in the order in which groups were made."""
    in_order = dict(zip(map(str, range(len(made))), made, strict=True))
    if any(in_order.get(number) != name for number, name in names.items()):
        in_order = {}  # groups have been destroyed: only what the recorder still remembers can be told
    return {name: status[number] for number, name in (in_order | dict(names)).items() if number in status}


def _is_open(entry: Mapping[str, Any]) -> bool:
    """Whether a recorded communication has not ended: gloo only retires what is over, NCCL completes it first."""
    return entry["state"] != "completed" and not entry["retired"]


def _flight_record(*, only_active: bool = False) -> dict[str, Any]:
    """What torch's flight recorder holds, without stacks; nothing where it is switched off."""
    from torch._C import _distributed_c10d as c10d

    found: dict[str, Any] = {"entries": [], "pg_status": {}}
    # NCCL keeps a recorder of its own.
    for name in ("_dump_fr_trace", "_dump_nccl_trace"):
        dump = getattr(c10d, name, None)
        if dump is None:
            continue
        record = pickle.loads(dump(True, False, only_active))  # noqa: S301 (our own process wrote it)
        found["entries"] += record.get("entries", [])
        found["pg_status"].update(record.get("pg_status", {}))
    return found


def _reopen(groups: list[GroupProgress], call: Call | None, error: BaseException) -> list[GroupProgress]:
    """Count what `error` broke off as not ended: the recorder takes a collective that failed for one that is over."""
    if not is_communication_error(error):
        return groups
    if call is not None:
        if call.peer is not None:
            return groups
        broken = next((group for group in groups if group.name == call.group), None)
    else:  # one that was begun earlier and waited for: the newest of its group
        newest = [group for group in groups if group.last]
        if "timed out" in str(error).lower():
            newest = [group for group in newest if group.last[-1].age_s > group.last[-1].timeout_s - _SLACK_S]
        broken = min(newest, key=lambda group: group.last[-1].age_s, default=None)
    if broken is None:
        return groups
    reopened = broken.model_copy(update={"ended": min(broken.ended, broken.begun - 1)})
    return [reopened if group is broken else group for group in groups]


class OverdueError(RuntimeError):
    """A communication took longer than it may; raised by nobody, but said in place of what a backend does not say."""


def is_communication_error(error: BaseException) -> bool:
    """Return whether a backend of torch.distributed raised the error."""
    words = str(error).lower()
    named = ("gloo", "nccl", "timed out", "timeout", "connection closed", "connection reset", "socket")
    return isinstance(error, RuntimeError) and any(word in words for word in named)


def find_overdue(timeout_s: float) -> str:
    """Name a communication of this rank that was begun longer than `timeout_s` ago and has not ended; "" if none."""
    now_ns = time.time_ns()
    for entry in _flight_record(only_active=True)["entries"]:
        age_s = (now_ns - entry["time_created_ns"]) / 1e9
        if age_s > timeout_s and _is_open(entry):
            return f"{str(entry['profiling_name']).rpartition(':')[2]} of group {entry['process_group'][0]!r}"
    return ""
