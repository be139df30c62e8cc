"""What a Python runs at its start when a recorded program started it; it records the process if it becomes a rank.

Nothing is imported for the program, torch least of all: the process is looked at again when it imports
torch.distributed. Python finds this file before the environment's own sitecustomize, which gets its turn here.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress


def _give_way() -> None:
    """Take this folder off the path, and let the environment's own sitecustomize run."""
    here = os.path.realpath(os.path.dirname(__file__))  # noqa: PTH120
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != here]
    own = sys.modules.pop(__name__, None)
    try:
        importlib.import_module("sitecustomize")
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        if own is not None:
            sys.modules.setdefault(__name__, own)


def _follow() -> None:
    """Record this process if it becomes a rank; whatever goes wrong is not its business."""
    with suppress(Exception):
        from truedag.tracer.record.attachment import follow

        follow()


if __name__ == "sitecustomize":
    _follow()
    _give_way()
