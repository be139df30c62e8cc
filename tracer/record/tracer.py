"""Record a program as it goes, step by step: all of it, or windows of some steps, on all ranks or on some.

Theory of operation. Nothing here talks to another rank: a rank decides by its own number and its own count of steps
whether it records, so ranks may begin, stop and leave recording out as they like, and none ever waits for another.
Collectives carry their backend's absolute number, and messages are counted whether they are recorded or not
(`counters`), so that what was recorded still fits together. A step that is recorded is marked in the trace.

Often the rank is not known when a recording begins. Its file has the process's name then, and gets the rank's as soon
as there is a process group. A recording that cannot be made costs one warning, and the program runs on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from truedag.tracer.annotate import REGISTRY
from truedag.tracer.errors import RecordError
from truedag.tracer.record.counters import install
from truedag.tracer.record.place import find_place
from truedag.tracer.record.recording import OpenRecording, RecorderName, load_engine
from truedag.tracer.record.schedule import Schedule
from truedag.tracer.record.trace_folder import find_traces, process_file, rank_file, trace_folder

_LEAST_BYTES = 1 << 16
_EARLIER = "there already, of an earlier run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What this rank recorded of some steps."""

    first_step: int
    path: Path
    num_events: int
    switched_off: str
    """Why the recorder gave up; empty: it did not."""


