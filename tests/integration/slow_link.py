"""Two network namespaces joined by a link that takes its time, without root and without the kernel's netem.

In each namespace `python slow_link.py SOCKET ADDRESS COMMAND ...` makes a TUN device, hands it to the `Link` over a
Unix socket, and becomes the command once the other side is there. The link, in the process that made it, carries every
packet from one device to the other, as late as it was told.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

DEVICE = "slow0"
# Source: Linux, include/uapi/linux/if_tun.h.
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PACKET_BYTES = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Delay:
    """How long a packet takes: so long at least, and longer by chance."""

    least_s: float
    jitter_s: float


class Link:
    """Waits for two sides, then carries their packets until it is closed."""

    def __init__(self, path: Path, out: Delay, back: Delay) -> None:
        """Listen at a Unix socket; `out` is from the side that comes first to the one that comes second."""
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(2)
        self._delays = (out, back)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cut it."""
        self._closing.set()
        self._thread.join(10.0)
        self._server.close()

    def _run(self) -> None:
        sides = []
        devices: list[int] = []
        self._server.settimeout(0.1)
        while len(sides) < 2 and not self._closing.is_set():
            try:
                side, _ = self._server.accept()
            except TimeoutError:
                continue
            sides.append(side)
            devices += socket.recv_fds(side, 1, 1)[1]
        for side in sides:
            side.send(b"g")
            side.close()
        if len(devices) == 2:
            self._carry(devices)
        for device in devices:
            os.close(device)

    def _carry(self, devices: list[int]) -> None:
        chance = random.Random(3)
        waiting: list[tuple[float, int, int, bytes]] = []
        last_due = [0.0, 0.0]
        num_packets = 0
        while not self._closing.is_set():
            timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.1
            ready, _, _ = select.select(devices, [], [], timeout)
            for device in ready:
                packet = os.read(device, _PACKET_BYTES)
                way = devices.index(device)
                delay = self._delays[way]
                due = time.monotonic() + delay.least_s + chance.expovariate(1.0 / delay.jitter_s)
                last_due[way] = max(due, last_due[way])  # none overtakes another
                num_packets += 1
                heapq.heappush(waiting, (last_due[way], num_packets, devices[1 - way], packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, device, packet = heapq.heappop(waiting)
                os.write(device, packet)


def main(path: str, address: str, *command: str) -> None:
    """Be one side."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    for words in (
        ("link", "set", "lo", "up"),
        ("address", "add", f"{address}/24", "dev", DEVICE),
        ("link", "set", DEVICE, "up", "mtu", "1400"),
    ):
        subprocess.run(["ip", *words], check=True)
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        socket.send_fds(link, [b"d"], [device])
        link.recv(1)
    os.close(device)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
