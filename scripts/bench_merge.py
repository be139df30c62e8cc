"""How fast recorded traces become the finished dataset: events a second and core, memory, and whether cost is linear.

    python scripts/bench_merge.py [--events 1000000 10000000] [--processes N] [--memory 4GiB] [--traces DIR]

Two ranks of data-parallel training of a small transformer are recorded (or the traces of a run of your own are taken),
and copied: in time, as many steps as a rank is to have, and over ranks, as many jobs side by side as are needed for so
many events. Each copy's times, communications and their sequence numbers go on from those before it, each job's ranks
and groups are its own. What is written is read by `truedag merge` as if it had been recorded. 100 million events take
some 20 GB of disk and minutes: `--events 100000000`.

An event is a recorded one: an operator of the graph, a view or a range. The dispatcher makes several of each operator,
and these are what profilers count: how many there were for one recorded event is measured too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from truedag.tracer.merge.merging import Resources, merge_traces
from truedag.tracer.record import format as layout
from truedag.tracer.record.chunks import TraceContent, read_chunks
from truedag.tracer.record.format import ChunkKind, TableKind
from truedag.tracer.record.recording import record
from truedag.tracer.record.trace_folder import find_traces

CHUNK_BYTES = 4 << 20
EVENTS_OF_A_RANK = 1_000_000


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Train for some steps."""
    data = torch.randn(2, 8, 64)
    for _ in range(steps):
        model(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def record_rank(rank: int, port: int, folder: Path) -> None:
    """Record one of two ranks, and count on rank 0 how many events of the dispatcher there are for one recorded."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Sequential(
            *(torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True) for _ in range(4))
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    train(model, optimizer, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, 1)
    with record(folder / "one.trace" if rank == 0 else folder / "other.trace") as one:
        train(model, optimizer, 1)
    if rank == 0:
        dispatched = sum("::" in event.name for event in profile.events() or [])
        (folder / "ratio").write_text(str(dispatched / max(one.num_events, 1)))
    (folder / ("one.trace" if rank == 0 else "other.trace")).unlink()
    with record(folder / f"rank-{rank:05d}.trace", watch=[("model", model)]):
        train(model, optimizer, 20)
    dist.destroy_process_group()


def write_chunk(file: BinaryIO, kind: ChunkKind, thread: int, body: bytes) -> None:
    """Write one chunk."""
    header = np.zeros(1, layout.CHUNK)
    size = -(-(layout.CHUNK.itemsize + len(body)) // layout.ALIGNMENT) * layout.ALIGNMENT
    record_bytes = 0 if kind is ChunkKind.TABLES else layout.RECORDS[kind].itemsize
    header[0] = (layout.CHUNK_MAGIC, kind, thread, record_bytes, size, len(body), 0)
    file.write((header.tobytes() + body).ljust(size, b"\0"))


@dataclass(frozen=True, slots=True)
class Job:
    """One of the jobs side by side: how much its ranks are raised, and how many ranks there are in all."""

    first_rank: int
    world_size: int


def rename(entries: bytes, job: Job) -> bytes:
    """Give a job its own ranks: in what is told of the process, of groups, and of what was counted."""
    found = b""
    position = 0
    while position < len(entries):
        kind, number, size, zero = np.frombuffer(entries, "<u4", 4, position).tolist()
        body = entries[position + 16 : position + 16 + size]
        position += 16 + -(-size // 8) * 8
        if kind in (TableKind.META, TableKind.GROUP, TableKind.GROUP_RANKS, TableKind.LANES):
            told = json.loads(body)
            if kind == TableKind.LANES and told.get("at") == "end":
                continue  # the end is another, later one
            if kind == TableKind.META and "rank" in told:
                told["rank"] += job.first_rank
                told["world_size"] = job.world_size
            if "ranks" in told:
                told["ranks"] = [rank + job.first_rank for rank in told["ranks"]]
            if kind == TableKind.GROUP and not told["ranks"]:
                told["ranks"] = list(range(job.first_rank, job.first_rank + told["size"]))
            body = json.dumps(told).encode()
        found += np.array([kind, number, len(body), zero], "<u4").tobytes() + body.ljust(-(-len(body) // 8) * 8, b"\0")
    return found


def times_of(content: TraceContent) -> tuple[int, int]:
    """When a recording's first event began, and how long it lasted."""
    starts = [one.rows["start_ns"] for (kind, _), one in content.records.items() if kind is ChunkKind.EVENTS]
    first = min(int(one.min()) for one in starts if len(one))
    return first, max(int(one.max()) for one in starts if len(one)) - first + 100_000


def write_copies(content: TraceContent, path: Path, job: Job, copies: int, lasts_ns: int) -> None:
    """Write a rank's trace: its records again and again, each time later."""
    ids = [one.rows["id"].max(initial=0) for (kind, _), one in content.records.items() if kind is ChunkKind.COMMS]
    num_ids = int(max(ids, default=0))
    counts = per_group(content)
    with path.open("wb") as file:
        header = np.zeros(1, layout.FILE_HEADER)
        header[0] = (layout.FILE_MAGIC, layout.FORMAT_VERSION, layout.FILE_HEADER_BYTES, 1)
        file.write(header.tobytes().ljust(layout.FILE_HEADER_BYTES, b"\0"))
        for _, entries in content.tables:
            write_chunk(file, ChunkKind.TABLES, 0, rename(entries, job))
        write_chunk(file, ChunkKind.STORAGES, 0, content.storages.rows.tobytes())
        for (kind, thread), one in content.records.items():
            if kind in (ChunkKind.TENSORS, ChunkKind.PLACES):
                write_chunk(file, kind, thread, one.rows.tobytes())
                continue
            at_once = max(1, CHUNK_BYTES // max(one.rows.nbytes, 1))
            for begin in range(0, copies, at_once):
                turns = range(begin, min(begin + at_once, copies))
                pieces = [later(kind, one.rows, turn, lasts_ns, num_ids, counts) for turn in turns]
                write_chunk(file, kind, thread, b"".join(piece.tobytes() for piece in pieces))


def per_group(content: TraceContent) -> dict[int, tuple[int, int]]:
    """How many communications of each group one copy has, by the backend's count and by the recorder's."""
    rows = np.concatenate(
        [np.zeros(0, layout.COMM), *(one.rows for (kind, _), one in content.records.items() if kind is ChunkKind.COMMS)]
    )
    return {
        group: tuple(int(mine[name].max() - mine[name].min()) + 1 for name in ("sequence", "order"))  # type: ignore[misc]
        for group in np.unique(rows["group"]).tolist()
        if len(mine := rows[rows["group"] == group])
    }


def later(
    kind: ChunkKind,
    rows: np.ndarray[Any, np.dtype[np.void]],
    turn: int,
    lasts_ns: int,
    num_ids: int,
    counts: dict[int, tuple[int, int]],
) -> np.ndarray[Any, np.dtype[np.void]]:
    """One kind's records as they are in a later copy."""
    if turn == 0 or kind is ChunkKind.REFS:
        return rows
    rows = rows.copy()
    for name in ("start_ns", "end_ns", "time_ns"):
        if name in (rows.dtype.names or ()):
            rows[name] += turn * lasts_ns
    if kind is ChunkKind.COMMS:
        rows["id"] += turn * num_ids
        for group, (sequence, order) in counts.items():
            mine = rows["group"] == group
            rows["sequence"][mine] += turn * sequence
            rows["order"][mine] += turn * order
    elif "comm_id" in (rows.dtype.names or ()):
        rows["comm_id"][rows["comm_id"] > 0] += turn * num_ids
    return rows


def replicate(recorded: Sequence[TraceContent], folder: Path, num_events: int, per_rank: int) -> int:
    """Write the traces of as many jobs as make so many events; return how many there are."""
    events = [
        sum(len(one.rows) for (kind, _), one in content.records.items() if kind is ChunkKind.EVENTS)
        for content in recorded
    ]
    copies = max(1, min(per_rank, num_events // len(recorded)) // max(events))
    jobs = max(1, round(num_events / (copies * sum(events))))
    lasts_ns = max(times_of(content)[1] for content in recorded)
    for number in range(jobs):
        for rank, content in enumerate(recorded):
            first = number * len(recorded)
            job = Job(first, jobs * len(recorded))
            write_copies(content, folder / f"rank-{first + rank:05d}.trace", job, copies, lasts_ns)
    return jobs * copies * sum(events)


class Memory(threading.Thread):
    """Watches how much memory this process and its children take that is no file's."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._is_over = threading.Event()
        self.peak_bytes = 0

    def run(self) -> None:
        """Look every so often."""
        while not self._is_over.wait(0.1):
            self.peak_bytes = max(self.peak_bytes, sum(self._anonymous(pid) for pid in self._family()))

    def stop(self) -> int:
        """Return the peak."""
        self._is_over.set()
        self.join()
        return self.peak_bytes

    def _family(self) -> list[int]:
        found = [os.getpid()]
        for pid in found:
            with suppress(OSError):
                found.extend(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
        return found

    def _anonymous(self, pid: int) -> int:
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
        return 0


def measure(traces: Path, num_events: int, ratio: float, resources: Resources) -> float:
    """Merge, and say what it took; return seconds of a core."""
    memory = Memory()
    memory.start()
    begin, before = time.perf_counter(), os.times()
    with tempfile.TemporaryDirectory(dir=traces.parent) as out:
        summary = merge_traces(traces, Path(out) / "dag", resources=resources)
        size = sum(path.stat().st_size for path in (Path(out) / "dag").rglob("*.parquet"))
    wall, after = time.perf_counter() - begin, os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    assert summary.num_unmatched == 0
    print(
        f"{num_events:>12,} events of {summary.num_ranks} ranks: {summary.num_nodes:,} nodes, "
        f"{summary.num_edges:,} edges, "
        f"{summary.num_collectives:,} collectives\n"
        f"             {wall:.1f} s on {resources.processes} processes, {cpu:.1f} s of one core: "
        f"{num_events / cpu:,.0f} recorded events a second and core "
        f"(of the dispatcher's about {ratio * num_events / cpu:,.0f}), {cpu / num_events * 1e6:.2f} us an event\n"
        f"             {memory.stop() / (1 << 30):.2f} GiB of memory at most, dataset of {size / 1e6:,.0f} MB",
        flush=True,
    )
    return cpu


def main() -> None:
    """Copy, merge, and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--events-of-a-rank", type=int, default=EVENTS_OF_A_RANK)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory", type=float, default=4.0, help="GiB")
    parser.add_argument("--traces", type=Path, help="recorded traces to copy, instead of small ones of our own")
    parser.add_argument("--folder", type=Path, help="where the copies go (a temporary folder)")
    told = parser.parse_args()
    resources = Resources(processes=told.processes, memory_bytes=int(told.memory * (1 << 30)))
    with tempfile.TemporaryDirectory(dir=told.folder) as name:
        folder = Path(name)
        ratio = 1.0
        if told.traces is None:
            mp.spawn(record_rank, (29000 + os.getpid() % 1000, folder), nprocs=2)
            ratio = float((folder / "ratio").read_text())
        recorded = [read_chunks(path) for path in find_traces(told.traces or folder)]
        seconds = {}
        for wanted in told.events:
            traces = folder / "copies"
            traces.mkdir()
            num_events = replicate(recorded, traces, wanted, told.events_of_a_rank)
            seconds[num_events] = measure(traces, num_events, ratio, resources)
            shutil.rmtree(traces)
    if len(seconds) > 1:
        (small, first), *_, (large, last) = sorted(seconds.items())
        print(f"linear: {large / small:.1f} times the events take {last / first:.1f} times as long")
    print(
        "Not measured here, from others' own traces: HTA parses 45,000 events/s and joins nothing, TraceLens joins "
        "about 1,000 collectives/s, Chakra's linker handles 6,500 events/s; theirs are the dispatcher's events."
    )


if __name__ == "__main__":
    main()
