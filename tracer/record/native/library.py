"""Which compiled recorder belongs to this torch, Python and source, and where it lies. No torch.

The library lies in a per-user cache (`TRUEDAG_CACHE`, else `XDG_CACHE_HOME/truedag`, else `~/.cache/truedag`) under a
name that holds a hash of the torch version, the Python ABI, the compiler's flags and the source.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path

NAME = "truedag_recorder"
FLAGS = ("-O3", "-DNDEBUG", "-std=c++20", "-Wno-unused-parameter")

_VERSION = re.compile(r"""^__version__(?:: str)? = ['"](.+)['"]$""", re.MULTILINE)


def sources() -> list[Path]:
    """Return the C++ sources, headers first."""
    folder = Path(__file__).parent
    return [*sorted(folder.glob("*.h")), *sorted(folder.glob("*.cpp"))]


def recorder_path() -> Path:
    """Return where the library for this torch, Python and source lies, built or not."""
    digest = hashlib.sha256()
    for part in (torch_version(), sysconfig.get_config_var("SOABI") or sys.version, *FLAGS):
        digest.update(part.encode() + b"\0")
    for source in sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    cache = os.environ.get("TRUEDAG_CACHE")
    if cache is None:
        cache = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "truedag")
    return Path(cache) / f"{NAME}-{digest.hexdigest()[:16]}.so"


def torch_version() -> str:
    """Return the version of the torch that would be imported, as its own file says it; importing it takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is not None and found.origin is not None:
        file = Path(found.origin).with_name("version.py")
        said = _VERSION.search(file.read_text()) if file.is_file() else None
        if said is not None:
            return said[1]
    import torch

    return str(torch.__version__)
