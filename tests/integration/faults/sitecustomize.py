"""Puts a fault into the ranks of a run: Python imports this module at its start where its folder is on PYTHONPATH.

FAULT names what the ranks do instead of step 0, before they go on with it.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any


def _sleep(rank: int) -> None:
    if rank == 1:
        time.sleep(1000)


def _mismatch(rank: int) -> None:
    from torch import distributed, ones

    if rank == 0:
        distributed.all_reduce(ones(4))
    else:
        distributed.barrier()


def _other_groups(rank: int) -> None:
    from megatron.core import parallel_state
    from torch import distributed, ones

    distributed.all_reduce(ones(4), group=None if rank == 0 else parallel_state.get_pipeline_model_parallel_group())


def _begun_earlier(rank: int) -> None:
    from torch import distributed, ones

    if rank == 0:
        work = distributed.all_reduce(ones(4), async_op=True)
        work.wait()
    else:
        time.sleep(1000)


def _receive(rank: int) -> None:
    from torch import distributed, ones

    if rank == 1:
        distributed.recv(ones(4), src=0)
    else:
        time.sleep(1000)


def _raise(rank: int) -> None:
    if rank == 1:
        raise ArithmeticError("one and one is three")
    time.sleep(1000)


FAULTS: dict[str, Callable[[int], None]] = {
    "sleep": _sleep,
    "mismatch": _mismatch,
    "other groups": _other_groups,
    "begun earlier": _begun_earlier,
    "receive": _receive,
    "raise": _raise,
}


def _install(fault: Callable[[int], None]) -> None:
    from truedag.parallel.environment import prepare_process

    prepare_process()
    from truedag.parallel.train import Trainer

    step = Trainer.step

    def faulty_step(self: Trainer, index: int) -> Any:
        if index == 0:
            fault(int(os.environ["RANK"]))
        return step(self, index)

    Trainer.step = faulty_step  # type: ignore[method-assign]


if "FAULT" in os.environ and "truedag.launch.worker" in sys.orig_argv:
    _install(FAULTS[os.environ["FAULT"]])
