"""What the graph of a deployment must show: its groups, operators and communications, computed from what it says.

Theory of operation. Strategy and model alone are read: nothing of a run. A layer's operators follow from the model, its
communications from how megatron-core splits it: under sequence parallelism a tensor-parallel region is entered by an
all-gather and left by a reduce-scatter, else it is left by an all-reduce forward and backward; experts get their tokens
by all-to-alls over EP, and by gathering over ETP; stages send activations forward and their gradients backward; every
gradient is summed once over the replicas of its parameter.

Source: megatron-core 0.16's tensor_parallel/layers.py, moe/token_dispatcher.py, pipeline_parallel/schedules.py,
distributed/finalize_model_grads.py.
"""

from __future__ import annotations

from truedag.launch.deployment import Deployment
from truedag.launch.expected.communications import expected_communications
from truedag.launch.expected.parameters import expected_parameters
from truedag.launch.workload import TrainWorkload
from truedag.model.config import ModelConfig
from truedag.parallel.inference import passes
from truedag.parallel.strategy import AXES, Strategy
from truedag.tracer.audit.expectation import Expectation, Operators, Place
from truedag.tracer.audit.roles import ATTENTION_CORE, FUSED_ATTENTION

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def expect(deployment: Deployment) -> Expectation:
    """Return what a graph of a deployment must show."""
    model, strategy, workload = deployment.model, deployment.strategy, deployment.workload
    training = isinstance(workload, TrainWorkload)
    places = expected_places(deployment)
    operators = tuple(_operators(model, strategy, training=training))
    experts = tuple(layer for layer in range(model.num_layers) if model.has_experts(layer))
    communications, optional = expected_communications(deployment, places)
    return Expectation(
        name=deployment.name,
        strategy=strategy.describe(),
        kind=workload.kind,
        sizes={axis: strategy.size(axis) for axis in AXES},
        coordinates=tuple(
            {str(axis): place for axis, place in strategy.coordinates(rank).items()}
            for rank in range(strategy.world_size)
        ),
        groups={axis: tuple(strategy.groups(axis)) for axis in AXES},
        stage_of_layer=tuple(strategy.stage_of_layer(model.num_layers, layer) for layer in range(model.num_layers)),
        chunks=strategy.vpp,
        expert_layers=experts,
        num_experts=model.num_experts or 0,
        ranks_of_expert=_ranks_of_expert(model, strategy),
        tokens_per_pass=_tokens_per_pass(deployment),
        places=places,
        operators=operators,
        communications=tuple(communications),
        optional=optional,
        parameters=tuple(expected_parameters(model)),
        bytes_per_parameter=_BYTES[model.dtype],
        training_bytes_per_parameter=_training_bytes(deployment),
        num_nodes=_num_nodes(model, strategy, operators),
        numbers=_numbers(deployment),
    )


def _training_bytes(deployment: Deployment) -> float:
    """A gradient in float32; of Adam two moments, and where weights are halves, their float32 original."""
    workload, strategy = deployment.workload, deployment.strategy
    if not isinstance(workload, TrainWorkload):
        return 0.0
    kept = (8 if workload.optimizer == "adam" else 0) + (0 if deployment.model.dtype == "float32" else 4)
    return 4 + kept / (strategy.dp * strategy.cp if workload.distributed_optimizer else 1)


def expected_places(deployment: Deployment) -> tuple[Place, ...]:
    """Return the passes of a step: phase, microbatch, decode step."""
    workload = deployment.workload
    if isinstance(workload, TrainWorkload):
        number = workload.num_microbatches(deployment.strategy.dp)
        return tuple((phase, batch, -1) for phase in ("forward", "backward") for batch in range(number))
    return tuple(
        (one.phase, one.microbatch, -1 if one.decode_step is None else one.decode_step)
        for one in passes(workload, dp_rank=0, dp_size=deployment.strategy.dp)
    )


