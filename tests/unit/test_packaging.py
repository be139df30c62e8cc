"""The four folders and the package list of pyproject.toml say the same, and bare imports are caught."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("launch", "model", "parallel", "tracer")


@pytest.fixture(scope="module")
def setuptools_table() -> Mapping[str, Any]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    table: Mapping[str, Any] = project["tool"]["setuptools"]
    return table


def source_files() -> list[Path]:
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    return [path.relative_to(ROOT) for path in files if "__pycache__" not in path.parts]


def package_of(folder: Path) -> str:
    return ".".join(("truedag", *folder.parts))


def test_every_folder_with_python_files_is_a_listed_package(setuptools_table: Mapping[str, Any]) -> None:
    folders = {path.parent for path in source_files() if path.suffix == ".py"} | {Path(name) for name in FOLDERS}
    assert sorted(setuptools_table["packages"]) == sorted(map(package_of, folders))


def test_every_package_is_mapped_to_its_folder(setuptools_table: Mapping[str, Any]) -> None:
    expected = {name: "/".join(name.split(".")[1:]) for name in setuptools_table["packages"]}
    assert setuptools_table["package-dir"] == expected


def test_every_data_file_is_installed(setuptools_table: Mapping[str, Any]) -> None:
    missing = []
    for path in source_files():
        if path.suffix == ".py":
            continue
        # The package is the nearest folder that is one; patterns are relative to it.
        package = next(folder for folder in path.parents if package_of(folder) in setuptools_table["packages"])
        patterns = setuptools_table["package-data"].get(package_of(package), [])
        if not any(fnmatch(str(path.relative_to(package)), pattern) for pattern in patterns):
            missing.append(str(path))
    assert missing == []


def test_the_namespace_has_no_init_and_every_folder_is_typed() -> None:
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / ".typings" / "truedag" / "__init__.py").exists()
    for folder in FOLDERS:
        assert (ROOT / folder / "py.typed").is_file()


def test_type_checkers_find_the_folders_under_their_installed_names() -> None:
    for folder in FOLDERS:
        assert (ROOT / ".typings" / "truedag" / folder).resolve() == ROOT / folder


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("statement", ["import {0}", "from {0} import x", "import {0}.y", "from {0}.y import x"])
def test_ruff_refuses_a_bare_import(folder: str, statement: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--output-format", "concise", "-"]
    source = statement.format(folder) + "\n"
    result = subprocess.run(command, input=source, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"import truedag.{folder}" in result.stdout


def test_every_pin_fits_the_supported_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["test"]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text
