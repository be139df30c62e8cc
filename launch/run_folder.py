"""The folder of a run: where each thing lies, how it is made, and when an old one may be replaced."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from truedag.launch.console import shorten
from truedag.launch.deployment import RunRecord
from truedag.launch.errors import FolderError

RUNNING, ENDED = "running", "ended"
_LOCK_S = 10.0
_JOIN_S = 15 * 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """The process that started a node's ranks."""

    pid: int
    began: str
    """When it began, as the system counts, which tells it from a later process of the same pid; "-": not known."""

    host: str

    @classmethod
    def here(cls) -> Launcher:
        """This process."""
        return cls(pid=os.getpid(), began=_find_start(os.getpid()) or "-", host=platform.node())

    @classmethod
    def read(cls, mark: str) -> Launcher | None:
        """What a node's mark says; None: its ranks have ended, or it does not say."""
        match mark.split(maxsplit=3):
            case [state, pid, began, host] if state == RUNNING and pid.isdecimal():
                return cls(pid=int(pid), began=began, host=host)
        return None

    def mark(self) -> str:
        """What stands in the node's mark."""
        return f"{self.pid} {self.began} {self.host}"

    def is_another_here(self) -> bool:
        """Whether it is not this process, and runs on this host."""
        if self.host != platform.node() or self.pid == os.getpid():
            return False
        return _find_start(self.pid) == self.began


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """The places inside one run's folder (docs/DESIGN.md, A run's folder)."""

    root: Path

    @property
    def record(self) -> Path:
        """What was asked for, and where: run.json. Its presence makes a folder a run's folder."""
        return self.root / "run.json"

    @property
    def traces(self) -> Path:
        """One trace per rank."""
        return self.root / "traces"

    @property
    def ranks(self) -> Path:
        """One state per rank (`truedag.launch.rank_state`)."""
        return self.root / "ranks"

    @property
    def logs(self) -> Path:
        """What torchrun and each rank printed."""
        return self.root / "logs"

    @property
    def dag(self) -> Path:
        """The merged dataset."""
        return self.root / "dag"

    @property
    def views(self) -> Path:
        """The drawings."""
        return self.root / "views"

    @property
    def cause(self) -> Path:
        """The state of the rank that ended the run, wherever it ran."""
        return self.ranks / "cause.json"

    def lost(self, node: int) -> Path:
        """There when the ranks of a node could not hear the others any more."""
        return self.ranks / f"lost-node-{node:05d}"

    @property
    def nodes(self) -> Path:
        """One mark per node that takes part and writes here."""
        return self.root / "nodes"

    def node(self, node: int) -> Path:
        """A node's mark: RUNNING and which process on which host started its ranks (`Launcher`), then ENDED."""
        return self.nodes / f"node-{node:05d}"

    def torchrun_log(self, node: int) -> Path:
        """What torchrun itself printed on a node."""
        return self.logs / f"torchrun-node-{node:05d}.log"

    def trace(self, rank: int) -> Path:
        """One rank's trace."""
        return self.traces / f"rank-{rank:05d}.trace"

    def routing(self, rank: int) -> Path:
        """How many tokens one rank's routers sent to each expert, where that was asked for."""
        return self.root / "routing" / f"rank-{rank:05d}.jsonl"

    def state(self, rank: int) -> Path:
        """One rank's state."""
        return self.ranks / f"rank-{rank:05d}.json"

    def log(self, rank: int) -> Path:
        """What one rank printed."""
        return self.logs / f"rank-{rank:05d}.log"

    def check_free(self, *, replace: bool) -> None:
        """Look, without changing anything, whether a run may write here.

        Raises:
            FolderError: a run is going on there, or something is there and `replace` is not asked for, or it is not a
                run's folder.
        """
        if not self.root.exists() or (self.root.is_dir() and not any(self.root.iterdir())):
            return
        launcher = self._find_launcher() if self._is_run() else None
        if launcher is not None:
            raise FolderError(
                f"a run is going on in {shorten(self.root)}, started by pid {launcher.pid} on {launcher.host}: "
                "choose another --out, or end it"
            )
        if not replace:
            raise FolderError(
                f"{shorten(self.root)} is there already: choose another with --out, or replace it with --force"
            )
        if not self._is_run():
            raise FolderError(
                f"{shorten(self.root)} is not the folder of a truedag run (it has no run.json of truedag's), "
                "so --force does not delete it: choose another with --out"
            )

    def make(self, *, replace: bool) -> None:
        """Make the folder and its subfolders; an old run's folder gives way if `replace` is asked for.

        Raises:
            FolderError: as `check_free`, or the place cannot be written to.
        """
        self.check_free(replace=replace)
        try:
            if self.root.exists():
                shutil.rmtree(self.root)
            for folder in (self.traces, self.ranks, self.logs, self.nodes):
                folder.mkdir(parents=True)
        except OSError as error:
            raise FolderError(f"{shorten(self.root)} cannot be made: {error}; choose another with --out") from error

    def find_run(self, record: RunRecord, node: int) -> RunRecord | None:
        """Return the record of this very run, if another node that shares the folder has begun it; else None.

        A run that this node was in already, or that has ended on some node, or that is old, is an earlier one.
        """
        if record.num_nodes == 1 or self.node(node).exists():
            return None
        try:
            found = RunRecord.model_validate_json(self.record.read_bytes())
        except (OSError, ValidationError):
            return None
        age_s = (datetime.fromisoformat(record.started) - datetime.fromisoformat(found.started)).total_seconds()
        fits = found.num_nodes == record.num_nodes and found.deployment.name == record.deployment.name
        ended = any(path.read_text() == ENDED for path in self.nodes.glob("node-*"))
        return found if fits and not ended and abs(age_s) < _JOIN_S else None

    def claim(self, record: RunRecord, node: int, *, replace: bool) -> None:
        """Make the folder and write the record; or join the run that another node has begun in it.

        Raises:
            FolderError: as `make`.
        """
        with self._hold():
            if self.find_run(record, node) is None:
                self.make(replace=replace)
                self.record.write_text(record.model_dump_json(indent=2) + "\n")
            self.node(node).write_text(f"{RUNNING} {Launcher.here().mark()}")

    @contextmanager
    def _hold(self) -> Iterator[None]:
        """Keep the other nodes out for a moment: a folder beside this one is made by one of them alone."""
        lock = self.root.parent / f".{self.root.name}.lock"
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                lock.mkdir(parents=True)
                break
            except FileExistsError:
                if time.monotonic() > deadline:  # whoever made it is gone
                    break
                time.sleep(0.05)
            except OSError as error:
                raise FolderError(f"{shorten(self.root)} cannot be made: {error}; choose another with --out") from error
        try:
            yield
        finally:
            with suppress(OSError):
                lock.rmdir()

    def _find_launcher(self) -> Launcher | None:
        """Another process on this host whose ranks write here, if there is one."""
        for path in sorted(self.nodes.glob("node-*")):
            launcher = Launcher.read(path.read_text())
            if launcher is not None and launcher.is_another_here():
                return launcher
        return None

    def _is_run(self) -> bool:
        try:
            return "truedag_run" in json.loads(self.record.read_text())
        except (OSError, ValueError, TypeError):
            return False


def _find_start(pid: int) -> str | None:
    """When a process began; "-" where the system does not say; None if it has ended, be it waited for or not."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (ProcessLookupError, OverflowError):
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "-"
    return None if fields[0] in "ZX" else fields[19]
