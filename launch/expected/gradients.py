"""How the gradients of a training step are summed, and its updated parameters gathered, after the backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator

from truedag.launch.deployment import Deployment
from truedag.launch.expected.parameters import expected_parameters
from truedag.launch.workload import TrainWorkload
from truedag.parallel.strategy import Strategy
from truedag.tracer.audit.expectation import Communication, Group, Parameter, Place

_SUMMED = ("backward", -1, -1)
# The distributed optimizer's buffers: a parameter begins at a multiple of 64 elements, a bucket ends at one of
# lcm(replicas, 128). Source: megatron-core's param_and_grad_buffer.py.
_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128
_GRADIENT_BYTES = 4


def gradient_communications(deployment: Deployment) -> Iterator[Communication]:
    """Yield what every training step must sum and gather."""
    for stage in range(deployment.strategy.pp):
        yield from _stage(deployment, stage)
    if deployment.model.tied_embeddings and deployment.strategy.pp > 1:
        strategy, model = deployment.strategy, deployment.model
        size = model.vocab_size // strategy.tp * model.hidden_size * _GRADIENT_BYTES
        ends = tuple((group[0], group[-1]) for group in strategy.groups("pp"))
        yield _whole("embedding gradients", "pp", ends, size)


def _stage(deployment: Deployment, stage: int) -> Iterator[Communication]:
    model, strategy, training = deployment.model, deployment.strategy, deployment.workload
    assert isinstance(training, TrainWorkload)
    held = list(_held(deployment, stage))
    together = strategy.ep == 1  # then experts are reduced with the rest
    dense = [parameter for parameter in held if together or parameter.expert < 0]
    experts = [parameter for parameter in held if not together and parameter.expert >= 0]
    ranks = range(stage * strategy.stage_size, (stage + 1) * strategy.stage_size)
    if strategy.tp > 1 and training.sequence_parallel:
        whole = [parameter for parameter in held if parameter.dim is None]
        size = sum(parameter.size for parameter in whole) * _GRADIENT_BYTES
        yield _whole("sequence gradients", "tp", _of_stage(strategy.groups("tp"), ranks), size)
    replicas = tuple(strategy.gradient_group_of(rank) for rank in ranks[: strategy.tp])  # tp is the innermost axis
    local = 1 if not strategy.ep > 1 else strategy.ep
    for purpose, axis, parameters, groups in (
        ("dense", "dp" if strategy.cp == 1 else "dp+cp", dense, replicas),
        ("expert", "edp", experts, _of_stage(strategy.groups("edp"), ranks)),
    ):
        if not parameters or len(groups[0]) == 1:
            continue
        share = local if purpose == "expert" else 1
        count = sum(_local_size(parameter, strategy) for parameter in parameters) // share
        slack = len(groups[0])
        most = count
        if training.distributed_optimizer:
            padding = math.lcm(slack, _BUCKET_ALIGNMENT)
            most = sum(
                _rounded(_local_size(parameter, strategy), _PARAMETER_ALIGNMENT) for parameter in parameters
            ) // share  # fmt: skip
            most += padding * (1 if training.bucket_size is None else math.ceil(count / training.bucket_size))
        kind = "reduce-scatter" if training.distributed_optimizer else "all-reduce"
        yield Communication(
            purpose=f"{purpose} gradients",
            axis=axis,
            kind=kind,
            layer=-1,
            groups=groups,
            places=(_SUMMED,),
            total_bytes=(count * _GRADIENT_BYTES, most * _GRADIENT_BYTES),
        )
        if training.distributed_optimizer:
            width = 4 if model.dtype == "float32" else 2
            # Dense and expert parameters have an optimizer each, and each gathers all buffers when it is done.
            width *= 2 if experts and not training.overlap_param_gather else 1
            yield Communication(
                purpose=f"{purpose} parameters",
                axis=axis,
                kind="all-gather",
                layer=-1,
                groups=groups,
                places=(("optimizer", -1, -1),),
                total_bytes=(count * width // slack, most * width // slack),
            )


def _held(deployment: Deployment, stage: int) -> Iterator[Parameter]:
    model, strategy = deployment.model, deployment.strategy
    last = strategy.pp - 1
    for parameter in expected_parameters(model):
        if parameter.layer >= 0:
            if strategy.stage_of_layer(model.num_layers, parameter.layer) == stage:
                yield parameter
        elif parameter.name.startswith("embedding"):
            if stage == 0 or (model.tied_embeddings and stage == last):
                yield parameter
        elif stage == last:
            yield parameter


def _local_size(parameter: Parameter, strategy: Strategy) -> int:
    if parameter.dim is None:
        return parameter.size
    return parameter.size // (strategy.etp if parameter.axis == "etp" else strategy.tp)


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _of_stage(groups: list[Group], ranks: range) -> tuple[Group, ...]:
    return tuple(group for group in groups if group[0] in ranks)


def _whole(purpose: str, axis: str, groups: tuple[Group, ...], size: int) -> Communication:
    place: Place = _SUMMED
    return Communication(
        purpose=purpose,
        axis=axis,
        kind="all-reduce",
        layer=-1,
        groups=groups,
        places=(place,),
        total_bytes=(size, size),
    )
