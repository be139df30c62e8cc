"""Merge inside a job: `torchrun ... -m truedag.tracer.merge TRACES --out DIR`, started as the job's ranks are.

Theory of operation. Each process makes the parts of the traces that it finds in its TRACES folder: where all see the
same folder they share them out, where each machine has its own they are its own ranks'. Then all of them meet, rank 0
gets the parts that it cannot see, over the process group, and joins the communications. What it writes is what
`truedag merge` writes from the same traces, byte for byte. Without torchrun it is a merge by one process.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from truedag.tracer.errors import MergeError, TruedagError
from truedag.tracer.merge.making import Made, Workers, make_parts
from truedag.tracer.merge.merging import MergeSummary, join_parts, merge_traces, scratch_folder
from truedag.tracer.record.trace_folder import find_traces

Identity = tuple[str, int, int]  # of a file: its name, its bytes, when it was written

_PIECE = 64 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return the exit code."""
    parser = argparse.ArgumentParser(prog="truedag.tracer.merge", description="Build the DAG from recorded traces.")
    parser.add_argument("traces", metavar="TRACES", type=Path, help="the folder of the traces")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where the dataset goes, on rank 0")
    told = parser.parse_args(arguments)
    is_first = int(os.environ.get("RANK", "0")) == 0

    def say(text: str) -> None:
        if is_first:
            print(text, file=sys.stderr)  # noqa: T201

    try:
        if "RANK" in os.environ:
            summary = merge_in_job(told.traces, told.out, say)
        else:
            summary = merge_traces(told.traces, told.out, progress=say)
    except TruedagError as error:
        print(f"truedag: {error}", file=sys.stderr)  # noqa: T201
        return 1
    if summary is not None:
        say(f"{summary.num_nodes} nodes and {summary.num_edges} edges of {summary.num_ranks} ranks in {told.out}")
    return 0


def merge_in_job(traces_dir: Path, out_dir: Path, say: Callable[[str], None]) -> MergeSummary | None:
    """Merge as one process of a job; all of them call it. Return what rank 0 finds, None elsewhere.

    Raises:
        TruedagError: as `merge_traces`; what another process met is raised on all of them.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        return _merge_in_job(dist, traces_dir, out_dir, say)
    finally:
        dist.destroy_process_group()


def _merge_in_job(dist: Any, traces_dir: Path, out_dir: Path, say: Callable[[str], None]) -> MergeSummary | None:
    rank = dist.get_rank()
    with scratch_folder(out_dir, name=f"parts-{rank}") as scratch:
        seen = _everybody(dist, [_identify(path) for path in find_traces(traces_dir)])
        if not any(seen):
            raise MergeError(f"{traces_dir} holds no traces (rank-*.trace): name the folder of a recording")
        mine = {name for (name, _, _), owner in _share_out(seen).items() if owner == rank}
        say("making each rank's part")
        made: list[Made] = []
        fault = ""
        try:
            made = make_parts([path for path in find_traces(traces_dir) if path.name in mine], scratch, Workers())
        except TruedagError as error:
            fault = str(error)
        told = _everybody(dist, (fault, made))
        _raise_first([said for said, _ in told])
        found = _bring(dist, [parts for _, parts in told], scratch)
        summary = None
        if rank == 0:
            found.sort(key=lambda one: (one.path.name.startswith("pid-"), one.path.name.removesuffix(".gz")))
            try:
                summary = join_parts(found, out_dir, progress=say, scratch=scratch)
            except TruedagError as error:
                fault = str(error)
        _raise_first(_everybody(dist, fault))
        return summary


def _raise_first(faults: Sequence[str]) -> None:
    for fault in faults:
        if fault:
            raise MergeError(fault)


def _everybody(dist: Any, mine: Any) -> list[Any]:
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return told


def _identify(path: Path) -> Identity:
    """What two processes have alike if they see the same file."""
    state = path.stat()
    return path.name, state.st_size, state.st_mtime_ns


def _share_out(seen: Sequence[Sequence[Identity]]) -> dict[Identity, int]:
    """Say which process takes which file, of those that see it."""
    seers: dict[Identity, list[int]] = {}
    for rank, files in enumerate(seen):
        for one in files:
            seers.setdefault(one, []).append(rank)
    return {one: seers[one][place % len(seers[one])] for place, one in enumerate(sorted(seers))}


def _bring(dist: Any, made: Sequence[Sequence[Made]], scratch: Path) -> list[Made]:
    """Return all parts as rank 0 sees them, copied to it where it does not."""
    hidden: list[tuple[int, Made, list[tuple[str, int]]]] = []
    files = _everybody(dist, {str(one.part): _files(one.part) for one in made[dist.get_rank()]})
    here = [one for parts in made for one in parts if one.part is None or _is_there(one.part)]
    for rank, parts in enumerate(made):
        hidden.extend((rank, one, files[rank][str(one.part)]) for one in parts if one not in here)
    (hidden, *_) = _everybody(dist, hidden)
    for place, (rank, one, names) in enumerate(hidden):
        folder = scratch / f"from-{rank}-{place}"
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
            here.append(replace(one, part=folder))
        for name, size in names:
            if dist.get_rank() == rank:
                _send(dist, Path(str(one.part)) / name, size)
            elif dist.get_rank() == 0:
                _receive(dist, rank, folder / name, size)
    return here


def _is_there(part: object) -> bool:
    return isinstance(part, Path) and (part / "part.json").is_file()


def _files(part: object) -> list[tuple[str, int]]:
    if not isinstance(part, Path):
        return []
    return [(path.name, path.stat().st_size) for path in sorted(part.iterdir())]


def _send(dist: Any, path: Path, size: int) -> None:
    import torch

    with path.open("rb") as file:
        for begin in range(0, size, _PIECE):
            piece = torch.frombuffer(bytearray(file.read(min(_PIECE, size - begin))), dtype=torch.uint8)
            dist.send(piece, 0)


def _receive(dist: Any, rank: int, path: Path, size: int) -> None:
    import torch

    with path.open("wb") as file:
        for begin in range(0, size, _PIECE):
            piece = torch.empty(min(_PIECE, size - begin), dtype=torch.uint8)
            dist.recv(piece, rank)
            file.write(piece.numpy().data)


if __name__ == "__main__":
    sys.exit(main())
