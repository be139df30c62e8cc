"""The strategy's arithmetic: what must hold of any, what the shipped deployments say, and what megatron-core makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from truedag.parallel.errors import StrategyError
from truedag.parallel.strategy import AXES, Strategy, parse_strategy

DENSE = ("tp", "cp", "dp", "pp")
EXPERT = ("etp", "ep", "edp", "pp")


@some.composite
def folded(draw: some.DrawFn) -> Strategy:
    tp, pp, dp = (draw(some.integers(1, 4)) for _ in range(3))
    cp = draw(some.integers(1, 2))
    vpp = draw(some.integers(1, 3)) if pp > 1 else 1
    stage = tp * cp * dp
    etp = draw(some.sampled_from([size for size in range(1, stage + 1) if stage % size == 0]))
    rest = stage // etp
    ep = draw(some.sampled_from([size for size in range(1, rest + 1) if rest % size == 0]))
    return Strategy(tp=tp, cp=cp, pp=pp, vpp=vpp, dp=dp, ep=ep, etp=etp)


@some.composite
def orthogonal(draw: some.DrawFn) -> Strategy:
    ep, tp, cp, pp, dp = (draw(some.integers(1, 3)) for _ in range(5))
    vpp = draw(some.integers(1, 3)) if pp > 1 else 1
    return parse_strategy(f"EP{ep}-TP{tp}-CP{cp}-PP{pp}-VPP{vpp}-DP{dp}")


any_strategy = folded() | orthogonal()
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@given(any_strategy)
def test_the_groups_of_an_axis_partition_the_ranks(strategy: Strategy) -> None:
    for axis in AXES:
        groups = strategy.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(strategy.world_size))
        assert {len(group) for group in groups} == {strategy.size(axis)}


@given(any_strategy)
def test_the_ranks_of_a_group_differ_on_its_axis_alone(strategy: Strategy) -> None:
    for axes in (DENSE, EXPERT):
        for axis in axes:
            for group in strategy.groups(axis):
                places = [strategy.coordinates(rank) for rank in group]
                assert [place.get(axis, 0) for place in places] == list(range(strategy.size(axis)))
                for other in set(axes) - {axis}:
                    assert len({place.get(other, 0) for place in places}) == 1
                assert all(strategy.group_of(axis, rank) == group for rank in group)


@given(any_strategy)
def test_dense_gradients_are_summed_over_the_ranks_that_differ_in_cp_and_dp(strategy: Strategy) -> None:
    places = [strategy.coordinates(rank) for rank in range(strategy.world_size)]
    same: dict[tuple[int, int], list[int]] = {}
    for rank, place in enumerate(places):
        same.setdefault((place["tp"], place["pp"]), []).append(rank)
    for rank, place in enumerate(places):
        assert strategy.gradient_group_of(rank) == tuple(same[place["tp"], place["pp"]])


@given(any_strategy)
def test_coordinates_and_ranks_are_inverse(strategy: Strategy) -> None:
    for rank in range(strategy.world_size):
        place = strategy.coordinates(rank)
        assert ("cp" in place) == (strategy.cp > 1)
        assert strategy.rank_at({axis: place[axis] for axis in DENSE if axis in place}) == rank
        assert strategy.rank_at({axis: place[axis] for axis in EXPERT}) == rank


@given(any_strategy)
def test_both_factorings_cover_the_same_stage(strategy: Strategy) -> None:
    assert strategy.etp * strategy.ep * strategy.edp * strategy.pp == strategy.world_size
    for rank in range(strategy.world_size):
        assert strategy.coordinates(rank)["pp"] == rank // strategy.stage_size


@given(any_strategy)
def test_a_printed_strategy_reads_back(strategy: Strategy) -> None:
    assert parse_strategy(str(strategy)) == strategy


@given(any_strategy, some.integers(1, 3), some.integers(1, 3))
def test_an_expert_is_on_the_ranks_that_hold_it(strategy: Strategy, layers: int, experts: int) -> None:
    num_layers, num_experts = layers * strategy.pp * strategy.vpp, experts * strategy.ep
    for layer in range(num_layers):
        for expert in range(num_experts):
            holders = [
                rank
                for rank in range(strategy.world_size)
                if layer in strategy.layers_of_stage(num_layers, strategy.coordinates(rank)["pp"])
                and expert in strategy.experts_of_rank(num_experts, rank)
            ]
            assert strategy.ranks_of_expert(num_layers, num_experts, layer, expert) == holders
            assert len(holders) == strategy.etp * strategy.edp


@given(any_strategy, some.integers(1, 3))
def test_chunks_hold_the_layers_in_order_from_stage_to_stage(strategy: Strategy, layers: int) -> None:
    num_layers = layers * strategy.pp * strategy.vpp
    held = [
        (layer, stage)
        for chunk in range(strategy.vpp)
        for stage in range(strategy.pp)
        for layer in strategy.layers_of_chunk(num_layers, stage, chunk)
    ]
    assert [layer for layer, _ in held] == list(range(num_layers))
    for layer, stage in held:
        assert strategy.stage_of_layer(num_layers, layer) == stage
        assert layer in strategy.layers_of_stage(num_layers, stage)
    assert sum(len(strategy.layers_of_stage(num_layers, stage)) for stage in range(strategy.pp)) == num_layers


def test_two_chunks_on_each_of_four_stages() -> None:
    strategy = parse_strategy("PP4-VPP2")
    assert [strategy.layers_of_stage(16, stage) for stage in range(4)] == [
        (0, 1, 8, 9),
        (2, 3, 10, 11),
        (4, 5, 12, 13),
        (6, 7, 14, 15),
    ]
    assert strategy.describe() == (
        "TP1-PP4-VPP2-DP1-EP1-ETP1 (folded, 4 ranks): dense TP=1 DP=1, experts ETP=1 EP=1 EDP=1, PP=4 VPP=2"
    )


def test_context_parallelism_replicates_the_experts() -> None:
    strategy = parse_strategy("EP2-TP2-CP2-PP2-DP1")
    assert (strategy.world_size, strategy.dp, strategy.edp, strategy.etp) == (16, 2, 2, 2)
    assert str(strategy) == "EP2-TP2-CP2-PP2-DP1"
    assert strategy.group_of("cp", 0) == (0, 2)
    assert strategy.coordinates(7) == {"tp": 1, "cp": 1, "dp": 1, "pp": 0, "etp": 1, "ep": 1, "edp": 1}


def test_the_two_notations_are_told_apart() -> None:
    folded_strategy = parse_strategy("TP2-PP2-DP2-EP2-ETP1")
    assert (folded_strategy.world_size, folded_strategy.dp, folded_strategy.edp) == (8, 2, 2)
    assert folded_strategy.notation == "folded"
    orthogonal_strategy = parse_strategy("EP2-TP2-PP2")
    assert (orthogonal_strategy.world_size, orthogonal_strategy.dp, orthogonal_strategy.etp) == (8, 2, 2)
    assert orthogonal_strategy.notation == "orthogonal"
    assert orthogonal_strategy.describe() == (
        "EP2-TP2-PP2-DP1 (orthogonal, 8 ranks): dense TP=2 DP=2, experts ETP=2 EP=2 EDP=1, PP=2"
    )


def test_moe_30b_in_megatron_terms() -> None:
    strategy = parse_strategy("EP64-TP8-PP2-DP2")
    assert (strategy.world_size, strategy.etp, strategy.edp, strategy.dp) == (2048, 8, 2, 128)
    assert strategy.coordinates(1023)["pp"] == 0
    assert strategy.coordinates(1024)["pp"] == 1


def test_moe_10b_folded_on_four_ranks() -> None:
    strategy = parse_strategy("TP2-PP2-EP2-ETP1")
    assert strategy.world_size == 4
    assert strategy.ranks_of_expert(16, 16, 0, 0) + strategy.ranks_of_expert(16, 16, 15, 0) == [0, 2]
    assert strategy.ranks_of_expert(16, 16, 0, 8) + strategy.ranks_of_expert(16, 16, 15, 15) == [1, 3]


def test_llama_70b_has_twenty_layers_on_each_stage() -> None:
    strategy = parse_strategy("TP2-PP4")
    assert strategy.world_size == 8
    assert [strategy.layers_of_stage(80, strategy.coordinates(rank)["pp"])[0] for rank in range(8)] == [
        0,
        0,
        20,
        20,
        40,
        40,
        60,
        60,
    ]


def test_moe_30b_on_eight_stages_has_each_expert_on_two_neighbours() -> None:
    strategy = parse_strategy("EP64-TP2-PP8")
    assert strategy.world_size == 1024
    for expert in (0, 1, 63):
        assert strategy.ranks_of_expert(16, 64, 2, expert) == [128 + 2 * expert, 128 + 2 * expert + 1]


@pytest.mark.parametrize(
    ("notation", "says"),
    [
        ("TP2-XX2", "'XX2' is not an axis"),
        ("TP2-SP2", "'SP2' is not an axis"),
        ("TP2-VPP2", "at least two stages"),
        ("PP2-VPP0", "vpp=0"),
        ("TP2-CP2-DP1-EP3-ETP1", "of a stage (TP2 x CP2 x DP1), over which the experts are laid; nearest valid: EP2"),
        ("TP", "'TP' is not an axis"),
        ("", "'' is not an axis"),
        ("TP2-TP4", "TP is named twice"),
        ("TP0", "tp=0"),
        ("TP2-DP2-EP3-ETP1", "nearest valid: EP2-ETP1"),
        ("TP2-DP1-EP2-ETP2", "nearest valid: EP1-ETP2"),
    ],
)
def test_a_strategy_that_is_none_is_refused(notation: str, says: str) -> None:
    with pytest.raises(StrategyError) as refusal:
        parse_strategy(notation)
    assert says in str(refusal.value)


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(StrategyError, match="ranks 0 to 7"):
        parse_strategy("TP2-PP2-DP2").coordinates(rank)


COMPARED = {
    "TP2-PP2-DP2-EP2-ETP1": range(8),
    "EP2-TP2-PP2-DP1": range(8),
    "TP2-PP1-DP4-EP4-ETP2": range(8),
    "TP1-PP3-DP4-EP2-ETP1": range(12),
    "TP4-PP2-DP3-EP3-ETP2": range(24),
    "TP2-PP4": range(8),
    "PP2-VPP2-DP2-EP2-ETP1": range(4),
    "TP2-CP2-PP2-DP2-EP4-ETP1": (0, 6, 9, 15),
    "TP1-CP3-PP2-VPP3-DP2-EP2-ETP3": range(12),
    "EP2-TP2-CP2-PP2-DP2": (0, 13, 31),
    "EP64-TP8-PP2-DP2": (0, 777, 2047),
}
FIELD_OF = {"tp": "tp", "cp": "cp", "pp": "pp", "dp": "dp", "ep": "ep", "etp": "expt_tp", "edp": "expt_dp"}


@pytest.fixture(scope="module")
def answers() -> dict[str, list[dict[str, Any]]]:
    script = Path(__file__).with_name("megatron_groups.py")
    questions = [f"{notation}={','.join(map(str, ranks))}" for notation, ranks in COMPARED.items()]
    run = subprocess.run(
        [sys.executable, str(script), *questions], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    made: dict[str, list[dict[str, Any]]] = json.loads(run.stdout)
    return made


@pytest.mark.parametrize("notation", COMPARED)
def test_every_group_is_megatron_cores(notation: str, answers: dict[str, list[dict[str, Any]]]) -> None:
    strategy = parse_strategy(notation)
    for answer in answers[notation]:
        for axis in AXES:
            made = answer[FIELD_OF[axis]]
            assert tuple(made["ranks"]) == strategy.group_of(axis, answer["rank"])
            assert made["axis"] == axis
        assert answer["coordinates"] == strategy.coordinates(answer["rank"])
        assert tuple(answer["dp_cp"]["ranks"]) == strategy.gradient_group_of(answer["rank"])


def test_groups_beside_the_axes_are_said_to_be_what_they_span(answers: dict[str, list[dict[str, Any]]]) -> None:
    said = {field: answers["TP2-PP2-DP2-EP2-ETP1"][0][field]["axis"] for field in ("mp", "embd", "tp_ep", "dp_cp")}
    assert said == {"mp": "tp+pp", "embd": "pp", "tp_ep": "ep", "dp_cp": "dp"}
    assert answers["TP1-PP3-DP4-EP2-ETP1"][0]["mp"]["axis"] == "pp"
    said = {field: answers["TP2-CP2-PP2-DP2-EP4-ETP1"][0][field]["axis"] for field in ("dp_cp", "tp_dp_cp", "tp_ep")}
    assert said == {"dp_cp": "dp+cp", "tp_dp_cp": "tp+dp+cp", "tp_ep": "ep"}
