"""A recording around a program that knows nothing of it, and around the processes that it starts.

Theory of operation. Nothing is imported before the program imports it: the program's own `import torch` is when a
recording begins, so what it says in the environment before that holds. From then on torch.distributed's functions that
make and end process groups tell which rank this is (`Tracer.note_place`), and torch.optim's global hooks count the
steps. A process that the program starts, forked or anew (`startup/sitecustomize.py`), is recorded from the moment that
it joins a process group, and is left alone if it never does. Whatever fails in here is one warning; the program's own
calls always happen, once, with their own result.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from truedag.tracer.record.arrival import on_import
from truedag.tracer.record.options import RecordOptions, inherited_options
from truedag.tracer.record.trace_folder import find_trace_folders

if TYPE_CHECKING:
    from truedag.tracer.record.optimizer_steps import OptimizerSteps
    from truedag.tracer.record.tracer import Tracer

_STARTUP = Path(__file__).resolve().parents[1] / "startup"
_C10D = "torch.distributed.distributed_c10d"


class Attachment:
    """What is put around this process."""

    def __init__(self, options: RecordOptions, *, is_main: bool) -> None:
        self.failed = False
        self._options = options
        self._is_main = is_main
        self._tracer: Tracer | None = None
        self._has_begun = False
        self._has_warned = False
        self._steps: OptimizerSteps | None = None
        self._wrapped = False

    def install(self) -> None:
        """Wait for torch."""
        os.register_at_fork(after_in_child=self._start_anew)
        atexit.register(self.finish)  # before the program's own: it runs after them
        on_import(_C10D, self._wrap)
        if self._is_main:
            on_import("torch", self._on_torch)

    def take_over(self, options: RecordOptions) -> None:
        """This process, started by a recorded program, is told to record a program itself."""
        self._options = options
        self._is_main = True
        on_import("torch", self._on_torch)

    def finish(self) -> None:
        """End the recording, and say what there is."""
        with self._shield():
            tracer, self._tracer = self._tracer, None
            if tracer is None:
                if self._is_main and not self._has_begun and not find_trace_folders(self._options.out):
                    _say("nothing was recorded: the program did not import torch")
                return
            from truedag.tracer.record import tracing

            tracer.end()
            tracing.set_current(None)
            if self._options.collect:
                tracing.gather(tracer, failed=self.failed)
            told = _describe(tracer)
            if told:
                _say(told)

    def _on_torch(self, _torch: ModuleType) -> None:
        if self._is_main:  # and not a child that was forked from it meanwhile
            self._begin()

    def _begin(self) -> None:
        """Begin to record; once in a process."""
        if self._has_begun:
            return
        self._has_begun = True
        with self._shield():
            from truedag.tracer.record import tracing
            from truedag.tracer.record.optimizer_steps import OptimizerSteps
            from truedag.tracer.record.tracer import Tracer

            options = self._options
            restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            tracer = Tracer(
                options.out,
                schedule=options.schedule,
                ranks=options.wanted_ranks,
                recorder=options.recorder,
                max_bytes=options.max_bytes,
                is_rank_told=self._is_main,
                replaces=options.force or restarts not in ("", "0"),  # a later attempt is the one that counts
                is_attached=True,
            )
            tracer.begin()
            self._tracer = tracer
            tracing.set_current(tracer)
            if self._steps is None:
                self._steps = OptimizerSteps()
            self._steps.tracer = tracer
            self._replace(sys.modules["torch"], "compile", before=self._before_compiling)
            self._end_with_multiprocessing()

    def _end_with_multiprocessing(self) -> None:
        """Children of multiprocessing end without atexit."""
        util = sys.modules.get("multiprocessing.util")
        process = sys.modules.get("multiprocessing.process")
        if util is not None and process is not None and process.parent_process() is not None:
            util.Finalize(None, self.finish, exitpriority=-1_000_000)

    def _start_anew(self) -> None:
        """In a forked child: the recording is the parent's; this process may become a rank of its own."""
        self._is_main = False
        self._tracer = None
        self._has_begun = False
        if self._steps is not None:
            self._steps.tracer = None

    def _wrap(self, c10d: ModuleType) -> None:
        """Hear of process groups being made and ended."""
        if self._wrapped:
            return
        self._wrapped = True
        self._replace(c10d, "init_process_group", before=self._before_joining, after=self._note)
        for name in ("new_group", "split_group"):
            self._replace(c10d, name, after=self._note)
        self._replace(c10d, "destroy_process_group", before=self._before_leaving)

    def _replace(
        self,
        module: Any,
        name: str,
        *,
        before: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        original = getattr(module, name, None)
        if original is None:
            return

        @functools.wraps(original)
        def heard(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                with self._shield():
                    before(args, kwargs)
            result = original(*args, **kwargs)
            if after is not None:
                with self._shield():
                    after()
            return result

        for place in (module, sys.modules.get("torch.distributed")):
            if place is not None and getattr(place, name, None) is original:
                setattr(place, name, heard)

    def _before_compiling(self, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if self._tracer is not None:
            self._tracer.stop_discovering()

    def _before_joining(self, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        self._begin()

    def _note(self) -> None:
        if self._tracer is not None:
            self._tracer.note_place()

    def _before_leaving(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The traces can be collected as long as there is a group of all ranks."""
        import torch.distributed as dist

        group = args[0] if args else kwargs.get("group")
        if self._options.collect and group in (None, dist.group.WORLD) and self._tracer is not None:
            self.finish()

    @contextmanager
    def _shield(self) -> Iterator[None]:
        """Keep our failures away from the program."""
        try:
            yield
        except Exception as error:  # whatever it is, the program is not at fault
            if not self._has_warned:
                self._has_warned = True
                _say(f"recording failed, the program runs on: {type(error).__name__}: {error}")


_attachment: Attachment | None = None


def attach(options: RecordOptions) -> Attachment:
    """Record this process, and those that it starts, from when it imports torch. Imports nothing for it."""
    global _attachment
    options = replace(options, out=options.out.absolute())  # the program may change its folder
    os.environ.update(options.environment())
    path = [str(_STARTUP), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
    if _attachment is not None:
        _attachment.take_over(options)
    else:
        _attachment = Attachment(options, is_main=True)
        _attachment.install()
    return _attachment


def follow() -> None:
    """Record this process, which a recorded program started, if it becomes a rank."""
    global _attachment
    options = inherited_options()
    if options is not None and _attachment is None:
        _attachment = Attachment(options, is_main=False)
        _attachment.install()


def _describe(tracer: Tracer) -> str:
    """Say what a process recorded; '' if there is nothing to say, or it was said before."""
    windows = tracer.windows
    if not windows:
        is_missing = tracer.has_missed and not find_trace_folders(tracer.out)
        return (
            f"nothing was recorded: {tracer.num_steps} steps ended, none of those to record began" if is_missing else ""
        )
    num_events = sum(window.num_events for window in windows)
    where = windows[0].path if len(windows) == 1 else tracer.out
    pieces = "" if len(windows) == 1 else f" in {len(windows)} windows"
    return f"recorded {num_events:,} operators{pieces}: {where}"


def _say(text: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # stderr may be gone
        sys.stderr.write(f"truedag: {text}\n")
