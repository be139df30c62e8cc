"""Small deployments that the audit's tests really run, and how their graphs are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from command_line import truedag

from truedag.launch.deployment import RunRecord
from truedag.launch.expected.expectation import expect
from truedag.tracer.audit.plan import Plan, plan
from truedag.tracer.audit.recorded import Tables, read_tables
from truedag.tracer.graph import Graph

MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_experts": 4,
    "expert_hidden_size": 32,
    "attention": "unfused",
    "experts": "sequential",
}
TRAIN: dict[str, Any] = {
    "name": "audited",
    "model": MODEL,
    "strategy": "TP2-PP2-DP2-EP2-ETP1",
    "workload": {"global_batch_size": 4, "sequence_length": 16},
}
INFER: dict[str, Any] = {
    "name": "audited-infer",
    "model": MODEL,
    "strategy": "TP2-PP2-EP2-ETP1",
    "workload": {"kind": "infer", "num_prompts": 2, "prompt_lengths": [8, 12], "decode_steps": 3},
}


def run(folder: Path, values: dict[str, Any]) -> Path:
    """Run a deployment and return its run's folder; the deployment file lies beside it."""
    (folder / "text.txt").write_text("A small text for small tests. " * 20)
    workload = {"text": "text.txt", **values["workload"]}
    file = folder / f"{values['name']}.yaml"
    backend = {"name": "gloo", "collective_timeout_s": 60, "run_timeout_s": 140}
    file.write_text(yaml.safe_dump({**values, "workload": workload, "backend": backend}))
    out = folder / values["name"]
    result = truedag("run", str(file), "--out", str(out), cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "Audit: Right" in result.stdout
    assert json.loads((out / "audit.json").read_text())["faults"] == 0
    return out


def read(out: Path) -> tuple[Tables, Plan]:
    """Return a run's graph and what it must show."""
    record = RunRecord.model_validate_json((out / "run.json").read_text())
    return read_tables(Graph.open(out)), plan(expect(record.deployment))
