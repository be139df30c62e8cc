"""How many messages each process group has carried on this rank since it was made, recorded or not.

Theory of operation: backends do not number messages, and some count them among the collectives. Whether the first
message of a recording is the one that the other end recorded first can be told only by one who counted before. So from
`install` on, which `record` calls and a program may call earlier, each send and receive of a process group is counted,
by lane (peer, tag, direction); a recording is told how far the counts were when it began. A count is absolute if it
began with its group: the group was made after `install`, or its backend said that nothing had happened on it.

A receive from any source belongs to a lane only when it is done and its work says whose message it got.

What is written is a LANES entry for each group: when a recording begins, when a group is made while it runs ("made"
for "begin"), and when it ends. All name the group by `name` and `made_ns`. Ranks are ranks in the group::

    {"at": "begin", "name", "made_ns", "incarnation": groups of that name and those ranks that there were before,
     "absolute": bool, "synchronized": whether the ranks met in a barrier first, "time_ns": when this was so,
     "messages": sends and receives so far, "counted": whether the backend counts them as well, null if unknown,
     "sequence": the backend's own count, -1 if it has none,
     "excess": what monitored barriers took of the backend's numbers, beyond one each,
     "busy": whether another thread was sending or receiving, "lanes": [[peer, tag, sent, received]],
     "open": [[number, tag]] receives from any source that are not done, by their place among the messages}
    {"at": "end", "name", "made_ns", "messages", "sources": [[number, source]]}
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
import weakref
from collections import Counter
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from truedag.tracer.record.format import TableKind
from truedag.tracer.record.recorder import Recorder

_MOST_OPEN = 4096  # receives from any source that nobody waited for; of older ones the source stays unknown


class _GroupCount:
    """The messages of one group."""

    def __init__(self, group: dist.ProcessGroup, *, made_ns: int, incarnation: int, absolute: bool) -> None:
        self.name = str(group.group_name)
        self.group = weakref.ref(group)
        self.made_ns = made_ns
        self.incarnation = incarnation
        self.absolute = absolute
        self.messages = 0
        self.excess = 0  # what monitored barriers took of the backend's numbers, beyond one each
        self.inside = 0  # threads that are in a send or receive
        self.counted: bool | None = None
        self.before = -1  # the backend's count before the first message
        self.sent: Counter[tuple[int, int]] = Counter()
        self.received: Counter[tuple[int, int]] = Counter()
        self.open: dict[int, tuple[int, dist.Work]] = {}  # by number: the tag, the work that will know the source
        self.sources: dict[int, int] = {}

    def leave(self, group: dist.ProcessGroup, *, done: bool) -> bool:
        """End a send or receive; return `done`, whether there was one."""
        self.inside -= 1
        if done:
            self.messages += 1
            if self.counted is None:
                self.counted = _sequence(group) > self.before
        return done

    def resolve(self) -> None:
        """Put receives from any source that are done into their lanes."""
        for number, (tag, work) in list(self.open.items()):
            if work.is_completed():
                self.learn(number, tag, int(work._source_rank()))
        while len(self.open) > _MOST_OPEN:
            del self.open[next(iter(self.open))]
            self.absolute = False

    def learn(self, number: int, tag: int, source: int) -> None:
        """Note whose message a receive from any source got."""
        if self.open.pop(number, None) is None:
            return
        self.received[source, tag] += 1
        self.sources[number] = source

    def begin(self, *, synchronized: bool) -> dict[str, Any]:
        lanes = sorted(self.sent.keys() | self.received.keys())
        group = self.group()
        return {
            "at": "begin",
            "name": self.name,
            "made_ns": self.made_ns,
            "incarnation": self.incarnation,
            "absolute": self.absolute,
            "synchronized": synchronized,
            "time_ns": time.monotonic_ns(),
            "messages": self.messages,
            "sequence": -1 if group is None else _sequence(group),
            "excess": self.excess,
            "counted": self.counted,
            "busy": self.inside > 0,
            "lanes": [[peer, tag, self.sent[peer, tag], self.received[peer, tag]] for peer, tag in lanes],
            "open": [[number, tag] for number, (tag, _) in self.open.items()],
        }

    def end(self) -> dict[str, Any]:
        sources = [[number, source] for number, source in self.sources.items()]
        return {
            "at": "end",
            "name": self.name,
            "made_ns": self.made_ns,
            "messages": self.messages,
            "sources": sources,
        }


class _Counters:
    """The counts of all groups of this process."""

    def __init__(self) -> None:
        self.installed = False
        self.lock = threading.RLock()
        self.engine: Recorder | None = None  # of the recording that runs
        self.synchronized = False  # whether that began at a barrier
        self.groups: dict[int, _GroupCount] = {}  # by the identity of groups that are alive
        self.ended: list[_GroupCount] = []  # groups that went away while the recording ran
        self._alive: dict[int, weakref.ref[dist.ProcessGroup]] = {}
        self._made: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def after_fork(self) -> None:
        """A child has one thread, and no recording."""
        self.lock = threading.RLock()
        self.engine = None

    def add(self, group: dist.ProcessGroup, *, made_ns: int, absolute: bool) -> _GroupCount:
        with self.lock:
            key = id(group)
            known = self.groups.get(key)
            if known is not None:
                return known
            kind = (str(group.group_name), list_ranks(group))
            count = _GroupCount(group, made_ns=made_ns, incarnation=self._made[kind], absolute=absolute)
            self._made[kind] += 1
            self.groups[key] = count
            self._alive[key] = weakref.ref(group, functools.partial(self._forget, key))
            if self.engine is not None:
                with suppress(Exception):  # the recorder's failure is not the program's
                    moment = "made" if absolute else "begin"
                    _write(self.engine, count.begin(synchronized=self.synchronized) | {"at": moment})
            return count

    def _forget(self, key: int, _group: object) -> None:
        with self.lock:
            del self._alive[key]
            count = self.groups.pop(key)
            if self.engine is not None:
                self.ended.append(count)


_COUNTERS = _Counters()


def install() -> None:
    """Count messages from now on. Call it before `init_process_group` for counts that hold wherever recordings begin.

    Costs about a microsecond a message. Local; does not synchronise; a second call does nothing.
    """
    with _COUNTERS.lock:
        if _COUNTERS.installed or not dist.is_available():
            return
        _COUNTERS.installed = True
        for group in dist.distributed_c10d._world.pg_map:
            if isinstance(group, dist.ProcessGroup):
                _COUNTERS.add(group, made_ns=0, absolute=_sequence(group) == 0)
        _wrap()


def write_lanes(engine: Recorder, *, synchronized: bool) -> None:
    """Tell the recording that has just begun how far the counts are. `synchronized`: the ranks met in a barrier."""
    install()
    with _COUNTERS.lock:
        _COUNTERS.engine, _COUNTERS.synchronized = engine, synchronized
        for count in list(_COUNTERS.groups.values()):
            count.resolve()
            count.sources.clear()
            _write(engine, count.begin(synchronized=synchronized))


def finish_lanes(engine: Recorder) -> None:
    """Tell the recording that ends what its receives from any source got, and how far the counts are."""
    with _COUNTERS.lock:
        if _COUNTERS.engine is not engine:
            return
        _COUNTERS.engine = None
        for count in (*_COUNTERS.groups.values(), *_COUNTERS.ended):
            count.resolve()
            _write(engine, count.end())
            count.sources.clear()
        _COUNTERS.ended.clear()


def _wrap() -> None:
    """Count what goes through the process groups' own methods: all of torch.distributed's messages do."""
    group_class: Any = dist.ProcessGroup
    work_class: Any = dist.Work
    send, receive, receive_any = group_class.send, group_class.recv, group_class.recv_anysource
    monitor = group_class.monitored_barrier
    module: Any = dist.distributed_c10d
    register, told_source = module._register_process_group, work_class._source_rank

    @functools.wraps(send)
    def counted_send(self: dist.ProcessGroup, tensors: Any, dstRank: int, tag: int) -> Any:
        count = _enter(self)
        done = False
        try:
            work = send(self, tensors, dstRank, tag)
            done = True
        finally:
            with _COUNTERS.lock:
                if count.leave(self, done=done):
                    count.sent[dstRank, tag] += 1
        return work

    @functools.wraps(receive)
    def counted_recv(self: dist.ProcessGroup, tensors: Any, srcRank: int, tag: int) -> Any:
        count = _enter(self)
        done = False
        try:
            work = receive(self, tensors, srcRank, tag)
            done = True
        finally:
            with _COUNTERS.lock:
                if count.leave(self, done=done):
                    count.received[srcRank, tag] += 1
        return work

    @functools.wraps(receive_any)
    def counted_recv_anysource(self: dist.ProcessGroup, tensors: Any, tag: int) -> Any:
        count = _enter(self)
        work: dist.Work | None = None
        try:
            work = receive_any(self, tensors, tag)
        finally:
            with _COUNTERS.lock:
                if count.leave(self, done=work is not None) and work is not None:
                    count.open[count.messages - 1] = (tag, work)
        return work

    @functools.wraps(monitor)
    def counted_monitored_barrier(self: dist.ProcessGroup, *args: Any, **options: Any) -> None:
        # Made of messages on gloo, more of them on rank 0 than elsewhere.
        before = _sequence(self)
        try:
            monitor(self, *args, **options)
        finally:
            with _COUNTERS.lock:
                _COUNTERS.add(self, made_ns=0, absolute=False).excess += max(_sequence(self) - before - 1, 0)

    def source_rank(self: dist.Work) -> int:
        # `dist.recv` asks at once: the work need not be kept for longer.
        source = int(told_source(self))
        with _COUNTERS.lock:
            for count in list(_COUNTERS.groups.values()):
                for number, (tag, work) in list(count.open.items()):
                    if work is self:
                        count.learn(number, tag, source)
        return source

    @functools.wraps(register)
    def counted_register(group_name: str, process_group: dist.ProcessGroup) -> None:
        register(group_name, process_group)
        _COUNTERS.add(process_group, made_ns=time.monotonic_ns(), absolute=True)

    _hide_from_compiler(counted_send, counted_recv, counted_recv_anysource, counted_monitored_barrier, source_rank)
    group_class.send, group_class.recv, group_class.recv_anysource = counted_send, counted_recv, counted_recv_anysource
    group_class.monitored_barrier, work_class._source_rank = counted_monitored_barrier, source_rank
    module._register_process_group = counted_register
    os.register_at_fork(after_in_child=_COUNTERS.after_fork)


def _hide_from_compiler(*wrappers: Any) -> None:
    """Let torch.compile leave alone what counts, as it leaves torch.distributed's own functions alone."""
    frames: Any = torch._C._dynamo.eval_frame
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    for wrapper in wrappers:
        frames.set_code_exec_strategy(wrapper.__code__, skip)


def _enter(group: dist.ProcessGroup) -> _GroupCount:
    """Begin a send or receive."""
    with _COUNTERS.lock:
        count = _COUNTERS.groups.get(id(group)) or _COUNTERS.add(group, made_ns=0, absolute=False)
        if count.open:
            count.resolve()
        if count.counted is None:
            count.before = _sequence(group)
        count.inside += 1
        return count


def _sequence(group: dist.ProcessGroup) -> int:
    """The backend's own count; -1 if it does not count."""
    try:
        return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
    except RuntimeError:
        return -1


def list_ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    """The group's global ranks; () where its backend keeps no list."""
    try:
        backend = group._get_backend(group._device_types[0])
        return tuple(backend.options.global_ranks_in_group) or tuple(range(group.size()))
    except (AttributeError, IndexError, RuntimeError):
        return ()


def _write(engine: Recorder, told: dict[str, Any]) -> None:
    engine.write(TableKind.LANES, 0, json.dumps(told).encode())
