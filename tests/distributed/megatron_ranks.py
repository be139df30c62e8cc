"""Runs a function on gloo ranks that have megatron-core imported once, in the server that they are forked from."""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from truedag.parallel.environment import prepare_process

_CONTEXT = multiprocessing.get_context("forkserver")


@functools.cache
def _start_server() -> None:
    """Start the fork server, which imports megatron-core; it looks for what it preloads on PYTHONPATH only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        _CONTEXT.set_forkserver_preload(["megatron_preload"])
        forkserver.ensure_running()


def run_ranks(
    world_size: int, function: Any, *arguments: Any, timeout_s: float, process_group: bool = True
) -> list[Any]:
    """Return what `function(*arguments)` returned on each rank; fail the test with the rank and traceback of an error.

    Without `process_group` the function makes its own, of the environment (RANK, WORLD_SIZE) and a port that it is
    given. All ranks are killed at the first error, or when `timeout_s` has passed.
    """
    _start_server()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            _CONTEXT.Process(
                target=_run_rank,
                args=(rank, world_size, rendezvous if process_group else None, timeout_s, sender, function, arguments),
                daemon=process_group,  # a program may have workers
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            return _collect([receiver for receiver, _ in pipes], timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(receivers: list[Connection], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        pending = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(receivers))) - set(results))
            pytest.fail(f"ranks {missing} have not ended after {timeout_s} s", pytrace=False)
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = receivers.index(receiver)
            try:
                error, results[rank] = receiver.recv()
            except EOFError:
                pytest.fail(f"rank {rank} died without a word", pytrace=False)
            if error is not None:
                pytest.fail(f"rank {rank} failed:\n{error}", pytrace=False)
    return [results[rank] for rank in range(len(receivers))]


def _run_rank(
    rank: int,
    world_size: int,
    rendezvous: str | None,
    timeout_s: float,
    sender: Connection,
    function: Any,
    arguments: Any,
) -> None:
    warnings.simplefilter("error")
    prepare_process()
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    try:
        if rendezvous is None:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        else:
            distributed.init_process_group(
                "gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
            )
        result = function(*arguments)
        if rendezvous is not None:
            distributed.destroy_process_group()
    except BaseException:
        sender.send((traceback.format_exc(), None))
        raise
    sender.send((None, result))
