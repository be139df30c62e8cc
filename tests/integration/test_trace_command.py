"""`truedag trace`: a program as it is, plain or under torchrun, recorded and merged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import TIMEOUT_S, free_port, start_truedag, truedag

PLAIN = """
import sys
import torch
print(sys.argv[1:], sys.stdin.read())
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(4):
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
if "fail" in sys.argv:
    raise SystemExit(3)
"""
RANKS = """
import sys
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
if dist.get_rank() == 1 and "fail" in sys.argv:
    raise ValueError("rank 1 cannot go on")
dist.all_reduce(torch.ones(2))
sys.stdout.write(f"{sys.argv[1:]}\\n")
dist.destroy_process_group()
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    (tmp_path / "plain.py").write_text(PLAIN)
    (tmp_path / "ranks.py").write_text(RANKS)
    return tmp_path


def test_a_module_that_is_not_there_is_told_as_python_does(programs: Path) -> None:
    result = truedag("trace", "-m", "nothing.there", cwd=programs)
    assert result.returncode == 1
    assert "Error while finding module specification for 'nothing.there' (ModuleNotFoundError" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_plain_program_is_recorded_and_merged(programs: Path) -> None:
    result = truedag("trace", "plain.py", "--out", "mine", "--m", "--", "-h", cwd=programs)
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert said[0] == "['--out', 'mine', '--m', '--', '-h'] "
    assert "no rank missing: truedag-out/plain/dag" in said[1]
    assert said[2].startswith("Audit: Right")
    assert json.loads((programs / "truedag-out" / "plain" / "audit.json").read_text())["faults"] == 0
    assert said[-1] == "next: truedag report truedag-out/plain"
    report = truedag("report", "truedag-out/plain", cwd=programs)
    assert report.returncode == 0, report.stderr
    refused = truedag("trace", "plain.py", cwd=programs)
    assert refused.returncode == 1
    assert "--force" in refused.stderr
    again = truedag("trace", "--force", "--steps", "1,3", "plain.py", cwd=programs)
    assert again.returncode == 0, again.stderr
    windows = [line.split(":")[0] for line in again.stdout.splitlines() if line.startswith("  the steps")]
    assert windows == ["  the steps from 1 on", "  the steps from 3 on"]
    assert "building the recorder" not in again.stderr  # it was there
    assert again.stdout.splitlines()[-1] == "next: truedag report truedag-out/plain/windows/step-00001"
    assert sorted(path.name for path in (programs / "truedag-out" / "plain").iterdir()) == [
        "nodes", "run.json", "windows",
    ]  # fmt: skip


def test_torchrun_starts_the_ranks_when_its_options_are_there(programs: Path) -> None:
    result = truedag(
        "trace", "--nproc_per_node=2", "--standalone", "--json", "--out=o", "ranks.py", "--no", "--", "x", cwd=programs
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert result.stderr.count("['--no', '--', 'x']\n") == 2  # the program's output makes room for the result
    (window,) = told["windows"]
    assert (window["merge"]["num_ranks"], window["merge"]["num_collectives"], window["merge"]["num_unmatched"]) == (
        2,
        1,
        0,
    )
    assert window["dag"] == str(programs / "o" / "dag")


def test_collected_traces_are_merged_on_the_node_of_rank_0(programs: Path) -> None:
    """The rendezvous says which node that is; `--node-rank` does not."""
    place = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "nodes")
    meets = ("--rdzv-endpoint", f"localhost:{free_port()}")
    nodes = [
        start_truedag(
            "trace",
            *place,
            *meets,
            "--node-rank",
            str(node),
            "--collect",
            "--out",
            f"out{node}",
            "ranks.py",
            cwd=programs,
        )
        for node in range(2)
    ]
    said = [process.communicate(timeout=TIMEOUT_S)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0]
    merged = [node for node in range(2) if (programs / f"out{node}" / "dag").exists()]
    assert len(merged) == 1
    assert "next: on the node of rank 0, where all traces are, the graph is made" in said[1 - merged[0]]
    out = programs / f"out{merged[0]}"
    assert (out / "traces" / "rank-00000.trace").exists()
    meta = json.loads((out / "dag" / "meta.json").read_text())
    assert meta["missing_ranks"] == meta["unmatched"] == []
    assert truedag("report", out.name, cwd=programs).returncode == 0


@pytest.mark.parametrize("starter", [[], ["--nproc-per-node", "2"]])
def test_a_program_that_fails_keeps_its_traces(programs: Path, starter: list[str]) -> None:
    program = "ranks.py" if starter else "plain.py"
    result = truedag("trace", *starter, "--out", "out", program, "fail", cwd=programs)
    assert result.returncode == 1
    assert (
        f"truedag: the program ended with exit code {1 if starter else 3}; what it printed says why." in result.stderr
    )
    command = result.stderr.splitlines()[-1]
    assert command == "next: truedag merge out/traces --out out/dag"
    merged = truedag(*command.split()[2:], cwd=programs)
    assert merged.returncode == 0, merged.stderr


def test_the_printed_command_records_as_well(programs: Path) -> None:
    printed = truedag(
        "trace", "--nproc-per-node", "2", "--print-command", "--ranks", "0", "ranks.py", "a b", "--no", cwd=programs
    )  # fmt: skip
    assert printed.returncode == 0, printed.stderr
    assert not (programs / "truedag-out").exists()
    command, _, merge = printed.stdout.splitlines()
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    ran = subprocess.run(
        ["bash", "-c", command],
        cwd=programs,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "['a b', '--no']\n" * 2
    merged = truedag(*merge.removeprefix("# truedag ").split(), cwd=programs)
    assert "missing ranks: (1,)" in merged.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["none.py"], 1, "there is no script none.py"),
        ([], 2, "which program?"),
        (["--steps", "soon", "plain.py"], 2, "'soon' is no step"),
        (["--max-bytes", "much", "plain.py"], 2, "max_bytes 'much'"),
        (["--recorder", "tape", "plain.py"], 2, "invalid choice"),
        (["--no-such-option", "plain.py"], 2, "unrecognized arguments"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(
    programs: Path, arguments: list[str], code: int, expected: str
) -> None:
    result = truedag("trace", *arguments, cwd=programs)
    assert result.returncode == code
    assert result.stdout == ""
    assert expected in result.stderr
    assert not (programs / "truedag-out").exists()


def test_a_recorder_that_is_not_there_is_built_and_that_is_said(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUEDAG_CACHE", str(programs / "plain.py"))  # no folder
    result = truedag("trace", "plain.py", cwd=programs)
    assert result.returncode == 1
    assert "building the recorder" in result.stderr
    assert "cannot write the native recorder to" in result.stderr
    assert not (programs / "truedag-out").exists()


def test_an_interrupt_stops_the_program_and_keeps_what_there_is(programs: Path) -> None:
    (programs / "long.py").write_text(
        "import pathlib, time, torch\ntorch.ones(2)\npathlib.Path('reached').touch()\ntime.sleep(600)\n"
    )
    process = start_truedag("trace", "--out", "out", "long.py", cwd=programs)
    try:
        while not (programs / "reached").exists():
            assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "interrupted; the program has been stopped." in said
    merged = truedag("merge", "out/traces", "--out", "out/dag", cwd=programs)
    assert "num nodes: 1" in merged.stdout
