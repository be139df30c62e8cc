"""Sizes that a dry run derives from numbers of tokens are those of ranks that are executed, all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from command_line import truedag, write_small_deployment
from graph_comparison import list_differences

from truedag.tracer.analysis.held_memory import HeldMemory, read_memory
from truedag.tracer.graph import Graph

LARGE = ("workload.sequence_length=256", "model.max_sequence_length=256")


def _run(tmp_path: Path, name: str, *options: str) -> dict[str, Any]:
    path = write_small_deployment(tmp_path)
    overrides = ("workload.global_batch_size=16", "model.num_attention_heads=4", *LARGE)
    done = truedag("dry", str(path), *overrides, *options, "--no-views", "--json", "--out", name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _memory(folder: Path) -> dict[int, HeldMemory]:
    meta = json.loads((folder / "dag" / "meta.json").read_text())
    ranks = pl.read_parquet(folder / "dag" / "ranks.parquet", columns=["rank", "rank_class"])
    of_rank = {}
    for one in read_memory(meta, ranks):
        for rank in one.ranks:
            of_rank[rank] = HeldMemory(
                **{**{name: getattr(one, name) for name in one.__slots__}, "ranks": (), "peak_node": 0}
            )
    return of_rank


def _check(tmp_path: Path, *options: str) -> dict[str, Any]:
    """Execute a few ranks, and all; hold every size of every rank against the other."""
    result = _run(tmp_path, "few", *options)
    _run(tmp_path, "all", *options, "--all-ranks")
    few, every = tmp_path / "few", tmp_path / "all"
    found = list_differences(Graph.open(few), Graph.open(every))
    assert [line for line in found if not line.startswith("ranks: ")] == []
    assert _memory(few) == _memory(every)
    meta = json.loads((few / "dag" / "meta.json").read_text())
    derived = meta["dry"]["derived_sizes"]["num_ranks"]
    assert derived + len(result["ranks"]) == result["world_size"]
    return result


def test_sizes_derived_from_numbers_of_tokens_are_those_of_executed_ranks(tmp_path: Path) -> None:
    result = _check(tmp_path, "strategy=DP8-EP4-ETP1", "--routing", "uniform")
    assert len(result["ranks"]) <= 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("DP16-EP4-ETP1", ("--routing", "uniform")),
        ("DP16-EP2-ETP1", ("--routing", "zipf:1.2")),
        ("TP2-DP8-EP4-ETP2", ("--routing", "zipf:0.5", "backend.name=nccl")),
        ("EP4-TP2-DP2", ("--routing", "uniform", "backend.name=nccl", "model.experts=grouped")),
    ],
)
def test_derived_sizes_are_right_whatever_the_strategy(strategy: str, options: tuple[str, ...], tmp_path: Path) -> None:
    result = _check(tmp_path, f"strategy={strategy}", *options)
    assert len(result["ranks"]) < result["world_size"]
