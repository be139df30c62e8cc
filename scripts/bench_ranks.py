"""One rank of `bench_recorder.py --demo`: a deployment's training steps under each recorder, in the same processes.

`torchrun ... bench_ranks.py DEPLOYMENT ROUNDS OUT [key.path=value ...]`; rank 0 writes OUT. A step's time is that of
the slowest rank, from a barrier on that all meet in with their recorders started. A recorder runs two steps each time:
in the first, it sees everything for the first time. The order of the recorders changes from round to round, and each
stands between two pairs of bare steps that it is compared with: what the machine does otherwise comes and goes over
minutes. The bare pairs that stand in a recorder's place say how far that goes.
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
from collections.abc import Mapping, Sequence
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

    def run_beside_bare(self, names: Sequence[str]) -> None:
        """Run each recorder between bare steps, whose mean is kept as what the recorder is compared with."""
        before = self.run(BARE)
        for name in names:
            own = self.run(name)
            after = self.run(BARE)
            for what, value in own.items():
                self.rows.setdefault(name, {}).setdefault(what, []).append(value)
            for what in ("step", "cpu"):
                beside = [pair[f"{what} {when}"] for pair in (before, after) for when in STEPS]
                self.rows[name].setdefault(f"{what} beside", []).append(sum(beside) / len(beside))
            before = after

    def run(self, name: str) -> dict[str, float]:
        """Run two steps under a recorder and return what they took."""
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
        taken = {"start": (started - before) / 1e6, "stop": (stopped - ended) / 1e6}
        added = {"faults": 0.0}
        for number, when in enumerate(STEPS):
            before_step, after_step = usage[number], usage[number + 1]
            cpu_s = sum(getattr(after_step, key) - getattr(before_step, key) for key in ("ru_utime", "ru_stime"))
            added["faults"] += (after_step.ru_minflt - before_step.ru_minflt) / len(STEPS)
            taken[f"step {when}"] = steps[number] / 1e6
            added[f"cpu {when}"] = 1e3 * cpu_s
        taken["operators"] = kept.entries / len(STEPS)
        return _reduce(taken, distributed.ReduceOp.MAX) | _reduce(added, distributed.ReduceOp.SUM)


def _reduce(values: Mapping[str, float], over_ranks: Any) -> dict[str, float]:
    reduced = torch.tensor(list(values.values()), dtype=torch.float64)
    distributed.all_reduce(reduced, over_ranks)
    return dict(zip(values, reduced.tolist(), strict=True))


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
    gc.disable()
    shuffled = random.Random(0)  # the same order on every rank
    for _ in range(rounds):
        ranks.run_beside_bare(shuffled.sample(NAMES, len(NAMES)))
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
