"""Ranks of one class, and the groups of each of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truedag.parallel.inference import InferenceConfig
from truedag.parallel.rank_classes import GroupRole, find_rank_classes
from truedag.parallel.strategy import Axis, parse_strategy
from truedag.parallel.training import TrainingConfig

TRAINING = TrainingConfig(global_batch_size=128, sequence_length=1024)
NOTATIONS = ("TP2-PP2-DP2-EP2-ETP1", "EP2-TP2-PP2-DP2", "TP2-PP4", "TP2-CP2-PP2-EP2-ETP2", "PP2-VPP2-DP4-EP2-ETP1")
DENSE: tuple[Axis, ...] = ("tp", "cp", "dp", "pp")
EXPERT: tuple[Axis, ...] = ("etp", "ep", "edp", "pp")


@pytest.mark.parametrize("notation", NOTATIONS)
def test_classes_part_the_ranks(notation: str) -> None:
    strategy = parse_strategy(notation)
    classes = find_rank_classes(strategy, TRAINING)
    assert sorted(rank for one in classes for rank in one.ranks) == list(range(strategy.world_size))
    assert all(one.representative == min(one.ranks) for one in classes)


@pytest.mark.parametrize("dp", [2, 64, 1024])
def test_there_are_as_many_classes_whatever_the_number_of_replicas(dp: int) -> None:
    assert len(find_rank_classes(parse_strategy(f"EP64-TP8-PP2-DP{dp // 2}"), TRAINING)) == 4


def test_a_sharded_optimizer_gives_each_replica_a_program_of_its_own() -> None:
    strategy = parse_strategy("PP2-DP4-EP2-ETP1")
    sharded = TrainingConfig(global_batch_size=8, distributed_optimizer=True)
    assert len(find_rank_classes(strategy, TRAINING)) == 2
    assert len(find_rank_classes(strategy, sharded)) == 8


def test_replicas_with_prompts_of_the_same_lengths_are_one_class() -> None:
    strategy = parse_strategy("PP2-DP2")
    equal = InferenceConfig(num_prompts=4, prompt_lengths=(8, 4), decode_steps=1)
    unequal = InferenceConfig(num_prompts=4, prompt_lengths=(8, 8, 4, 4), decode_steps=1)
    assert len(find_rank_classes(strategy, equal)) == 2
    assert len(find_rank_classes(strategy, unequal)) == 4


@given(notation=st.sampled_from(NOTATIONS), expert=st.booleans(), data=st.data())
def test_a_group_over_some_axes_is_found_at_every_rank(notation: str, expert: bool, data: st.DataObject) -> None:
    strategy = parse_strategy(notation)
    axes = EXPERT if expert else DENSE
    spanned = data.draw(st.sets(st.sampled_from(axes)))
    ranks = range(strategy.world_size)

    def group_of(rank: int) -> tuple[int, ...]:
        own = strategy.coordinates(rank)
        kept = [axis for axis in axes if axis not in spanned and axis in own]
        return tuple(other for other in ranks if all(strategy.coordinates(other)[axis] == own[axis] for axis in kept))

    first = data.draw(st.sampled_from(ranks))
    role = GroupRole.of(strategy, group_of(first), expert=expert)
    assert role is not None
    assert [role.members(strategy, rank) for rank in ranks] == [group_of(rank) for rank in ranks]


def test_first_and_last_stage_are_a_group_without_those_between() -> None:
    strategy = parse_strategy("TP2-PP4")
    role = GroupRole.of(strategy, (1, 7), expert=False)
    assert role is not None
    assert role.members(strategy, 0) == (0, 6)
    assert role.members(strategy, 4) == (0, 6)


def test_ranks_that_are_no_product_of_places_have_no_role() -> None:
    assert GroupRole.of(parse_strategy("TP2-PP4"), (0, 3)) is None
