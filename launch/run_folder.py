"""The folder of a run: where each thing lies, how it is made, and when an old one may be replaced."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from truedag.launch.console import shorten
from truedag.launch.errors import FolderError


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
    def torchrun_log(self) -> Path:
        """What torchrun itself printed."""
        return self.logs / "torchrun.log"

    def trace(self, rank: int) -> Path:
        """One rank's trace."""
        return self.traces / f"rank-{rank:05d}.trace"

    def state(self, rank: int) -> Path:
        """One rank's state."""
        return self.ranks / f"rank-{rank:05d}.json"

    def log(self, rank: int) -> Path:
        """What one rank printed."""
        return self.logs / f"rank-{rank:05d}.log"

    def check_free(self, *, replace: bool) -> None:
        """Look, without changing anything, whether a run may write here.

        Raises:
            FolderError: something is there and `replace` is not asked for, or it is not a run's folder.
        """
        if not self.root.exists() or (self.root.is_dir() and not any(self.root.iterdir())):
            return
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
            for folder in (self.traces, self.ranks, self.logs):
                folder.mkdir(parents=True)
        except OSError as error:
            raise FolderError(f"{shorten(self.root)} cannot be made: {error}; choose another with --out") from error

    def _is_run(self) -> bool:
        try:
            return "truedag_run" in json.loads(self.record.read_text())
        except (OSError, ValueError, TypeError):
            return False
