"""One rank of `bench_recorder.py --demo`: a deployment's training steps under each recorder, in the same processes.

`torchrun ... bench_ranks.py DEPLOYMENT ROUNDS OUT [key.path=value ...]`; rank 0 writes OUT. A step's time is that of
the slowest rank, from a barrier on that all meet in with their recorders started. A recorder runs two steps each time:
in the first, it sees everything for the first time. The order of the recorders changes from round to round.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from truedag.parallel.environment import prepare_process

prepare_process()

import torch  # noqa: E402  (what prepare_process says must be said first)
from bench_peers import BARE, FLOOR, NATIVE, RECORDERS, SCOPED  # noqa: E402
from torch import distributed  # noqa: E402

NAMES = (BARE, FLOOR, NATIVE, SCOPED)
STEPS = ("new", "running")


class Ranks:
    """This rank's runner, and what the slowest rank took."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._models = [model for _, model in runner.model_chunks]
        self._step = 0
        self.rows: dict[str, dict[str, list[float]]] = {}

    def run(self, name: str) -> None:
        """Run two steps under a recorder."""
        gc.collect()
        distributed.barrier()
        steps, usage = [], []
        before = time.perf_counter_ns()
        with tempfile.TemporaryDirectory() as folder, RECORDERS[name](Path(folder), self._models) as kept:
            started = time.perf_counter_ns()
            for _ in STEPS:
                distributed.barrier()
                usage.append(resource.getrusage(resource.RUSAGE_SELF))
                start = time.perf_counter_ns()
                self._runner.run(self._step)
                steps.append(time.perf_counter_ns() - start)
                self._step += 1
            distributed.barrier()
            usage.append(resource.getrusage(resource.RUSAGE_SELF))
            ended = time.perf_counter_ns()
        stopped = time.perf_counter_ns()
        self._keep(name, "start", (started - before) / 1e6)
        self._keep(name, "stop", (stopped - ended) / 1e6)
        for number, (when, taken) in enumerate(zip(STEPS, steps, strict=True)):
            before_step, after_step = usage[number], usage[number + 1]
            cpu_s = sum(getattr(after_step, key) - getattr(before_step, key) for key in ("ru_utime", "ru_stime"))
            faults = after_step.ru_minflt - before_step.ru_minflt
            self._keep(name, f"step {when}", taken / 1e6)
            self._keep(name, f"cpu {when}", 1e3 * cpu_s, distributed.ReduceOp.SUM)
            self._keep(name, "faults", faults, distributed.ReduceOp.SUM)
        self._keep(name, "operators", kept.entries / len(STEPS))

    def _keep(self, name: str, what: str, value: float, over_ranks: Any = distributed.ReduceOp.MAX) -> None:
        reduced = torch.tensor([value], dtype=torch.float64)
        distributed.all_reduce(reduced, over_ranks)
        self.rows.setdefault(name, {}).setdefault(what, []).append(float(reduced))


def main(deployment_name: str, rounds: int, out: Path, overrides: Sequence[str]) -> None:
    """Run the rounds; every rank calls it."""
    from truedag.launch.deployment_file import load_deployment
    from truedag.launch.runner import build_runner

    _, deployment = load_deployment(deployment_name, overrides)
    torch.set_num_threads(deployment.backend.threads)
    timeout = timedelta(seconds=deployment.backend.collective_timeout_s)
    distributed.init_process_group("gloo", timeout=timeout)
    runner = build_runner(deployment, device=torch.device("cpu"), timeout=timeout)
    ranks = Ranks(runner)
    for name in (BARE, FLOOR):  # what is slow the first time
        ranks.run(name)
    ranks.rows.clear()
    gc.disable()
    shuffled = random.Random(0)  # the same order on every rank
    for _ in range(rounds):
        for name in shuffled.sample(NAMES, len(NAMES)):
            ranks.run(name)
    modules = sum(len(list(model.modules())) for _, model in runner.model_chunks)
    if distributed.get_rank() == 0:
        told = {"deployment": deployment_name, "ranks": deployment.world_size, "rounds": rounds, "modules": modules}
        out.write_text(json.dumps(told | {"rows": ranks.rows}))
    distributed.barrier()
    runner.close()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may take their time
