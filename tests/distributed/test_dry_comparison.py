"""Ranks of one class run the same program, and it is noticed where a rank does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from megatron_ranks import run_ranks
from small_model import SMALL
from test_dry_equals_real import DENSE, TRAINING, Case, record_case

from truedag.parallel.rank_classes import GroupRole, find_rank_classes
from truedag.tracer.dry.comparison import Comparison, compare_ranks

DENSE_CASE = Case("TP2", replace(DENSE, num_layers=2), replace(TRAINING, global_batch_size=2))
MOE_CASE = Case(
    "DP2-EP2-ETP1", replace(SMALL, num_layers=2), replace(TRAINING, global_batch_size=2), routing="zipf:1.5"
)


def compare(case: Case, folder: Path) -> Comparison:
    """Execute the two ranks of a case, and compare them."""
    text = folder / "text.txt"
    text.write_bytes(bytes(range(256)) * 2)
    run_ranks(2, record_case, case, folder, text, timeout_s=120, process_group=False)
    return compare_ranks(folder / "rank-00000.trace", folder / "rank-00001.trace")


@pytest.mark.parametrize("experts", ["sequential", "grouped"])
def test_ranks_of_a_class_have_its_program_whatever_the_routing_sends_them(
    experts: Literal["sequential", "grouped"], tmp_path: Path
) -> None:
    assert len(find_rank_classes(MOE_CASE.strategy, TRAINING)) == 1
    found = compare(replace(MOE_CASE, model=replace(MOE_CASE.model, experts=experts)), tmp_path)
    assert found.difference == ""
    assert found.num_sizes > 0, "zipf sends them different numbers of tokens"
    for axis, own, other in found.groups:
        role = GroupRole.of(MOE_CASE.strategy, own, expert=axis in ("ep", "etp", "edp"))
        assert role is not None
        assert role.members(MOE_CASE.strategy, 1) == tuple(sorted(other))


def test_a_rank_of_another_class_is_told_by_what_it_runs(tmp_path: Path) -> None:
    assert len(find_rank_classes(DENSE_CASE.strategy, TRAINING)) == 2
    found = compare(DENSE_CASE, tmp_path)
    assert found.difference.startswith("operator "), "the first rank counts what both have, when it sums up the norm"


@pytest.mark.parametrize("sharded", [False, True])
def test_a_sharded_optimizer_makes_replicas_differ(sharded: bool, tmp_path: Path) -> None:
    training = replace(TRAINING, global_batch_size=2, distributed_optimizer=sharded)
    case = Case("DP2", replace(DENSE, num_layers=2), training)
    assert bool(compare(case, tmp_path).difference) == sharded == (len(find_rank_classes(case.strategy, training)) == 2)
