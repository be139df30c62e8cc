"""What a program calls to be recorded: `trace` around it, `step` at the end of each step."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from truedag.tracer.annotate import REGISTRY
from truedag.tracer.errors import RecordError
from truedag.tracer.record.collection import collect_traces
from truedag.tracer.record.counters import install
from truedag.tracer.record.recording import RecorderName
from truedag.tracer.record.schedule import Schedule, Steps, parse_schedule
from truedag.tracer.record.tracer import Tracer, say

install()  # messages are numbered from the beginning of the groups that are made from now on
_current: Tracer | None = None


@contextmanager
def trace(
    out: str | os.PathLike[str],
    *,
    schedule: Schedule | str | Iterable[int] | None = None,
    ranks: Iterable[int] | None = None,
    recorder: RecorderName = "native",
    watch: Sequence[tuple[str, torch.nn.Module]] = (),
    max_bytes: int = 0,
    collect: bool = False,
) -> Iterator[Tracer]:
    """Record what runs inside the block, on this rank.

    Local: no rank waits for another, and each may record what it likes. Import `trace` before `init_process_group`:
    from then on messages are numbered, and can be matched wherever recordings begin. A recording that cannot be made is
    one warning on stderr, and the block runs all the same. In a program that was started under `truedag.tracer.attach`
    the recording from outside goes on, and the block's `step` counts its steps.

    Args:
        out: the folder that the traces go to, the same for all ranks; `truedag merge OUT/traces --out OUT/dag` makes
            the graph. Where the schedule has several windows: `OUT/windows/step-*/traces`.
        schedule: which steps, counted from 0 by `Tracer.step`: a `Cycle`, a set of numbers, or text as
            `parse_schedule` reads it; None: everything.
        ranks: those that record; None: all. For the others the block costs nothing.
        recorder: "native" (compiled), or "python" (slow, no compiler).
        watch: models by name; their modules' forward passes label the operators. None: they are found (`discovery`).
        max_bytes: as much may this rank's traces take together; then the recorder switches itself off. 0: no bound.
        collect: at the end of the block, bring the traces to rank 0's folder over the process group, for ranks without
            a shared disk. All ranks of the process group must come there then, recorded or not.

    Raises:
        RecordError: the schedule is none, or a trace runs already in this process.
    """
    global _current
    if _current is not None and _current.is_attached:
        yield _current
        return
    if _current is not None:
        raise RecordError("a trace runs in this process already; end it before the next")
    tracer = Tracer(
        Path(out),
        schedule=_read_schedule(schedule),
        ranks=None if ranks is None else frozenset(ranks),
        recorder=recorder,
        watch=watch,
        max_bytes=max_bytes,
        is_rank_told=multiprocessing.parent_process() is None,
    )
    set_current(tracer)
    failed = True
    try:
        tracer.begin()
        yield tracer
        failed = False
    finally:
        tracer.end()
        set_current(None)
        if collect:
            gather(tracer, failed=failed)


def step() -> None:
    """Say that a step has ended and the next begins, to the tracer of this process; nothing happens if it has none."""
    if _current is not None:
        _current.step()


def set_current(tracer: Tracer | None) -> None:
    """Make `tracer` the one of this process."""
    global _current
    _current = tracer


def gather(tracer: Tracer, *, failed: bool) -> None:
    """Bring an ended tracer's traces to rank 0; where that does not work they stay, and one warning says so.

    All ranks of the process group call it, and meet. Takes some minutes at most.
    """
    if not tracer.has_peers:
        return
    paths = [window.path for window in tracer.windows]
    why = "this rank failed" if failed else collect_traces(paths, tracer.out)
    if why:
        say(f"the traces were not collected, they are in {tracer.out} on each machine: {why}")


def _read_schedule(schedule: Schedule | str | Iterable[int] | None) -> Schedule | None:
    if isinstance(schedule, str):
        return parse_schedule(schedule)
    if isinstance(schedule, Iterable):
        return Steps.of(schedule)
    return schedule


def _forget_in_child() -> None:
    set_current(None)
    REGISTRY.enter(replace(REGISTRY.context, step=None))


os.register_at_fork(after_in_child=_forget_in_child)
