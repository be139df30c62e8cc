"""The process groups of a strategy: made by megatron-core, checked against the strategy, and told to the tracer."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import distributed

from truedag.parallel.strategy import Axis, Strategy
from truedag.tracer import annotate

_AXIS_OF: dict[str, Axis] = {
    "tp": "tp",
    "cp": "cp",
    "pp": "pp",
    "dp": "dp",
    "ep": "ep",
    "expt_tp": "etp",
    "expt_dp": "edp",
}

# What each of megatron-core's further groups spans. Groups of equal members stay groups of their own.
_SPANS: dict[str, tuple[Axis, ...]] = {
    "embd": ("pp",),
    "pos_embd": ("pp",),
    "dp_cp": ("dp", "cp"),
    "intra_dp_cp": ("dp", "cp"),
    "intra_expt_dp": ("edp",),
    "tp_cp": ("tp", "cp"),
    "mp": ("tp", "pp"),
    "tp_dp_cp": ("tp", "dp", "cp"),
    "tp_ep": ("etp", "ep"),
    "tp_ep_pp": ("etp", "ep", "pp"),
    "intra_dist_opt": ("etp", "ep", "edp", "pp"),
}


def init_groups(strategy: Strategy, timeout: timedelta) -> Any:
    """Make megatron-core's process groups, and say which axis each is. Every rank must call it; it synchronises.

    The default process group must exist. A group over several axes is said to be those of more than one rank; but the
    dispatcher's group over etp and ep, which counts the tokens of the ep exchange, is said to be ep.

    Args:
        strategy: what the groups are for.
        timeout: how long an operation on any of them may take.

    Returns:
        megatron-core's ProcessGroupCollection of this rank.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=strategy.tp,
        context_parallel_size=strategy.cp,
        pipeline_model_parallel_size=strategy.pp,
        virtual_pipeline_model_parallel_size=strategy.vpp if strategy.vpp > 1 else None,
        expert_model_parallel_size=strategy.ep,
        expert_tensor_parallel_size=strategy.etp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout / timedelta(minutes=1),
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    rank = distributed.get_rank()
    for field, axis in _AXIS_OF.items():
        group = getattr(collection, field)
        members = tuple(distributed.get_process_group_ranks(group))
        assert members == strategy.group_of(axis, rank), f"megatron-core's {axis} group of rank {rank} is {members}"
    members = tuple(distributed.get_process_group_ranks(collection.dp_cp))
    assert members == strategy.gradient_group_of(rank), f"megatron-core's dp-cp group of rank {rank} is {members}"
    _annotate(collection, strategy, rank)
    return collection


def destroy_groups() -> None:
    """Take megatron-core's process groups away. Every rank must call it."""
    parallel_state.destroy_model_parallel()


def _annotate(collection: Any, strategy: Strategy, rank: int) -> None:
    for field, axis in _AXIS_OF.items():
        annotate.group(getattr(collection, field), axis)
    for field, axes in _SPANS.items():
        group = getattr(collection, field)
        if group is None or group is distributed.GroupMember.NON_GROUP_MEMBER:
            continue
        wide = [axis for axis in axes if strategy.size(axis) > 1]
        if field == "tp_ep" and "ep" in wide:
            wide = ["ep"]
        annotate.group(group, *(wide or axes[:1]))
    world = distributed.group.WORLD
    if world is not None:
        annotate.group(world, "world")
    annotate.rank(**strategy.coordinates(rank))


def is_first_stage(collection: Any) -> bool:
    """Return whether this rank is on the first pipeline stage."""
    stage: int = collection.pp.rank()
    return stage == 0


def is_last_stage(collection: Any) -> bool:
    """Return whether this rank is on the last pipeline stage."""
    stage: int = collection.pp.rank()
    last: int = collection.pp.size() - 1
    return stage == last
