"""The command line: help, exit codes, results for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Ran, run_small, truedag, write_small_deployment

from truedag.launch.cli import COMMANDS, main

DEMO = "moe-10b-tp2-ep2-pp2-cpu"


def test_help_lists_every_command_and_imports_none_of_the_heavy_packages(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom truedag.launch.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'polars', 'megatron', 'pydantic'} & set(sys.modules), sorted(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_docstring_of_a_command_is_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    description = COMMANDS[name].load().description
    with pytest.raises(SystemExit, match=r"^0$"):
        main([name, "--help"])
    said = capsys.readouterr().out
    assert description.strip() in said
    assert "--debug" in said


@pytest.mark.parametrize("arguments", [[], ["walk"], ["run"], ["run", DEMO, "--recorder", "tape"], ["merge", "here"]])
def test_wrong_usage_has_exit_code_2(tmp_path: Path, arguments: list[str]) -> None:
    result = truedag(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "usage: truedag" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonesuch"], "unknown deployment 'nonesuch'"),
        ([DEMO, "model.num_layer=4"], "unknown key model.num_layer (did you mean num_layers"),
        ([DEMO, "model.num_layers=four"], "model.num_layers='four': input should be a valid integer"),
        ([DEMO, "ranks=6"], "TP2-PP2-DP2-EP2-ETP1 needs 8 ranks, there are 6"),
        ([DEMO, "strategy=TP2-PP3-DP2-EP2-ETP1"], "num_layers=16 is no multiple of PP3"),
    ],
)
def test_a_wrong_deployment_is_refused_before_anything_starts(
    tmp_path: Path, arguments: list[str], expected: str
) -> None:
    result = truedag("run", *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("truedag: ")
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [["--debug", "run", "nonesuch"], ["run", "nonesuch", "--debug"]])
def test_debug_shows_the_traceback_and_the_message(tmp_path: Path, place: list[str]) -> None:
    result = truedag(*place, cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback (most recent call last):" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("truedag: unknown deployment")


def test_deployments_lists_what_ships_and_what_to_type_next(tmp_path: Path) -> None:
    result = truedag("deployments", cwd=tmp_path)
    assert result.returncode == 0
    assert DEMO in result.stdout
    assert result.stdout.splitlines()[-1].startswith("next: truedag run ")
    rows = json.loads(truedag("deployments", "--json", cwd=tmp_path).stdout)["deployments"]
    assert rows[DEMO]["strategy"]["tp"] == 2


def test_doctor_finds_this_environment_well(tmp_path: Path) -> None:
    result = truedag("doctor", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "FAIL" not in result.stdout
    for name in ("python", "torch", "megatron-core", "compiler", "recorder", "gloo", "graphviz"):
        assert f"ok    {name} " in result.stdout


def test_merge_refuses_a_folder_without_traces(tmp_path: Path) -> None:
    result = truedag("merge", "nowhere", "--out", "dag", cwd=tmp_path)
    assert result.returncode == 1
    assert "nowhere holds no *.trace files" in result.stderr


def test_a_run_that_records_nothing_says_what_the_steps_came_to(tmp_path: Path) -> None:
    deployment = write_small_deployment(tmp_path)
    # An override may stand after the options too.
    result = truedag("run", str(deployment), "--recorder", "off", "--json", "workload.steps=3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["dag"] is None
    assert [step["step"] for step in told["steps"]] == [0, 1, 2]
    assert told["steps"][2]["loss"] < told["steps"][0]["loss"]
    record = json.loads((tmp_path / "truedag-out" / "small" / "run.json").read_text())
    assert record["overrides"] == ["workload.steps=3", "trace.recorder=off"]
    assert record["deployment"]["workload"]["steps"] == 3
    assert record["versions"]["torch"].startswith("2.13.")
    assert "starting the ranks (2 ranks)" in result.stderr


@pytest.mark.parametrize("recorder", ["native", "python"])
def test_a_run_leaves_its_dag_its_pictures_and_its_report(tmp_path: Path, recorder: str, small_run: Ran) -> None:
    run = small_run if recorder == "native" else run_small(tmp_path, "--recorder", recorder)
    assert run.said.rstrip().splitlines()[-1].startswith("next: ")
    out = run.out
    assert json.loads((out / "dag" / "meta.json").read_text())["deployment"] == "small"
    assert list((out / "views").glob("*.svg"))
    assert "unmatched communications: 0" in run.said
    assert "unmatched communications: 0" in (out / "report.md").read_text()
    assert isinstance(json.loads((out / "report.json").read_text()), dict)
