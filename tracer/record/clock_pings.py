"""Compare two hosts' clocks by messages that go there and back.

Theory of operation. A ping carries nothing but its number; the answer says when the ping arrived there and when the
answer left. A message arrives after it left, whatever happened to it on the way, so each ping bounds the difference of
the two clocks from both sides, by its way there and by its way back: that is no estimate, and delays only make the
bounds wider. Of many pings the quickest each way are kept. What the bounds mean is for `merge.align` to work out.

Who pings knows a token of the one who answers; to others nobody answers, and an answer is as long as its ping.
"""

from __future__ import annotations

import secrets
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from truedag.tracer.record.clock_socket import Address, Reading, StampedSocket, same

TOKEN_BYTES = 16
# Token, what it is, who pings, the ping's number, when it arrived, when the answer left.
_MESSAGE = struct.Struct("<16sIIqqq")
_PING, _ANSWER, _BYE = 1, 2, 3
_TIMEOUT_S = 0.2
_MOST_LOST = 3
_FEW = 4

Ping: TypeAlias = tuple[int, int, int, int]
"""When a ping left, when it arrived there, when the answer left there, when it arrived here; in ns of each clock."""


class Responder:
    """Answers pings, on a thread of its own that sleeps otherwise."""

    def __init__(self, clock: Reading = same) -> None:
        """Begin to answer.

        Raises:
            OSError: there are no sockets to be had.
        """
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._socket = StampedSocket(clock)
        self._stopping = False
        self._pingers: set[int] = set()
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._answer_all, name="truedag-clock-answers", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._socket.port

    def wait_for_pingers(self, timeout_s: float) -> None:
        """Wait until all who pinged have said that they are done, not longer than so many seconds."""
        with self._news:
            self._news.wait_for(lambda: not self._pingers, timeout_s)

    def stop(self) -> None:
        """Answer no more."""
        self._stopping = True
        self._socket.send(b"", ("127.0.0.1", self._socket.port))
        self._thread.join(1.0)
        self._socket.close()

    def close(self) -> None:
        """In a forked child, where no thread answers: give the socket back."""
        self._socket.close()

    def _answer_all(self) -> None:
        while not self._stopping:
            got = self._socket.receive(None)
            if got is None:
                time.sleep(0.001)  # whatever is wrong, do not spin on it
                continue
            message, address, arrived_ns = got
            if len(message) != _MESSAGE.size:
                continue
            token, kind, pinger, number, _, _ = _MESSAGE.unpack(message)
            if not secrets.compare_digest(token, self.token):
                continue
            with self._news:  # before the answer: who has it may ask at once who is still there
                if kind == _PING:
                    self._pingers.add(pinger)
                elif kind == _BYE:
                    self._pingers.discard(pinger)
                    self._news.notify_all()
            if kind == _PING:
                head = _MESSAGE.pack(token, _ANSWER, pinger, number, arrived_ns, 0)[:-8]
                self._socket.send(head + struct.pack("<q", self._socket.now()), address)


class Pinger:
    """Pings one responder, at whichever of its addresses answers first."""

    def __init__(self, token: bytes, addresses: Sequence[Address], pinger: int, clock: Reading = same) -> None:
        """Prepare; sends nothing.

        Args:
            token: the responder's.
            addresses: where it may be reached.
            pinger: a number by which the responder tells who has said goodbye.
            clock: this host's.

        Raises:
            OSError: there are no sockets to be had.
        """
        self._token = token
        self._addresses = list(addresses)
        self._pinger = pinger
        self._socket = StampedSocket(clock)
        self._number = 0
        self._sent_ns: dict[int, int] = {}

    def ping(self, count: int, pause: Callable[[], object]) -> list[Ping]:
        """Ping so many times, with a pause after each; return the pings that were answered.

        Ends early when several answers in a row fail to come.
        """
        pings: list[Ping] = []
        num_lost = 0
        for _ in range(count):
            got = self._ping_once()
            pings += got
            num_lost = 0 if got else num_lost + 1
            if num_lost == _MOST_LOST:
                break
            pause()
        return pings

    def close(self) -> None:
        """Say goodbye, and give the port back."""
        self._send(_BYE, 0)
        self._socket.close()

    def _ping_once(self) -> list[Ping]:
        """Ping, and return what was answered: an answer to an earlier ping that took longer counts as well."""
        self._number += 1
        self._sent_ns[self._number] = self._socket.now()
        if not self._send(_PING, self._number):
            return []
        pings: list[Ping] = []
        deadline = time.monotonic() + _TIMEOUT_S
        while (left := deadline - time.monotonic()) > 0:
            got = self._socket.receive(left)
            if got is None:
                continue
            message, address, arrived_ns = got
            if len(message) != _MESSAGE.size:
                continue
            token, kind, _, number, there_ns, back_ns = _MESSAGE.unpack(message)
            if kind != _ANSWER or not secrets.compare_digest(token, self._token) or number not in self._sent_ns:
                continue
            self._addresses = [address]
            pings.append((self._sent_ns.pop(number), there_ns, back_ns, arrived_ns))
            if number == self._number:
                break
        return pings

    def _send(self, kind: int, number: int) -> bool:
        message = _MESSAGE.pack(self._token, kind, self._pinger, number, 0, 0)
        return sum(self._socket.send(message, address) for address in self._addresses) > 0


def keep_quickest(pings: Sequence[Ping]) -> list[Ping]:
    """Return, of each few pings, the one that was quickest there and the one that was quickest back.

    Of many, clocks that drift apart would make the first or the last ones look the quickest.
    """
    kept: dict[Ping, None] = {}
    for first in range(0, len(pings), _FEW):
        few = pings[first : first + _FEW]
        kept[min(few, key=lambda ping: ping[1] - ping[0])] = None
        kept[min(few, key=lambda ping: ping[3] - ping[2])] = None
    return list(kept)
