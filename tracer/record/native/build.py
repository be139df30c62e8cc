"""Compile the native recorder once per torch version, Python ABI, compiler flags and source, and load it.

It is built in a folder of its own and moved into place (`library.py`) in one step: no locks, nothing half-built to be
found by another rank.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Protocol, cast

from truedag.tracer.errors import BuildError
from truedag.tracer.record.native.library import FLAGS, NAME, recorder_path, sources
from truedag.tracer.record.recorder import Recorder


class NativeRecorder(Recorder, Protocol):
    """The compiled module; its functions are documented in recorder.cpp."""

    def start(self, path: str, max_bytes: int = 0, may_intercept: bool = True, /) -> None:
        """Record this process into a new file of at most so many bytes; without `may_intercept` by observing only."""

    def observe(self) -> None:
        """Intercept no more in this recording, only observe."""

    def listen(self, whether: bool, /) -> None:
        """Note that somebody else begins, or ends, to observe operators."""

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each kind of record."""


def build_recorder() -> Path:
    """Return the path of the compiled recorder, compiling it first where that has not been done. Takes half a minute.

    Raises:
        BuildError: there is no C++ compiler, it failed, or the cache cannot be written.
    """
    library = recorder_path()
    if library.exists():
        return library
    compiler = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        raise BuildError(
            "no C++ compiler was found for the native recorder: install one (Debian: apt-get install g++, "
            "macOS: xcode-select --install), name it in CXX, or record with --recorder python"
        )
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
            built = _compile(Path(folder))
            built.replace(library)
    except OSError as error:
        raise BuildError(
            f"cannot write the native recorder to {library.parent}: {error}; set TRUEDAG_CACHE to another folder"
        ) from error
    return library


def _compile(folder: Path) -> Path:
    from torch.utils import cpp_extension

    scripts = str(Path(sys.executable).parent)  # ninja of this environment, activated or not
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{scripts}{os.pathsep}{path}"
    try:
        cpp_extension.load(
            name=NAME,
            sources=[str(source) for source in sources() if source.suffix == ".cpp"],
            extra_cflags=list(FLAGS),
            build_directory=str(folder),
            is_python_module=True,
            with_cuda=False,
            verbose=False,
        )
    except Exception as error:  # ninja, the compiler and torch each fail in their own way
        raise BuildError(
            f"the native recorder did not compile; record with --recorder python, or mend this:\n{error}"
        ) from error
    finally:
        os.environ["PATH"] = path
    return folder / f"{NAME}.so"


@functools.cache
def load_recorder() -> NativeRecorder:
    """Return the compiled recorder, building it where necessary.

    Raises:
        BuildError: it cannot be built or loaded.
    """
    path = build_recorder()
    spec = importlib.util.spec_from_file_location(NAME, path)
    if spec is None or spec.loader is None:
        raise BuildError(f"{path} is no Python extension module; delete it and try again")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"{path} cannot be loaded: {error}; delete it and try again") from error
    return cast("NativeRecorder", module)
