"""Counting messages costs nothing that lasts, and changes nothing that the program or its compiler sees."""

from __future__ import annotations

import subprocess
import sys

from megatron_ranks import run_ranks

from truedag.tracer.record import counters


def make_and_forget() -> tuple[int, int, int]:
    import gc
    import weakref

    import torch
    from torch import distributed

    counters.install()
    before = len(counters._COUNTERS.groups)
    for _ in range(5):
        group = distributed.new_group([0, 1])
        distributed.all_reduce(torch.ones(1), group=group)
        distributed.destroy_process_group(group)
        del group
    gc.collect()
    received = torch.ones(2)
    if distributed.get_rank() == 0:
        distributed.send(received, 1)
        distributed.send(received, 1)
    else:
        distributed.recv(received)
        work = distributed.irecv(received)
        work.wait()
        del work
    memory = weakref.ref(received)
    del received
    distributed.barrier()
    counters.finish_lanes(object())  # type: ignore[arg-type]  # of no recording: nothing happens
    for count in counters._COUNTERS.groups.values():
        count.resolve()
    still_open = sum(len(count.open) for count in counters._COUNTERS.groups.values())
    return len(counters._COUNTERS.groups) - before, still_open, int(memory() is not None)


def test_groups_and_tensors_that_are_gone_are_not_kept() -> None:
    assert run_ranks(2, make_and_forget, timeout_s=60) == [(0, 0, 0)] * 2


COMPILED = """
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from truedag.tracer.record import counters
counters.install()
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
def program(x):
    y = x * 2
    dist.send(y, 1)
    dist.isend(y, 1).wait()
    return y + 1
import warnings
warnings.simplefilter("error")
print(torch.compile(program, backend="eager")(torch.ones(2)).tolist())
(count,) = counters._COUNTERS.groups.values()
print(count.messages, dict(count.sent), count.absolute)
"""


def test_a_compiled_program_may_send() -> None:
    ended = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["[3.0, 3.0]", "2 {(1, 0): 2} True"]
