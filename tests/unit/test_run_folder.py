"""Which runs may use a folder together, and which may not."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from truedag.launch.deployment import RunRecord
from truedag.launch.deployment_file import load_deployment
from truedag.launch.errors import FolderError
from truedag.launch.run_folder import ENDED, RUNNING, Launcher, RunFolder

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


CLAIM = """
import sys
from pathlib import Path
from truedag.launch.deployment import RunRecord
from truedag.launch.run_folder import RunFolder
RunFolder(root=Path(sys.argv[1])).claim(RunRecord.model_validate_json(sys.argv[2]), int(sys.argv[3]), replace=False)
print("claimed", flush=True)
sys.stdin.read()
"""


def claim_elsewhere(folder: RunFolder, run: RunRecord, node: int) -> subprocess.Popen[str]:
    """Let another process of this host claim the folder and stay until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(folder.root), run.model_dump_json(), str(node)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    return process


@pytest.mark.parametrize("replace", [False, True])
def test_the_folder_of_a_run_that_is_going_on_is_not_replaced(folder: RunFolder, replace: bool) -> None:
    with claim_elsewhere(folder, record("first", num_nodes=1), 0) as process:
        said = f"a run is going on in .*, started by pid {process.pid} on {platform.node()}: choose another --out"
        with pytest.raises(FolderError, match=said):
            folder.check_free(replace=replace)
        with pytest.raises(FolderError, match=said):
            folder.claim(record("second", num_nodes=1), 0, replace=replace)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # killed, and not waited for: a zombie
        folder.claim(record("second", num_nodes=1), 0, replace=True)
    assert run_of(folder) == "second"


def test_a_node_on_the_same_host_joins_a_run_that_is_going_on(folder: RunFolder) -> None:
    with claim_elsewhere(folder, record("first"), 0):
        folder.claim(record("second"), 1, replace=False)
        assert run_of(folder) == "first"


@pytest.mark.parametrize("why", ["another host", "the pid is another process's now", "no launcher named"])
def test_a_mark_of_no_process_of_this_host_is_of_an_earlier_run(folder: RunFolder, why: str) -> None:
    with claim_elsewhere(folder, record("first", num_nodes=1), 0):
        launcher = Launcher.read(folder.node(0).read_text())
        assert launcher is not None
        host = "far" if why == "another host" else launcher.host
        began = "-1" if why.startswith("the pid") else launcher.began
        said = f"{RUNNING} {launcher.pid} {began} {host}" if why != "no launcher named" else RUNNING
        folder.node(0).write_text(said)
        folder.claim(record("second", num_nodes=1), 0, replace=True)
    assert run_of(folder) == "second"
