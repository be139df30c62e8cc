"""Whatever the strategy, the graph of what runs has no finding; recorded dry, so that all of them are cheap."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import yaml
from test_parity import SAME, Case

from truedag.launch.dry import run_dry

# Exchanges of keys and values, and experts that the backward pass runs again.
FEW = (
    Case("sparse", "CP2-EP2-ETP1", ("full recomputation",)),
    Case("dense", "TP2-PP2", ("selective recomputation",)),
)
MORE = (
    Case("sparse", "EP2-TP2-PP2", ("full recomputation",)),
    Case("dense", "TP2-CP2", ("selective recomputation",)),
    Case("grouped", "TP2-CP2-PP2-EP2-ETP2", ("full recomputation", "distributed optimizer")),
)


def audit_of(case: Case, folder: Path) -> dict[str, object]:
    """Execute all ranks of a case without memory, and return what the audit says."""
    (folder / "text.txt").write_bytes(random.Random(0).randbytes(500))
    told = {
        "name": "strategy",
        "model": {key: value for key, value in dataclasses.asdict(case.run.model).items() if value is not None},
        "strategy": case.strategy,
        "workload": {"text": "text.txt", **dataclasses.asdict(case.training)},
        "backend": {"name": "gloo"},
    }
    path = folder / "strategy.yaml"
    path.write_text(yaml.safe_dump({**told, "workload": {k: v for k, v in told["workload"].items() if v is not None}}))
    result = run_dry(
        str(path),
        (),
        out=folder / "out",
        replace=False,
        routing="uniform",
        seed=0,
        all_ranks=True,
        expand=False,
        device=None,
        gpus_per_node=8,
        num_verified=0,
        jobs=2,
        views=False,
        command=("truedag", "dry"),
        show=lambda _: None,
    )
    assert result.audit is not None
    return dict(result.audit)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_true_graph_has_no_finding(case: Case, tmp_path: Path) -> None:
    audit = audit_of(case, tmp_path)
    assert audit["num_faults"] == 0, Path(str(audit["file"])).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("case", [*SAME, *MORE], ids=str)
def test_no_true_graph_of_any_strategy_has_a_finding(case: Case, tmp_path: Path) -> None:
    audit = audit_of(case, tmp_path)
    assert audit["num_faults"] == 0, Path(str(audit["file"])).read_text()
