"""Bring the traces of ranks that do not share a disk to rank 0.

Theory of operation. The ranks make a gloo group of their own, whatever backend the program uses. Rank 0 makes a marked
file in its folder and tells all what it is called: a rank that finds it shares the disk and has nothing to send. Each
of the others is asked in turn, and sends its files in compressed pieces, so that nobody holds more than a piece in
memory. A rank that does not answer is left out. Nothing of this is recorded: the recordings have ended.
"""

from __future__ import annotations

import secrets
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path, PurePosixPath

import torch
import torch.distributed as dist

_TIMEOUT_S = 300.0
_PIECE_BYTES = 4 << 20
_GZIP = 16 + zlib.MAX_WBITS
_TOKEN_BYTES = 16


def collect_traces(traces: Sequence[Path], out: Path, *, timeout_s: float = _TIMEOUT_S) -> str:
    """Send this rank's traces to rank 0, which writes them into its own `out` as `*.trace.gz`.

    All ranks of the default process group call it and wait for each other. Files that are sent stay where they are.

    Args:
        traces: this rank's, below `out`.
        out: the folder, which may be another on each rank.
        timeout_s: how long all of it may take, twice this at most.

    Returns:
        Why it did not work, or not wholly; '' if it did.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return "there is no process group (any more)"
    if dist.get_world_size() == 1:
        return ""
    group = None
    try:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        wire = _Wire(group)
        if dist.get_rank(group) == 0:
            return _receive_all(wire, out, time.monotonic() + timeout_s)
        return _answer(wire, traces, out)
    except (RuntimeError, OSError, ValueError) as error:
        return str(error).partition("\n")[0]
    finally:
        if group is not None:
            with suppress(RuntimeError, ValueError):
                dist.destroy_process_group(group)


class _Wire:
    """Sends and receives bytes between ranks of a group, each message with its length before it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)

    def send(self, message: bytes, rank: int) -> None:
        dist.send(torch.tensor([len(message)]), group=self.group, group_dst=rank)
        if message:
            dist.send(torch.frombuffer(bytearray(message), dtype=torch.uint8), group=self.group, group_dst=rank)

    def receive(self, rank: int) -> bytes:
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, group=self.group, group_src=rank)
        num_bytes = int(length)
        if not 0 <= num_bytes <= 2 * _PIECE_BYTES:
            raise ValueError(f"rank {rank} announced a message of {num_bytes} bytes")
        message = torch.empty(num_bytes, dtype=torch.uint8)
        if num_bytes:
            dist.recv(message, group=self.group, group_src=rank)
        return message.numpy().tobytes()

    def share(self, message: bytes) -> bytes:
        """Return rank 0's message, which is _TOKEN_BYTES long."""
        tensor = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor.numpy().tobytes()


def _receive_all(wire: _Wire, out: Path, deadline: float) -> str:
    token = secrets.token_bytes(_TOKEN_BYTES)
    mark = out / f".collecting-{token.hex()}"
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()
    failures = []
    try:
        wire.share(token)
        for rank in range(1, wire.size):
            is_late = time.monotonic() > deadline
            try:
                wire.send(b"" if is_late else b"?", rank)
                if is_late:
                    failures.append(f"rank {rank}: it took too long")
                else:
                    _receive(wire, rank, out)
            except (RuntimeError, OSError, ValueError) as error:
                failures.append(f"rank {rank}: {str(error).partition(chr(10))[0]}")
    finally:
        mark.unlink(missing_ok=True)
    return "; ".join(failures)


def _receive(wire: _Wire, rank: int, out: Path) -> None:
    while name := wire.receive(rank).decode():
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_absolute() or ".." in parts:
            raise ValueError(f"{name!r} does not lie in the folder")
        path = out.joinpath(*parts[:-1], parts[-1] + ".gz")
        part = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            while piece := wire.receive(rank):
                file.write(piece)
        part.replace(path)


def _answer(wire: _Wire, traces: Sequence[Path], out: Path) -> str:
    mark = out / f".collecting-{wire.share(bytes(_TOKEN_BYTES)).hex()}"
    is_shared = mark.exists()
    if wire.receive(0) != b"?":
        return "it took too long"
    for path in () if is_shared else traces:
        wire.send(path.relative_to(out).as_posix().encode(), 0)
        for piece in _compress(path):
            wire.send(piece, 0)
        wire.send(b"", 0)
    wire.send(b"", 0)
    return ""


def _compress(path: Path) -> Iterator[bytes]:
    packer = zlib.compressobj(1, zlib.DEFLATED, _GZIP)
    with path.open("rb") as file:
        while data := file.read(_PIECE_BYTES):
            if piece := packer.compress(data):
                yield piece
    yield packer.flush()