def _operators(model: ModelConfig, strategy: Strategy, *, training: bool) -> list[Operators]:
    ahead = ("forward",) if training else ("prefill", "decode")
    both = ("forward", "backward") if training else ahead
    layers = tuple(range(model.num_layers))
    dense = tuple(layer for layer in layers if not model.has_experts(layer))
    sparse = tuple(layer for layer in layers if model.has_experts(layer))
    core = (FUSED_ATTENTION,) if model.attention == "fused" else ATTENTION_CORE
    rows = [
        Operators(role="attention norm", layers=layers, phases=ahead),
        Operators(role="QKV projection", layers=layers, phases=both),
        *(Operators(role=role, layers=layers, phases=ahead) for role in core),
        Operators(role="output projection", layers=layers, phases=both),
        Operators(role="attention residual", layers=layers, phases=ahead),
        Operators(role="feed-forward norm", layers=layers, phases=ahead),
        Operators(role="feed-forward residual", layers=layers, phases=ahead),
        Operators(role="first layer", layers=dense, phases=both),
        Operators(role="activation", layers=dense, phases=ahead),
        Operators(role="second layer", layers=dense, phases=both),
        Operators(role="router", layers=sparse, phases=both),
        Operators(role="top-k choice", layers=sparse, phases=ahead),
        Operators(role="expert aggregation", layers=sparse, phases=ahead),
        Operators(role="embedding", layers=(-1,), stage=0, phases=ahead),
        Operators(role="final norm", layers=(-1,), stage=strategy.pp - 1, phases=ahead),
        Operators(role="head", layers=(-1,), stage=strategy.pp - 1, phases=both),
    ]
    one_by_one = model.experts == "sequential"
    rows += [
        Operators(role="expert first layer", layers=sparse, per_expert=one_by_one, phases=both),
        Operators(role="expert activation", layers=sparse, per_expert=one_by_one, phases=ahead),
        Operators(role="expert second layer", layers=sparse, per_expert=one_by_one, phases=both),
    ]
    if model.shared_expert_hidden_size is not None:
        rows += [
            Operators(role="shared expert first layer", layers=sparse, phases=both),
            Operators(role="shared expert activation", layers=sparse, phases=ahead),
            Operators(role="shared expert second layer", layers=sparse, phases=both),
        ]
    if not training:
        rows.append(Operators(role="cache write", layers=layers, phases=ahead))
    return [row for row in rows if row.layers]


def _ranks_of_expert(model: ModelConfig, strategy: Strategy) -> tuple[tuple[tuple[int, ...], ...], ...]:
    if model.num_experts is None:
        return ()
    first_layers = [strategy.layers_of_stage(model.num_layers, stage)[0] for stage in range(strategy.pp)]
    return tuple(
        tuple(
            tuple(strategy.ranks_of_expert(model.num_layers, model.num_experts, layer, expert))
            for expert in range(model.num_experts)
        )
        for layer in first_layers
    )


def _tokens_per_pass(deployment: Deployment) -> int | None:
    """(token, expert) pairs of a layer in one microbatch of all replicas, counted once for each rank of an expert."""
    model, strategy, workload = deployment.model, deployment.strategy, deployment.workload
    if model.num_experts is None or model.capacity_factor is not None or not isinstance(workload, TrainWorkload):
        return None
    return workload.micro_batch_size * workload.sequence_length * strategy.dp * model.top_k * strategy.etp


def _num_nodes(model: ModelConfig, strategy: Strategy, operators: tuple[Operators, ...]) -> int:
    """Nodes of one pass forward with one for each operator and rank, communications left out."""
    number = 0
    for row in operators:
        ranks = strategy.stage_size
        if row.per_expert:
            ranks = (model.num_experts or 0) * strategy.etp * strategy.edp
        number += len(row.layers) * ranks
    return number


def _numbers(deployment: Deployment) -> dict[str, float]:
    model, workload = deployment.model, deployment.workload
    numbers: dict[str, float] = {
        "layers": model.num_layers,
        "hidden": model.hidden_size,
        "heads": model.num_attention_heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.kv_channels,
        "vocabulary": model.vocab_size,
        "gpus": deployment.strategy.world_size,
        "max_sequence": model.max_sequence_length,
    }
    if model.num_experts is None or model.num_dense_layers:
        numbers["ffn"] = model.dense_hidden_size
    if model.num_experts is not None and model.expert_hidden_size is not None:
        numbers |= {"experts": model.num_experts, "top_k": model.top_k, "expert_hidden": model.expert_hidden_size}
    if isinstance(workload, TrainWorkload):
        numbers |= {"batch": workload.global_batch_size, "sequence": workload.sequence_length}
    else:
        numbers |= {"batch": workload.num_prompts, "sequence": workload.longest}
    numbers["batch_per_replica"] = numbers["batch"] / deployment.strategy.dp
    return numbers
