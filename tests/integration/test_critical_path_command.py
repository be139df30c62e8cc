"""`truedag critical-path` on a real run of two pipeline stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Ran, truedag


@pytest.fixture(scope="module")
def run(small_run: Ran) -> Path:
    return small_run.out


def test_its_length_is_the_step_that_the_report_tells(run: Path) -> None:
    result = truedag("critical-path", "out", "--json", "--top", "3", cwd=run.parent)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    report = json.loads((run / "report.json").read_text())
    assert report["steps_ns"] == {str(told["step"]): told["length_ns"]}
    spent = [told["total"][f"{kind}_ns"] for kind in ("compute", "transfer", "waiting", "host")]
    assert sum(spent) == told["length_ns"]
    for by in ("by_rank", "by_phase", "by_layer", "by_op"):
        assert sum(row["total_ns"] for row in told[by]) == told["length_ns"], by
    assert {row["rank"] for row in told["by_rank"]} <= {0, 1}
    assert len(told["longest"]) == 3


def test_a_person_reads_it_in_100_columns_and_is_told_of_a_step_that_is_none(run: Path) -> None:
    result = truedag("critical-path", str(run), "--top", "4", cwd=run.parent)
    assert result.returncode == 0, result.stderr
    for title in ("What the time was spent on", "Rank", "Phase", "Layer", "Operator", "Who was waited for"):
        assert f"\n{title}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    refused = truedag("critical-path", "out", "--step", "77", cwd=run.parent)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert "step 77 is not in out/dag; recorded steps: " in refused.stderr
    assert truedag("critical-path", "out", "--top", "0", cwd=run.parent).returncode == 2
