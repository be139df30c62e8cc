"""Compare this host's clock with another host's while a recording runs (DESIGN rule 5).

Theory of operation. A recording of one rank of several starts a thread as soon as there is a process group. Where
another process of the host leads already, or all ranks are on one host, that is all. A leader finds its parent
(`clock_peers`) and pings it: at the beginning, then ever less often, up to every ten seconds, and when the recording
ends (`clock_pings`). What it finds becomes a CLOCK entry of the trace each time. It answers others from the first
recording on until its process ends, on a second thread that sleeps otherwise.

Nothing here takes part in what the program communicates, and nothing waits for another rank but for fractions of a
second: ranks may begin, stop, die or not record at all. A host that cannot be reached costs one warning; its clock is
then known only as far as the program's own communications bound it.
"""

from __future__ import annotations

import atexit
import itertools
import math
import os
import platform
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from truedag.tracer.record.clock_peers import Leader, Peers
from truedag.tracer.record.clock_pings import Pinger, Responder, keep_quickest
from truedag.tracer.record.clock_socket import list_addresses

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

FIRST_PINGS = 32
LATER_PINGS = 16
PAUSE_S = 0.001
# When to ping again after the first time, and then at the last of these intervals.
INTERVALS_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0)
_LOOK_AGAIN_S = 0.02
_END_S = 1.0
_MOST_SILENT = 3
_GOODBYE_S = 0.5

Write = Callable[[dict[str, Any]], None]


class ClockMeasuring:
    """What one recording does about clocks."""

    def __init__(self, clock: str, write: Write) -> None:
        """Prepare; `join` begins.

        Args:
            clock: names this host's clock: processes that name the same share CLOCK_MONOTONIC.
            write: is called, on another thread, with what a CLOCK entry tells; not any more when `end` has returned.
        """
        self._clock = clock
        self._write = write
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._has_ended = False

    def join(self, *, is_rank_told: bool) -> None:
        """Begin, if there is a process group of several hosts, perhaps, and it has not begun yet. Does not wait.

        Args:
            is_rank_told: whether torchrun's environment means this process.
        """
        if self._thread is not None or not (dist.is_available() and dist.is_initialized()):
            return
        world_size = dist.get_world_size()
        if world_size == 1 or (is_rank_told and os.environ.get("LOCAL_WORLD_SIZE") == str(world_size)):
            return
        with suppress(ValueError, RuntimeError):  # a group without a store; a process that is ending
            stores = [dist.distributed_c10d._get_default_store()]
            thread = threading.Thread(target=self._run, args=(stores,), name="truedag-clock", daemon=True)
            thread.start()
            self._thread = thread

    def end(self) -> None:
        """Ping a last time; takes milliseconds, or a second if nobody answers any more."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(_END_S)
        with self._lock:
            self._has_ended = True

    def forget(self) -> None:
        """In a forked child: it has no thread."""
        self._thread = None
        self._lock = threading.Lock()

    def _run(self, stores: list[Store]) -> None:
        try:
            store = stores.pop()
            peers, which = Peers(store), weakref.ref(store)
            del store  # who keeps it keeps its server, should the program end the group
            self._lead(peers, which)
        except Exception as error:  # a store whose server has gone, say; the program is not at fault
            if not self._ending.is_set():
                _warn(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")

    def _lead(self, peers: Peers, store: weakref.ref[Store]) -> None:
        if not peers.lead(self._clock):
            return
        number = _serve(peers, store, self._clock)
        parent = self._find_parent(peers, number) if number else None
        if parent is None or parent.clock == self._clock:
            self._ending.wait()
        else:
            self._compare(parent, number)
        # A process that ends need not, and the store may have gone before it.
        if dist.is_initialized() and threading.main_thread().is_alive():
            peers.resign(self._clock)

    def _find_parent(self, peers: Peers, number: int) -> Leader | None:
        """Return the parent; None: it has not said where it answers until a moment after the recording ended."""
        give_up = math.inf
        while (parent := peers.find_parent(number, self._clock)) is None and time.monotonic() < give_up:
            time.sleep(_LOOK_AGAIN_S)
            if self._ending.is_set():
                give_up = min(give_up, time.monotonic() + _END_S / 2)
        return parent

    def _compare(self, parent: Leader, number: int) -> None:
        pinger = Pinger(bytes.fromhex(parent.token), parent.places, number)
        num_silent = 0
        try:
            has_answered = self._ping(pinger, parent, FIRST_PINGS)
            for turn in itertools.count():
                is_last = self._ending.wait(INTERVALS_S[min(turn, len(INTERVALS_S) - 1)])
                has_answered = self._ping(pinger, parent, LATER_PINGS) or has_answered
                num_silent += not has_answered
                if num_silent == _MOST_SILENT or (is_last and 0 < num_silent < _MOST_SILENT):
                    _warn(f"{parent.host} does not answer at UDP port {parent.port} of {', '.join(parent.addresses)}")
                if is_last:
                    break
        finally:
            pinger.close()

    def _ping(self, pinger: Pinger, parent: Leader, count: int) -> bool:
        """Ping and write down what was found; return whether there was an answer."""
        pings = pinger.ping(count, lambda: self._ending.wait(PAUSE_S))
        told = {
            "clock": self._clock,
            "peer_clock": parent.clock,
            "peer_host": parent.host,
            "num_pings": len(pings),
            "pings": keep_quickest(pings),
        }
        with self._lock:
            if pings and not self._has_ended:
                self._write(told)
        return bool(pings)


class _Service:
    """What answers in this process: of one store, from the first recording on."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.store: weakref.ref[Store] | None = None
        self.number = 0
        self.responder: Responder | None = None

    def stop(self) -> None:
        responder, self.responder, self.store = self.responder, None, None
        if responder is not None:
            responder.wait_for_pingers(_GOODBYE_S)
            responder.stop()

    def after_fork(self) -> None:
        self.lock = threading.Lock()
        responder, self.responder, self.store = self.responder, None, None
        if responder is not None:
            responder.close()


_SERVICE = _Service()
os.register_at_fork(after_in_child=_SERVICE.after_fork)


def _serve(peers: Peers, store: weakref.ref[Store], clock: str) -> int:
    """Answer the pings of others; return this leader's number."""
    with _SERVICE.lock:
        if _SERVICE.responder is None or _SERVICE.store != store:
            if _SERVICE.responder is not None:
                _SERVICE.responder.stop()
            else:
                atexit.register(_SERVICE.stop)
            responder = _SERVICE.responder = Responder()
            _SERVICE.store = store
            _SERVICE.number = peers.publish(
                Leader(
                    clock=clock,
                    host=platform.node(),
                    token=responder.token.hex(),
                    port=responder.port,
                    addresses=tuple(list_addresses()),
                )
            )
        return _SERVICE.number


def _warn(why: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # stderr may be gone
        sys.stderr.write(
            f"truedag: this host's clock ({platform.node()}) was not compared with another's, the program runs on and "
            f"its communications have to do: {why}\n"
        )
