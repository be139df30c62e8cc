"""Which runs may use a folder together, and which may not."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from truedag.launch.deployment import RunRecord
from truedag.launch.deployment_file import load_deployment
from truedag.launch.errors import FolderError
from truedag.launch.run_folder import ENDED, RunFolder

SOURCE, DEPLOYMENT = load_deployment("moe-10b-tp2-ep2-pp2-cpu", [])


def record(run: str, *, num_nodes: int = 2, late_s: float = 0.0) -> RunRecord:
    return RunRecord(
        source=SOURCE, overrides=(), command=(), host="here", platform="", cores=1, versions={}, strategy="",
        started=(datetime.now().astimezone() + timedelta(seconds=late_s)).isoformat(), run=run, num_nodes=num_nodes,
        deployment=DEPLOYMENT,
    )  # fmt: skip


def run_of(folder: RunFolder) -> str:
    return RunRecord.model_validate_json(folder.record.read_bytes()).run


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(root=tmp_path / "out")


def test_the_nodes_of_a_run_share_a_folder_whoever_comes_first(folder: RunFolder) -> None:
    folder.claim(record("first"), 1, replace=False)
    folder.trace(1).write_bytes(b"recorded")
    folder.claim(record("second"), 0, replace=True)
    assert run_of(folder) == "first"
    assert folder.trace(1).exists()


@pytest.mark.parametrize("why", ["same node", "ended", "old", "one node"])
def test_an_earlier_run_is_not_joined(folder: RunFolder, why: str) -> None:
    folder.claim(record("earlier"), 0, replace=False)
    folder.trace(0).write_bytes(b"earlier")
    if why == "ended":
        folder.node(0).write_text(ENDED)
    late_s = 3600.0 if why == "old" else 0.0
    later = record("later", num_nodes=1 if why == "one node" else 2, late_s=late_s)
    node = 0 if why == "same node" else 1
    with pytest.raises(FolderError, match="--force"):
        folder.claim(later, node, replace=False)
    assert run_of(folder) == "earlier"
    folder.claim(later, node, replace=True)
    assert run_of(folder) == "later"
    assert not folder.trace(0).exists()


def test_a_folder_is_left_without_its_lock(folder: RunFolder) -> None:
    folder.claim(record("one"), 0, replace=False)
    assert [path.name for path in folder.root.parent.iterdir()] == ["out"]
