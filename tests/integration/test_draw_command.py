"""`truedag draw`: from a run's folder to pictures, all or those that were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import truedag
from unit.small_dag import pipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    pipeline().write(folder / "dag")
    return folder


def test_a_run_is_drawn_beside_its_dataset(run: Path) -> None:
    done = truedag("draw", ".", cwd=run)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [
        "simplified", "comprehensive", "detailed", "next",
    ]  # fmt: skip
    for view in ("simplified", "comprehensive", "detailed"):
        assert {path.suffix for path in (run / "views").glob(f"{view}.*")} == {".dot", ".svg", ".png"}


def test_one_layer_is_drawn_elsewhere(run: Path, tmp_path: Path) -> None:
    done = truedag("draw", str(run), "--layer", "1", "--out", "layer", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (drawing,) = json.loads(done.stdout).values()
    assert drawing["view"] == "detailed"
    assert (tmp_path / "layer" / "detailed" / "stage-1.layer-1.forward.svg").exists()


def test_a_layer_that_is_not_there_is_said(run: Path, tmp_path: Path) -> None:
    done = truedag("draw", str(run), "--layer", "9", "--out", "none", cwd=tmp_path)
    assert done.returncode == 1
    assert "layer 9 is not in the graph" in done.stderr
    assert "it has layers 0,1" in done.stderr
    assert "Traceback" not in done.stderr
