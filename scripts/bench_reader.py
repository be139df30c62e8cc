"""How fast a trace is read: events per second of `read_trace` and of its tables, on one core, the best of several.

    python scripts/bench_reader.py [--events 2000000] [--rounds 5]

Training steps of a transformer block are recorded, and the records repeated: a trace as long as a real one, of real
events.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, get_args

import numpy as np
import torch

from truedag.tracer.record import format as layout
from truedag.tracer.record.chunks import TraceContent, read_chunks
from truedag.tracer.record.columns import TableName, table
from truedag.tracer.record.format import ChunkKind
from truedag.tracer.record.recording import RecorderName, record
from truedag.tracer.record.trace import read_trace

CHUNK_BYTES = 256 << 10


def record_steps(path: Path, recorder: RecorderName) -> None:
    """Record four training steps of a transformer block."""
    block = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    optimizer = torch.optim.AdamW(block.parameters(), foreach=False)
    data = torch.randn(2, 8, 64)
    with record(path, recorder=recorder, watch=[("block", block)], synchronize=False):
        for _ in range(4):
            block(data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def write_chunk(file: BinaryIO, kind: ChunkKind, thread: int, body: bytes) -> None:
    """Write one chunk."""
    header = np.zeros(1, layout.CHUNK)
    size = -(-(layout.CHUNK.itemsize + len(body)) // layout.ALIGNMENT) * layout.ALIGNMENT
    record_bytes = 0 if kind is ChunkKind.TABLES else layout.RECORDS[kind].itemsize
    header[0] = (layout.CHUNK_MAGIC, kind, thread, record_bytes, size, len(body), 0)
    file.write((header.tobytes() + body).ljust(size, b"\0"))


def repeat(content: TraceContent, path: Path, num_events: int) -> int:
    """Write a trace of at least so many events, another one's over and over; return how many it has."""
    recorded = sum(len(one.rows) for (kind, _), one in content.records.items() if kind is ChunkKind.EVENTS)
    times = -(-num_events // recorded)
    with path.open("wb") as file:
        header = np.zeros(1, layout.FILE_HEADER)
        header[0] = (layout.FILE_MAGIC, layout.FORMAT_VERSION, layout.FILE_HEADER_BYTES, 1)
        file.write(header.tobytes().ljust(layout.FILE_HEADER_BYTES, b"\0"))
        for _, entries in content.tables:
            write_chunk(file, ChunkKind.TABLES, 0, entries)
        write_chunk(file, ChunkKind.STORAGES, 0, content.storages.rows.tobytes())
        for (kind, thread), one in content.records.items():
            is_repeated = kind in (ChunkKind.EVENTS, ChunkKind.REFS, ChunkKind.FREES)
            body = np.tile(one.rows, times if is_repeated else 1).tobytes()
            step = CHUNK_BYTES // one.rows.itemsize * one.rows.itemsize
            for begin in range(0, len(body), step):
                write_chunk(file, kind, thread, body[begin : begin + step])
    return times * recorded


def fastest(action: Callable[[], object], rounds: int) -> float:
    """The shortest time of several, in seconds."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recorder", choices=("native", "python"), default="native")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small.trace"), Path(folder, "large.trace")
        record_steps(small, arguments.recorder)
        num_events = repeat(read_chunks(small), large, arguments.events)
        trace = read_trace(large)
        num_refs = sum(len(thread.refs) for thread in trace.threads)
        size = large.stat().st_size
        print(f"{num_events:,} events with {num_refs:,} tensors in {size / 1e6:,.0f} MB, on one core")
        print(f"{'':<24}{'seconds':>9}{'million events/s':>19}")

        def tell(what: str, action: Callable[[], object]) -> None:
            seconds = fastest(action, arguments.rounds)
            print(f"{what:<24}{seconds:>9.3f}{num_events / seconds / 1e6:>19.2f}", flush=True)

        tell("read_trace", lambda: read_trace(large))
        for name in get_args(TableName):
            tell(f"table {name}", lambda name=name: table(trace, name))
        tell("read_trace and events", lambda: table(read_trace(large), "events"))
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


if __name__ == "__main__":
    main()
