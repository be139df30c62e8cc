"""Where traces lie, and under which names.

::

    OUT/traces/rank-00003.trace                       a recording of one window, or of everything
    OUT/windows/step-00010/traces/rank-00003.trace    one of several windows, by its first step
    .../rank-00003.trace.gz                           brought here from another machine
    .../pid-HOST-1234.trace                           of a process that did not know its rank, or whose rank's file was
                                                      there already

Each `traces` folder is merged as it is.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

TRACES = "traces"
_WINDOWS = "windows"


def trace_folder(out: Path, first_step: int | None) -> Path:
    """Return where the traces of a window lie; None: the only one."""
    return out / TRACES if first_step is None else out / _WINDOWS / f"step-{first_step:05d}" / TRACES


def rank_file(rank: int) -> str:
    """Return the name of a rank's trace."""
    return f"rank-{rank:05d}.trace"


def process_file() -> str:
    """Return the name of this process's trace while nobody knows its rank."""
    return f"pid-{re.sub('[^A-Za-z0-9_.]', '_', platform.node())}-{os.getpid()}.trace"


def find_traces(folder: Path) -> list[Path]:
    """Return the traces of a folder, one a rank, and after them those that lie under a process's name."""
    ranks = {path.name.removesuffix(".gz"): path for path in sorted(folder.glob("rank-*.trace.gz"))}
    ranks |= {path.name: path for path in folder.glob("rank-*.trace")}
    return [*(ranks[name] for name in sorted(ranks)), *sorted(folder.glob("pid-*.trace"))]


def find_trace_folders(out: Path) -> list[Path]:
    """Return the folders below `out` that hold traces, in the order of their steps."""
    folders = [out / TRACES, *sorted((out / _WINDOWS).glob(f"step-*/{TRACES}"), key=_first_step)]
    return [folder for folder in folders if find_traces(folder)]


def _first_step(folder: Path) -> tuple[int, str]:
    digits = folder.parent.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1, digits
