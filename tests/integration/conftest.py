"""A run of the small deployment, for the tests of commands that read one: it is made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import truedag, write_small_deployment


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder, called out; two ranks, each a pipeline stage. Tests add to it and change nothing."""
    folder = tmp_path_factory.mktemp("small")
    result = truedag("run", str(write_small_deployment(folder)), "--out", "out", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "out"
