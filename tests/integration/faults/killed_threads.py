"""A process of several threads that say what they did, to be killed at any moment.

Operator number i of a thread makes a tensor of i + 1 elements. Its count in the shared file is raised when the operator
has ended, so that whoever finds the file knows what must have been recorded.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from truedag.tracer.record.native.build import load_recorder
from truedag.tracer.record.recording import record

NUM_THREADS = 3
COUNTS = struct.Struct(f"<{NUM_THREADS + 1}q")  # of each thread, then how many recordings have begun


@contextmanager
def shared_counts(path: Path) -> Iterator[memoryview]:
    """Map the file that holds the counts."""
    new = path.with_suffix(".new")
    new.write_bytes(bytes(COUNTS.size))
    new.replace(path)  # found whole or not at all
    with path.open("r+b") as file, mmap.mmap(file.fileno(), COUNTS.size) as mapped:
        counts = memoryview(mapped).cast("q")
        yield counts
        counts.release()


def work(thread: int, counts: memoryview, num_ops: int) -> None:
    """Run the operators of a thread."""
    for i in range(num_ops):
        torch.full((i + 1, thread + 1), 1.0, dtype=torch.uint8)
        counts[thread] = i + 1


def run_until_killed(folder: Path, num_ops: int) -> None:
    """Record forever, in files 0.trace, 1.trace and so on, so many operators of each thread in each."""
    with shared_counts(folder / "counts") as counts:
        number = 0
        while True:
            for thread in range(NUM_THREADS):
                counts[thread] = 0
            counts[NUM_THREADS] = number + 1
            with record(folder / f"{number}.trace", synchronize=False, kernels=False):
                threads = [threading.Thread(target=work, args=(i, counts, num_ops)) for i in range(NUM_THREADS)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            number += 1


def main() -> None:
    """Fork a child for each line of stdin, a number of operators and a folder, and answer with its process."""
    torch.set_num_threads(1)
    load_recorder()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            num_ops, folder = line.rstrip("\n").split(" ", 1)
            run_until_killed(Path(folder), int(num_ops))
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
