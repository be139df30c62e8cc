"""`truedag export` and `truedag report` as a person types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import networkx as nx
import polars as pl
import pytest
from command_line import Ran, truedag


@pytest.fixture(scope="module")
def run(small_run: Ran, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, beside whose graph exports are written."""
    out = tmp_path_factory.mktemp("run") / "out"
    shutil.copytree(small_run.out, out)
    return out


def test_a_real_run_is_exported_and_says_what_is_in_it(run: Path) -> None:
    nodes = pl.read_parquet(run / "dag" / "nodes.parquet")
    result = truedag("export", "out", "--to", "chakra", "--json", cwd=run.parent)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    ran = nodes.filter(pl.col("kind").is_in(["compute", "send", "recv"]))
    collectives = set(nodes.filter(pl.col("kind") == "collective")["node"])
    met = pl.read_parquet(run / "dag" / "participants.parquet")["node"].is_in(list(collectives)).sum()
    assert told["num_nodes"] == len(ran) + met
    assert (told["num_unnamed_collectives"], told["num_open_messages"]) == (0, 0)
    assert sorted(path.name for path in (run / "views" / "chakra").iterdir()) == [
        "comm_groups.json", "trace.0.et", "trace.1.et",
    ]  # fmt: skip
    result = truedag("export", "out", "--to", "perfetto", cwd=run.parent)
    assert result.returncode == 0, result.stderr
    assert "out/views/timeline.perfetto-trace: " in result.stdout
    assert "next: open out/views/timeline.perfetto-trace at https://ui.perfetto.dev" in result.stdout
    again = truedag("export", "out", "--to", "perfetto", cwd=run.parent)
    assert again.returncode == 1
    assert "is there already" in again.stderr


def test_a_part_is_chosen_and_folded(run: Path) -> None:
    path = run.parent / "stage.graphml"
    asked = ("--ranks", "0", "--window", "0ms-10s", "--fold", "layer", "--out", str(path))
    result = truedag("export", "out", "--to", "graphml", *asked, cwd=run.parent)
    assert result.returncode == 0, result.stderr
    graph = nx.read_graphml(path, node_type=int, force_multigraph=True)
    assert nx.is_directed_acyclic_graph(graph)
    assert {data["ranks"] for _, data in graph.nodes(data=True)} <= {"0", "0 1"}
    refused = truedag("export", "out", "--to", "csv", "--fold", "layer", cwd=run.parent)
    assert refused.returncode == 1
    assert "takes no fold: graphml, node-link, model-explorer do" in refused.stderr
    for wrong in (("--ranks", "3-1"), ("--window", "10ms"), ("--window", "9ms-1ms")):
        assert truedag("export", "out", "--to", "csv", *wrong, cwd=run.parent).returncode == 2


def test_the_report_is_told_in_three_ways_and_explains_itself(run: Path) -> None:
    told = json.loads(truedag("report", "out", "--json", "--peak-flops", "50G", cwd=run.parent).stdout)
    for one in told["ranks"]:
        parts = [one[f"{part}_ns"] for part in ("compute", "transfer", "waiting", "bubble", "host")]
        assert sum(parts) == sum(told["steps_ns"].values())
    assert told["throughput"]["mfu"] > 0
    assert told["throughput"]["num_tokens"] == 4 * 16
    assert told["critical_path"]["length_ns"] == sum(told["steps_ns"].values())
    markdown = truedag("report", "out", "--markdown", cwd=run.parent).stdout
    assert markdown.strip() == (run / "report.md").read_text().strip()
    text = truedag("report", "out", cwd=run.parent).stdout
    titles = ("Time of each rank", "Communication", "Critical path", "Throughput", "Data of each rank")
    for title in (*titles, "Memory of each rank"):
        assert f"\n{title}\n" in text
    assert max(map(len, text.splitlines())) <= 100
    explained = truedag("report", "--explain", "bandwidth", cwd=run.parent)
    assert "nccl-tests" in explained.stdout
    unknown = truedag("report", "--explain", "x", cwd=run.parent)
    assert (unknown.returncode, "name one of step-time, shares" in unknown.stderr) == (2, True)
    assert truedag("report", cwd=run.parent).returncode == 2
