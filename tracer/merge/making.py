"""Make the parts of ranks from their traces, in this process or in several, in memory or on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Self, TypeVar

from truedag.tracer.errors import EmptyTraceError, MergeError
from truedag.tracer.merge.kernels import read_kernels
from truedag.tracer.merge.part import Part, save_part
from truedag.tracer.merge.rank_graph import build_rank_graph
from truedag.tracer.merge.rank_part import make_part
from truedag.tracer.record.kernels_file import kernels_path
from truedag.tracer.record.trace import read_trace

Task = TypeVar("Task")
Result = TypeVar("Result")

# What making a part takes at most, in bytes of memory for one byte of trace, and what a process takes without any: its
# modules, and the rows that it writes at once. Measured of a training loop of small operators: 8.3, and 400 MiB.
_MEMORY_FOR_A_BYTE = 10
_MEMORY_OF_A_PROCESS = 500 << 20
# What a byte of a compressed trace may have been before.
_COMPRESSION = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What was made of one trace: a part, in memory or on disk; None of one that holds nothing."""

    path: Path
    part: Part | Path | None
    rank: int = -1
    is_placed: bool = True  # whether its process knew its rank
    said: str = ""  # what its user should hear of it


class Workers:
    """Processes that work on tasks: new ones, which begin when they are first needed and end with the block."""

    def __init__(self, processes: int = 1) -> None:
        """Take so many; 1: this process itself."""
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, work: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
        """Do all tasks; return what comes of them, in their order. `work` is a function of a module."""
        if self._processes == 1 or len(tasks) < 2:
            return [work(task) for task in tasks]
        if self._pool is None:
            # New interpreters: threads of this one (Polars', PyTorch's) do not survive a fork.
            self._pool = ProcessPoolExecutor(self._processes, mp_context=get_context("spawn"))
        return list(self._pool.map(work, tasks))


def make_parts(paths: Sequence[Path], folder: Path | None, workers: Workers) -> list[Made]:
    """Make a part of each trace.

    Args:
        paths: the traces.
        folder: where the parts go; None: they stay in memory, and this process makes them.
        workers: who makes them.

    Raises:
        TraceError: a trace is broken.
        MergeError: a part cannot be written.
    """
    places = [None if folder is None else folder / path.name for path in paths]
    return (workers if folder is not None else Workers()).run(_make, list(zip(paths, places, strict=True)))


def _make(task: tuple[Path, Path | None]) -> Made:
    path, place = task
    try:
        trace = read_trace(path)
    except EmptyTraceError as error:
        return Made(path=path, part=None, said=str(error))
    said = f"{path} ends early: {trace.truncated}" if trace.truncated else ""
    part = make_part(build_rank_graph(trace, read_kernels(kernels_path(path), trace.meta)))
    if place is not None:
        save_part(part, place)
    return Made(
        path=path,
        part=part if place is None else place,
        rank=trace.rank,
        is_placed=bool(trace.meta.get("placed")),
        said=said,
    )


def choose_processes(paths: Sequence[Path], processes: int, memory_bytes: int | None) -> int:
    """Return how many parts can be made at once.

    Args:
        paths: the traces.
        processes: how many are wanted.
        memory_bytes: what they may take together; None: no bound.

    Raises:
        MergeError: one trace alone takes more.
    """
    wanted = max(1, min(processes, len(paths)))
    if memory_bytes is None:
        return wanted
    largest = max(paths, key=_size)
    needed = _MEMORY_OF_A_PROCESS + _MEMORY_FOR_A_BYTE * _size(largest)
    if needed > memory_bytes:
        raise MergeError(
            f"{largest} ({_size(largest) / 1e9:.2f} GB) takes up to {needed / (1 << 30):.1f} GiB of memory to merge, "
            f"and --memory is {memory_bytes / (1 << 30):.1f} GiB: give it more, or record fewer steps"
        )
    return min(wanted, memory_bytes // needed)


def total_bytes(paths: Sequence[Path]) -> int:
    """Return how much the traces hold."""
    return sum(_size(path) for path in paths)


def _size(path: Path) -> int:
    return path.stat().st_size * (_COMPRESSION if path.suffix == ".gz" else 1)
