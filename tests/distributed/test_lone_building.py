"""Building one rank of a world alone makes the process groups that torch makes, with their names."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta

import pytest
from megatron_ranks import run_ranks

from truedag.parallel.strategy import parse_strategy

STRATEGY = parse_strategy("EP4-TP2-PP2-DP2")


def make_groups(rank: int, alone: bool) -> tuple[list[tuple[str, str, tuple[int, ...]]], dict[str, tuple[int, ...]]]:
    """Make all groups; return name, description and ranks of each, and the ranks of this rank's own by name."""
    from torch import distributed

    from truedag.parallel.dry import init_dry_world
    from truedag.parallel.groups import destroy_groups, init_groups
    from truedag.parallel.lone_building import built_alone
    from truedag.parallel.made_groups import note_groups

    with note_groups() as groups, built_alone() if alone else nullcontext():
        init_dry_world(rank, STRATEGY.world_size)
        init_groups(STRATEGY, timedelta(minutes=1))
        said: list[object] = [None] * STRATEGY.world_size
        distributed.all_gather_object(said, {"rank": rank})
        assert said == [{"rank": rank}] * STRATEGY.world_size
        with pytest.raises(ValueError, match=r"out of range|less or equal"):
            distributed.new_group([0, 99], timeout=timedelta(minutes=1))
        with pytest.raises(ValueError, match="duplicate"):
            distributed.new_group([5, 5], timeout=timedelta(minutes=1))
        distributed.new_group([7, 5], timeout=timedelta(minutes=1), sort_ranks=False)
    own = {
        name: tuple(distributed.get_process_group_ranks(group))
        for group, name in distributed.distributed_c10d._world.pg_names.items()
    }
    destroy_groups()
    distributed.destroy_process_group()
    return [(one.name, one.description, one.ranks) for one in groups], own


@pytest.mark.parametrize("rank", [0, 13])
def test_groups_are_those_that_torch_makes(rank: int) -> None:
    (ours,), (theirs,) = (
        run_ranks(1, make_groups, rank, alone, timeout_s=60, process_group=False) for alone in (True, False)
    )
    assert ours == theirs
    assert len(ours[0]) > len(ours[1]) > 1
