"""Imports run one way: launch -> parallel -> model, launch -> tracer; tracer works on any program."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ALLOWED = {
    "launch": {"launch", "parallel", "model", "tracer"},
    "parallel": {"parallel", "model"},
    "model": {"model"},
    "tracer": {"tracer"},
}
# Inside the tracer data goes forward only, and the graph on disk is the meeting point.
FORWARD = {
    "record": {"record", "annotate", "identity", "errors"},
    "annotate.py": {"identity"},
    "identity.py": set(),
    "merge": {"merge", "record", "graph", "topology", "errors"},
    "graph": {"graph", "topology", "errors"},
    "topology.py": set(),
    "analysis": {"analysis", "graph", "topology", "errors"},
    "estimate": {"estimate", "graph", "errors"},
    "export": {"export", "graph", "errors"},
    "replay": {"replay", "graph", "record", "errors"},
    "audit": {"audit", "analysis", "graph", "topology", "errors"},
    "dry": {"dry", "merge", "graph", "record", "errors"},
    "views": {"views", "analysis", "graph", "topology", "errors"},
}
# The executor tells the tracer what no observer can see, as any program may.
ANNOTATIONS = ("parallel", "truedag.tracer.annotate")


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults(folder: str, modules: Iterator[str]) -> list[str]:
    found = []
    for module in modules:
        parts = module.split(".")
        if parts[0] != "truedag":
            continue
        if (folder, ".".join(parts[:3])) != ANNOTATIONS and parts[1] not in ALLOWED[folder]:
            found.append(module)
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = {str(path.relative_to(ROOT)): found for path in files if (found := faults(folder, imported_modules(path)))}
    assert wrong == {}


@pytest.mark.parametrize("part", FORWARD)
def test_inside_the_tracer_nothing_looks_back(part: str) -> None:
    place = ROOT / "tracer" / part
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert files
    for path in files:
        imported = {name.split(".")[2] for name in imported_modules(path) if name.startswith("truedag.tracer.")}
        assert imported <= FORWARD[part], path


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("tracer", "from truedag.launch import cli"),
        ("tracer", "import truedag.model.config"),
        ("model", "from truedag import tracer"),
        ("model", "from truedag.tracer.annotate import scope"),
        ("parallel", "from truedag.tracer.merge.merging import merge_traces"),
        ("parallel", "def late() -> None:\n    from truedag.launch import run"),
    ],
)
def test_a_forbidden_import_is_seen(tmp_path: Path, folder: str, source: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert len(faults(folder, imported_modules(path))) == 1


def test_the_executor_may_annotate(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("from truedag.tracer import annotate\nfrom truedag.tracer.annotate import scope\n")
    assert faults("parallel", imported_modules(path)) == []