class Tracer:
    """Records this process in the windows of a schedule. One thread, the program's main one, calls its methods."""

    def __init__(
        self,
        out: Path,
        *,
        schedule: Schedule | None = None,
        ranks: frozenset[int] | None = None,
        recorder: RecorderName = "native",
        watch: Sequence[tuple[str, torch.nn.Module]] = (),
        max_bytes: int = 0,
        is_rank_told: bool = True,
        replaces: bool = False,
        is_attached: bool = False,
    ) -> None:
        """Prepare; `begin` begins.

        Args:
            out: the folder; `trace_folder` says what lies where in it.
            schedule: None: everything is one window.
            ranks: those that record; None: all.
            recorder: "native" or "python".
            watch: models by name; their modules' forward passes label the operators. None: they are found
                (`discovery`).
            max_bytes: of all of this rank's files together; 0: no bound.
            is_rank_told: whether RANK and WORLD_SIZE in the environment mean this process: not in the children of a
                rank, which inherit them.
            replaces: whether an older trace of this rank gives way.
            is_attached: whether it was put around the program from outside.
        """
        self.windows: list[Window] = []
        self.is_attached = is_attached
        self._out = out.absolute()
        self._schedule = schedule
        self._ranks = ranks
        self._recorder: RecorderName = recorder
        self._watch = watch
        self._max_bytes = max_bytes
        self._is_rank_told = is_rank_told
        self._replaces = replaces
        self._pid = os.getpid()
        self._step = 0
        self._is_told = False
        self._is_off = False
        self._first_step = 0
        self._path = Path()
        self._taken = Path()
        self._began_ns = 0
        self._open: OpenRecording | None = None
        self._num_bytes = 0
        self._marked: int | None = None
        self._discovers = True
        self._has_failed = False
        self._has_peers = False
        self._rank: int | None = None

    @property
    def out(self) -> Path:
        """The folder that everything lies in."""
        return self._out

    @property
    def has_peers(self) -> bool:
        """Whether this process is, or was, one rank of several."""
        self._find_rank()
        return self._has_peers

    @property
    def num_steps(self) -> int:
        """Steps that have ended."""
        return self._step

    @property
    def has_missed(self) -> bool:
        """Whether there was nothing to record yet, though nothing was in the way."""
        rank = self._find_rank()
        return not (self.windows or self._has_failed or (rank is not None and not self._is_wanted(rank)))

    @property
    def is_recording(self) -> bool:
        """Whether what runs now is recorded."""
        return self._open is not None

    def begin(self) -> None:
        """Begin step 0."""
        rank = self._find_rank()
        if rank is None or self._is_wanted(rank):
            install()
        self._enter()

    def step(self) -> None:
        """A step has ended, and the next begins. Local; does not synchronise.

        Until the first call steps were counted from outside, and so was the one that ends now.
        """
        is_counted = not self._is_told and self._step > 0
        self._is_told = True
        if not is_counted:
            self._advance()

    def count_step(self) -> None:
        """A step has ended, as it seems from outside; a program that calls `step` itself knows better."""
        if not self._is_told:
            self._advance()

    def note_place(self) -> None:
        """Which rank this is, or which groups there are, may be known now: write it down, give the file its name."""
        if self._open is None or self._pid != os.getpid():
            return
        self._open.note_place()
        rank = self._find_rank()
        if rank is not None and not self._is_wanted(rank):
            self._drop()
        elif rank is not None and self._recorder == "native":  # the Python recorder opens its file at the end
            self._rename(rank)

    def stop_discovering(self) -> None:
        """Name no modules any more: the program is about to compile them."""
        self._discovers = False
        if self._open is not None:
            self._open.stop_discovering()

    def end(self) -> None:
        """Stop; nothing is recorded from here on. In a child that was forked meanwhile nothing happens."""
        if self._pid == os.getpid():
            self._leave()
        self._is_off = True

    def _advance(self) -> None:
        if self._pid != os.getpid() or self._is_off:
            return
        self._step += 1
        if self._open is not None and self._window() != self._first_step:
            self._leave()
        self._enter()
        if self._open is not None:
            self._open.note_place()

    def _window(self) -> int | None:
        return 0 if self._schedule is None else self._schedule.window(self._step)

    def _enter(self) -> None:
        if self._open is None and not self._is_off and self._window() == self._step:
            rank = self._find_rank()
            if rank is None or self._is_wanted(rank):
                self._begin_window(rank)
        if self._open is not None:
            self._mark(self._step)

    def _mark(self, step: int | None) -> None:
        self._marked = step
        REGISTRY.enter(replace(REGISTRY.context, step=step))

    def _begin_window(self, rank: int | None) -> None:
        is_only = self._schedule is None or self._schedule.is_single
        folder = trace_folder(self._out, None if is_only else self._step)
        self._first_step = self._step
        self._path = folder / (process_file() if rank is None else rank_file(rank))
        left = self._max_bytes - self._num_bytes if self._max_bytes else 0
        try:
            if self._max_bytes and left < _LEAST_BYTES:
                raise RecordError(f"the traces have reached the size they are allowed ({self._max_bytes} bytes)")
            folder.mkdir(parents=True, exist_ok=True)
            if self._replaces:
                self._path.unlink(missing_ok=True)
            elif self._path.exists():
                raise RecordError(f"{self._path} is {_EARLIER}: choose another folder, or replace it")
            self._open = self._start(left)
        except (OSError, RecordError) as error:
            self._give_up(str(error))
        except Exception as error:  # whatever it is, the program is not at fault
            self._give_up(f"{type(error).__name__}: {error}")

    def _start(self, max_bytes: int) -> OpenRecording:
        engine = load_engine(self._recorder)
        try:
            running = OpenRecording(
                self._path,
                engine,
                self._recorder,
                watch=self._watch,
                max_bytes=max_bytes,
                is_rank_told=self._is_rank_told,
                discovers=self._discovers,
            )
        except RecordError:
            with suppress(OSError):  # a beginning that came to nothing
                self._path.unlink()
            raise
        self._began_ns = self._path.stat().st_mtime_ns
        return running

    def _leave(self) -> None:
        """End the window, if there is one."""
        if self._open is None:
            return
        if REGISTRY.context.step == self._marked:
            self._mark(None)
        recording, self._open = self._open, None
        recording.end()
        rank = self._find_rank()
        if rank is not None and not self._is_wanted(rank):
            self._path.unlink(missing_ok=True)
            return
        if rank is not None:
            self._rename(rank)
        elif self._is_rank_told:
            if self._is_launcher():
                self._path.unlink(missing_ok=True)
                return
            self._rename(0)
        told = recording.recording
        with suppress(OSError):
            self._num_bytes += self._path.stat().st_size
        self._is_off = self._is_off or bool(told.switched_off)
        window = Window(
            first_step=self._first_step,
            path=self._path,
            num_events=told.num_events,
            switched_off=told.switched_off,
        )
        self.windows.append(window)

    def _is_launcher(self) -> bool:
        """Whether this process, no rank itself, only started the ranks: they have left traces here meanwhile."""
        found = (path for path in find_traces(self._path.parent) if path.name.startswith("rank-"))
        return any(path.name != rank_file(0) and path.stat().st_mtime_ns >= self._began_ns for path in found)

    def _drop(self) -> None:
        """This rank was not to be recorded, as is known now."""
        recording, self._open = self._open, None
        assert recording is not None
        recording.end()
        self._path.unlink(missing_ok=True)

    def _rename(self, rank: int) -> None:
        """Give the file its rank's name; it keeps the process's where there is such a file already."""
        wanted = self._path.with_name(rank_file(rank))
        if wanted in (self._path, self._taken):
            return
        try:
            if wanted.exists() and not self._replaces:
                raise FileExistsError(f"{wanted} is there already, of an earlier run or of other ranks of this one")
            self._path.replace(wanted)
        except OSError as error:
            self._taken = wanted
            say(f"this recording keeps the name {self._path}: {error}")
        else:
            self._path = wanted
            if self._open is not None:
                self._open.recording.path = wanted

    def _find_rank(self) -> int | None:
        """This process's rank, also when its process group has gone again; None: nobody has said it."""
        place = find_place(is_rank_told=self._is_rank_told)
        if place:
            self._rank = int(place["rank"])
            self._has_peers = self._has_peers or int(place["world_size"]) > 1
        return self._rank

    def _is_wanted(self, rank: int) -> bool:
        return self._ranks is None or rank in self._ranks

    def _give_up(self, why: str) -> None:
        self._is_off = self._has_failed = True
        say(f"not recorded, the program runs on: {why}")


def say(text: str) -> None:
    """Tell the program's user, as long as somebody listens."""
    with suppress(OSError, ValueError, AttributeError):  # stderr may be gone
        sys.stderr.write(f"truedag: {text}\n")
