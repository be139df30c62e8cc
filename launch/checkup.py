"""Looks at this machine: versions, compiler, recorder, graphviz, process groups."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from truedag.launch.deployment import PACKAGES, installed_version


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    well: bool
    found: str


def examine() -> list[Finding]:
    """Look at everything, without changing anything; never raises because of what it finds."""
    python = Finding(
        name="python", well=sys.version_info >= (3, 11), found=f"{platform.python_version()} at {sys.executable}"
    )
    checks: dict[str, Callable[[], str]] = {
        "compiler": _compiler,
        "recorder": _recorder,
        "gloo": _gloo,
        "graphviz": _graphviz,
    }
    return [python, *map(_package, PACKAGES), *(_check(name, check) for name, check in checks.items())]


def _package(name: str) -> Finding:
    version = installed_version(name)
    return Finding(name=name, well=version != "not installed", found=version)


def _check(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name=name, well=True, found=look())
    except Exception as error:  # a broken installation fails in any way, and that is the finding
        return Finding(name=name, well=False, found=f"{type(error).__name__}: {error}")


def _compiler() -> str:
    compiler = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        raise FileNotFoundError("none (Debian: apt-get install g++, macOS: xcode-select --install)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return version.stdout.splitlines()[0]


def _recorder() -> str:
    from truedag.tracer.record.native.library import recorder_path

    path = recorder_path()
    return f"built, {path}" if path.exists() else f"not built yet; the first run builds {path}"


def _gloo() -> str:
    from torch import distributed

    if not distributed.is_gloo_available():
        raise RuntimeError("this torch has no gloo")
    return "there"


def _graphviz() -> str:
    from truedag.tracer.views.render import render

    with tempfile.TemporaryDirectory(prefix="truedag-doctor-") as folder:
        dot, picture = Path(folder) / "two.dot", Path(folder) / "two.svg"
        dot.write_text('digraph { here [pos="0,0"]; there [pos="100,0"]; here -> there }')
        render(dot, [picture], dpi=72)
        return f"draws ({picture.stat().st_size} bytes of SVG for two nodes)"
