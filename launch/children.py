"""Calls of a function, each in a process of its own, so many at a time.

The processes are forked from a server that has imported once what they need.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, Generic, TypeVar, cast

from truedag.launch.errors import RunError

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Child:
    number: int
    process: ForkServerProcess
    receiver: Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[Result]):
    """What came of a call."""

    number: int
    """Which call, counted from 0."""

    error: Exception | None
    """What it raised."""

    result: Result | None
    """What it returned; None where it raised."""


def start_server(preload: str) -> None:
    """Start the server, which imports what calls need while this process does other things.

    Args:
        preload: the module that it imports.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([preload])
    forkserver.ensure_running()


def call_in_children(
    function: Callable[..., Result], calls: Sequence[tuple[Any, ...]], *, jobs: int, preload: str
) -> Generator[Outcome[Result], None, None]:
    """Yield what came of each call, in the order in which they end. Who stops asking ends those that still run.

    Args:
        function: can be imported by its name, and imports what it needs itself.
        calls: its arguments, call by call.
        jobs: how many calls may run at a time.
        preload: the module that the server imports.

    Raises:
        RunError: a process died without a word.
    """
    start_server(preload)
    context = multiprocessing.get_context("forkserver")
    waiting = list(enumerate(calls))[::-1]
    running: dict[Connection, _Child] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, arguments = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_call, args=(sender, function, arguments), daemon=True)
                process.start()
                sender.close()
                running[receiver] = _Child(number=number, process=process, receiver=receiver)
            for ready in wait(list(running)):
                child = running.pop(cast("Connection", ready))
                yield _receive(child)
    finally:
        for child in running.values():
            child.process.kill()
            child.process.join()


def _receive(child: _Child) -> Outcome[Any]:
    try:
        error, result = child.receiver.recv()
    except EOFError as ended:
        child.process.join()
        raise RunError(
            f"the process of call {child.number} died without a word (exit code {child.process.exitcode}): "
            "is there memory enough?"
        ) from ended
    child.process.join()
    child.receiver.close()
    return Outcome(number=child.number, error=error, result=result)


def _call(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send((None, function(*arguments)))
    except Exception as error:
        sender.send((error, None))
