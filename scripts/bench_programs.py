"""The programs of tests/programs under each recorder, for `bench_recorder.py --programs`.

Theory of operation: a program's ranks stay for all recorders and rounds, and each time run the whole program anew, from
its process group on; the order of the recorders changes from round to round. These programs take a blink, most of it
spent on waiting, so what is compared is processor time, of all threads of all ranks. A recorder under which the program
fails, dies or hangs is left out from then on.
"""

from __future__ import annotations

import gc
import json
import os
import random
import runpy
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_peers import BARE, ETO, KINETO, KINETO_SHAPES, MODE, NATIVE, RECORDERS, load_floor_observer

PROGRAMS = Path(__file__).parents[1] / "tests" / "programs"
NOT_COMPARED = {"digest", "own_ranks"}  # no program; one that starts its ranks itself, where there is nothing to see
NAMES = (BARE, NATIVE, KINETO, KINETO_SHAPES, ETO, MODE)
WORLD_SIZE = 2
TIMEOUT_S = 90


def measure_programs(rounds: int) -> dict[str, Any]:
    """Measure every program; a recorder that fails on one has no row there."""
    found = {}
    load_floor_observer()  # compiled before the ranks ask for it
    for path in sorted(PROGRAMS.glob("*.py")):
        if path.stem not in NOT_COMPARED:
            found[path.stem] = _measure_program(path, rounds)
    return {"rounds": rounds, "ranks": WORLD_SIZE, "programs": found}


def _measure_program(path: Path, rounds: int) -> dict[str, Any]:
    names = list(NAMES)
    failed: list[str] = []
    while True:
        ranks, culprit = _run_ranks(path, names, rounds)
        if culprit is None:
            break
        if culprit not in names or culprit == BARE:
            return {"failed": list(NAMES), "events": 0, "rows": {}}
        names.remove(culprit)
        failed.append(culprit)
    rows = {}
    cpu = {name: [sum(both) for both in zip(*(rank["cpu_ns"][name] for rank in ranks), strict=True)] for name in names}
    for name in names:
        percent = [100 * (own / bare - 1) for own, bare in zip(cpu[name], cpu[BARE], strict=True)]
        rows[name] = {
            "entries": sum(rank["entries"][name] for rank in ranks),
            "bytes": sum(rank["bytes"][name] for rank in ranks),
            "cpu_ms_min": min(cpu[name]) / 1e6,
            "percent_min": 100 * (min(cpu[name]) / min(cpu[BARE]) - 1),
            "percent_median": statistics.median(percent),
        }
    return {"failed": failed, "events": sum(rank["events"] for rank in ranks), "rows": rows}


def _run_ranks(path: Path, names: Sequence[str], rounds: int) -> tuple[list[dict[str, Any]], str | None]:
    """Return what each rank measured; or the recorder under which the first rank came to grief."""
    with tempfile.TemporaryDirectory() as folder:
        ports = _free_ports(rounds * len(names) + 1)
        told = {"program": str(path), "names": names, "rounds": rounds, "ports": ports}
        command = [sys.executable, __file__, json.dumps(told)]
        results = [Path(folder) / f"{rank}.json" for rank in range(WORLD_SIZE)]
        processes = [
            subprocess.Popen(
                [*command, str(result)],
                env=os.environ
                | {
                    "TORCH_CPP_LOG_LEVEL": "ERROR",
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(WORLD_SIZE),
                },
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for rank, result in enumerate(results)
        ]
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                if any(process.poll() for process in processes):
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for process, result in zip(processes, results, strict=True):
            if process.returncode not in (0, -9):
                return [], result.with_suffix(".now").read_text() if result.with_suffix(".now").exists() else ""
        if not all(result.exists() for result in results):
            return [], results[0].with_suffix(".now").read_text()
        return [json.loads(result.read_text()) for result in results], None


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _measure_rank(told: dict[str, Any], out: Path) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(told["program"]).parent))
    names, ports = told["names"], iter(told["ports"])

    def run() -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(next(ports)))
        sys.argv = [told["program"]]
        runpy.run_path(told["program"], run_name="__main__")

    now = out.with_suffix(".now")
    now.write_text(BARE)
    floor = load_floor_observer()
    floor.start(False, False, True)
    run()
    events = floor.stop()
    cpu_ns: dict[str, list[int]] = {name: [] for name in names}
    entries, sizes = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    shuffled = random.Random(0)  # the same order on every rank
    for turn in range(told["rounds"]):
        for name in shuffled.sample(names, len(names)):
            now.write_text(name)
            gc.collect()
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder) / ("keep" if turn == 0 else "timed")
                place.mkdir()
                with RECORDERS[name](place, []) as kept:
                    start = time.process_time_ns()
                    run()
                    taken = time.process_time_ns() - start
                if turn > 0:  # whatever is slow the first time is not the recorder's
                    cpu_ns[name].append(taken)
                elif kept.path is not None:
                    entries[name], sizes[name] = kept.entries, kept.used_bytes
    out.write_text(json.dumps({"events": events, "cpu_ns": cpu_ns, "entries": entries, "bytes": sizes}))


if __name__ == "__main__":
    _measure_rank(json.loads(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)  # threads of the program may take their time
