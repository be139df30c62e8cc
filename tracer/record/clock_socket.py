"""A UDP socket that says when each message arrived, on CLOCK_MONOTONIC.

Theory of operation. A process that reads a message late, because another thread had the interpreter or the machine was
busy, would call the way longer than it was. So Linux is asked to stamp messages as they arrive. Its stamps are of the
time of day, and are brought onto CLOCK_MONOTONIC by reading both clocks at once: rounded to the later side, so that a
message never seems to have arrived before it did. Where there are no stamps, or somebody set the time of day meanwhile,
the moment of reading counts, which is later still. Source: Linux, Documentation/networking/timestamping.rst.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

# Linux's SO_TIMESTAMPNS, which Python does not name; the ancillary data have the same number.
_STAMPS = 35
_STAMP = struct.Struct("@ll")
_SIOCGIFADDR = 0x8915
# What lies between reading one clock and reading the other may not take longer, nor their difference change by more.
_SURE_NS = 5_000
_MOST_BYTES = 512

Address: TypeAlias = tuple[str, int]
Reading: TypeAlias = Callable[[int], int]


def same(time_ns: int) -> int:
    """A clock that shows CLOCK_MONOTONIC."""
    return time_ns


class StampedSocket:
    """An unconnected UDP socket for IPv4 and, where there is IPv6, for both."""

    def __init__(self, clock: Reading = same) -> None:
        """Bind to a free port of all interfaces.

        Args:
            clock: what this host's clock shows at a moment of CLOCK_MONOTONIC; tests give clocks that go wrong.

        Raises:
            OSError: there are no sockets to be had.
        """
        self._clock = clock
        self._socket, self._is_dual = _bind()
        self._stamps = False
        if sys.platform == "linux":
            with suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, _STAMPS, 1)
                self._stamps = True
        self._ahead_ns = time.time_ns() - time.monotonic_ns()
        self.port: int = self._socket.getsockname()[1]

    def now(self) -> int:
        """Read the clock, in ns."""
        return self._clock(time.monotonic_ns())

    def send(self, message: bytes, address: Address) -> bool:
        """Send; return whether the system took it."""
        host, port = address
        if self._is_dual and ":" not in host:
            host = f"::ffff:{host}"
        try:
            self._socket.sendto(message, (host, port))
        except OSError:
            return False
        return True

    def receive(self, timeout_s: float | None) -> tuple[bytes, Address, int] | None:
        """Return a message, whose it is, and when it arrived in ns of the clock; None: there was none in time."""
        self._socket.settimeout(timeout_s)
        try:
            message, ancillary, _, address = self._socket.recvmsg(_MOST_BYTES, socket.CMSG_SPACE(_STAMP.size))
        except OSError:  # nothing in time, or an earlier message of ours was refused
            return None
        return message, (address[0], address[1]), self._clock(self._arrival(ancillary))

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()

    def _arrival(self, ancillary: list[Any]) -> int:
        """When a message arrived, in ns of CLOCK_MONOTONIC."""
        before = time.monotonic_ns()
        realtime = time.time_ns()
        after = time.monotonic_ns()
        ahead, self._ahead_ns = self._ahead_ns, realtime - before
        if not self._stamps or after - before > _SURE_NS or abs(self._ahead_ns - ahead) > _SURE_NS:
            return before
        for level, kind, value in ancillary:
            if level == socket.SOL_SOCKET and kind == _STAMPS and len(value) >= _STAMP.size:
                seconds, nanoseconds = _STAMP.unpack_from(value)
                return min(before, int(seconds) * 1_000_000_000 + int(nanoseconds) - realtime + after)
        return before


def _bind() -> tuple[socket.socket, bool]:
    """Return the socket, and whether it is of IPv6 with IPv4 mapped into it."""
    with suppress(OSError):
        dual = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        try:
            dual.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            dual.bind(("::", 0))
        except OSError:
            dual.close()
            raise
        return dual, True
    single = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        single.bind(("0.0.0.0", 0))  # noqa: S104
    except OSError:
        single.close()
        raise
    return single, False


def list_addresses() -> list[str]:
    """Return this host's addresses, those that only it can reach last."""
    found = [*_interface_addresses(), *_ipv6_addresses()]
    with suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_DGRAM)]
    unique = dict.fromkeys(found)
    near = [one for one in unique if not ipaddress.ip_address(one.partition("%")[0]).is_loopback]
    return [*near, "127.0.0.1"]


def _interface_addresses() -> list[str]:
    if sys.platform != "linux":
        return []
    import fcntl

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                told = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(told[20:24]))
    return found


def _ipv6_addresses() -> list[str]:
    """The global ones. Source: Linux, net/ipv6/addrconf.c, if6_seq_show: address, index, prefix, scope, flags, name."""
    with suppress(OSError):
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()]
        return [str(ipaddress.IPv6Address(int(row[0], 16))) for row in rows if int(row[3], 16) == 0]
    return []
