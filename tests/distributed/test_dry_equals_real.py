"""The graph of a dry run is the graph of the real run: recorded from gloo ranks and from ranks without memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_comparison import list_differences
from megatron_ranks import run_ranks
from small_model import SMALL
from torch.profiler import ProfilerActivity, profile, record_function

from truedag.launch.deployment_file import load_deployment
from truedag.model.config import ModelConfig
from truedag.parallel.inference import InferenceConfig
from truedag.parallel.routing import Routing, parse_routing, write_routing
from truedag.parallel.strategy import Strategy, parse_strategy
from truedag.parallel.training import TrainingConfig
from truedag.tracer.graph import Graph
from truedag.tracer.merge.lifetimes import measure_memory
from truedag.tracer.merge.merging import merge_traces
from truedag.tracer.merge.nodes import extract_nodes
from truedag.tracer.record.trace import read_trace

DENSE = ModelConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=64,
    attention="unfused",
    tied_embeddings=True,
)
FUSED = replace(DENSE, attention="fused")
GROUPED = replace(SMALL, attention="fused", experts="grouped")
RICH = replace(
    SMALL,
    num_query_groups=2,
    num_experts=8,
    num_dense_layers=1,
    ffn_hidden_size=64,
    shared_expert_hidden_size=32,
    shared_expert_gate=True,
    router_score="sigmoid",
    score_correction_bias=True,
    qkv_bias=True,
    qk_norm=True,
    tied_embeddings=True,
)
# Whether gradients are clipped is decided by their norm, which a dry run does not know: it clips none.
TRAINING = TrainingConfig(global_batch_size=4, micro_batch_size=1, sequence_length=16, clip_grad=0.0)
EVERYTHING = replace(
    TRAINING,
    global_batch_size=8,
    distributed_optimizer=True,
    overlap_grad_reduce=True,
    overlap_param_gather=True,
    bucket_size=2000,
    recompute="full",
)
INFERENCE = InferenceConfig(num_prompts=2, prompt_lengths=4, decode_steps=2)
UNEQUAL = replace(INFERENCE, prompt_lengths=(4, 6))


@dataclass(frozen=True, slots=True)
class Case:
    notation: str
    model: ModelConfig
    workload: TrainingConfig | InferenceConfig = field(default=TRAINING)
    routing: str = "uniform"
    """Laid over the routers of both runs; or "recorded": the real run's own, which the dry run is given."""

    @property
    def strategy(self) -> Strategy:
        return parse_strategy(self.notation)


FEW = {
    "dense, TP and PP": Case("TP2-PP2", DENSE),
    "experts over TP, and PP": Case("TP2-PP2-EP2-ETP1", SMALL),
    "experts' gradients and the shards of their optimizer, interleaved and computed again": Case(
        "PP2-VPP2-DP2-EP2-ETP1", GROUPED, EVERYTHING
    ),
    "routed as the real run was": Case("DP2-EP2-ETP1", SMALL, replace(TRAINING, recompute="full"), routing="recorded"),
    "prefill and decode": Case("TP2-PP2-EP2-ETP1", SMALL, INFERENCE),
}
MANY = {
    "stages alone": Case("PP4", FUSED),
    "interleaved stages": Case("PP2-VPP2", DENSE),
    "replicas": Case("DP2", FUSED),
    "sharded optimizer": Case("TP2-DP2", DENSE, replace(TRAINING, distributed_optimizer=True)),
    "context": Case("CP2", DENSE),
    "without sequence parallelism": Case("TP2", DENSE, replace(TRAINING, sequence_parallel=False)),
    "half precision": Case("TP2-PP2", replace(DENSE, dtype="bfloat16")),
    "experts over replicas": Case("DP4-EP4-ETP1", SMALL, routing="zipf:1.5"),
    "experts that are split": Case("EP2-TP2", GROUPED, routing="zipf:1.5"),
    "experts that are split, and PP": Case("EP2-TP2-PP2", SMALL),
    "all axes": Case("TP2-PP2-DP2-EP2-ETP1", SMALL, replace(TRAINING, distributed_optimizer=True)),
    "all that a layer can have": Case("TP2-PP2-EP2-ETP1", RICH, replace(TRAINING, recompute="selective")),
    "tokens are dropped": Case("DP2-EP2-ETP1", replace(SMALL, capacity_factor=1.0), routing="zipf:1.5"),
    "all axes on 16 ranks": Case("EP2-TP2-PP2-DP2", SMALL, replace(TRAINING, global_batch_size=8)),
    "prompts of several lengths": Case("PP2", DENSE, UNEQUAL),
    "decoding of split experts": Case("EP2-TP2-PP2", GROUPED, INFERENCE),
    "decoding, routed as the real run was": Case("TP2-PP2-EP2-ETP1", SMALL, INFERENCE, routing="recorded"),
}


def record_case(case: Case, folder: Path, text: Path) -> None:
    """Record the second iteration of a case on one rank: among real ones, or where there is none, alone."""
    from torch import distributed

    from truedag.parallel.dry import init_dry_world
    from truedag.parallel.lone_building import built_alone
    from truedag.tracer.dry.recording import record_dry
    from truedag.tracer.record.recording import record

    is_dry = not distributed.is_initialized()
    if is_dry:
        init_dry_world(int(os.environ["RANK"]), case.strategy.world_size)
    device = torch.device("meta" if is_dry else "cpu")
    routing = _routing(case, text, is_dry=is_dry)
    with built_alone() if is_dry else nullcontext():
        executor, iterate = _build(case, text, device, routing)
    iterate(0)
    path = folder / f"rank-{distributed.get_rank():05d}.trace"
    recording: Any = record_dry if is_dry else record
    with _no_garbage_taken(), recording(path, watch=executor.model_chunks) as recorded:
        iterate(1)
    assert recorded.switched_off == ""
    if routing is None and executor.routers is not None:
        write_routing(text.parent / f"rank-{distributed.get_rank()}.jsonl", executor.routers.tokens())
    executor.close()
    if is_dry:
        distributed.destroy_process_group()


@contextmanager
def _no_garbage_taken() -> Iterator[None]:
    """Python takes tensors in cycles away at moments of its own, which differ from run to run; here it takes none."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _routing(case: Case, text: Path, *, is_dry: bool) -> Routing | None:
    """What is laid over the routers; None where they choose."""
    if case.model.num_experts is None or (case.routing == "recorded" and not is_dry):
        return None
    return parse_routing(str(text.parent) if case.routing == "recorded" else case.routing, seed=3)


def _build(case: Case, text: Path, device: torch.device, routing: Routing | None) -> tuple[Any, Any]:
    from truedag.parallel.generate import build_generator
    from truedag.parallel.prompts import Prompts
    from truedag.parallel.train import build_trainer

    workload = case.workload
    options: dict[str, Any] = {"device": device, "routing": routing, "watch_routing": routing is None}
    if isinstance(workload, TrainingConfig):
        trainer = build_trainer(case.model, case.strategy, workload, text=text, **options)
        return trainer, trainer.step
    prompts = Prompts([list(range(workload.length_of(number))) for number in range(workload.num_prompts)])
    generator = build_generator(case.model, case.strategy, workload, prompts=prompts, **options)
    return generator, generator.run


def record_both(case: Case, folder: Path) -> tuple[Graph, Graph]:
    """Return the graph of the dry run and that of the real one."""
    text = folder / "text.txt"
    text.write_bytes(np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8).tobytes())
    graphs = []
    for name in ("real", "dry"):
        world_size, traces = case.strategy.world_size, folder / name / "traces"
        traces.mkdir(parents=True)
        run_ranks(world_size, record_case, case, traces, text, timeout_s=200, process_group=name == "real")
        merged = merge_traces(traces, folder / name / "dag")
        assert merged.num_unmatched == 0
        graphs.append(Graph.open(folder / name))
    return graphs[1], graphs[0]


def _check(case: Case, folder: Path) -> None:
    graphs = record_both(case, folder)
    differences = list_differences(*graphs)
    assert not differences, f"{len(differences)} differences:\n" + "\n".join(differences[:50])
    dry, real = ({one["rank"]: one for one in graph.meta["memory"]} for graph in graphs)
    assert len(dry) == len(real) == case.strategy.world_size
    for rank, one in real.items():
        for name, tolerance in _MEMORY.items():
            near = pytest.approx(one[name], abs=tolerance * one["peak_bytes"])
            assert dry[rank][name] == near, f"{name} of rank {rank}"


# Shares of what the rank has at most. What is named is the same exactly. What differs of the rest: small integers that
# device meta has on the host, and when storages end: of the backward pass at which of several operators, of what was
# sent when a thread of gloo's gives it back, which is otherwise from run to run.
_MEMORY = {"parameter_bytes": 0, "gradient_bytes": 0, "state_bytes": 0, "peak_bytes": 0.05, "activation_bytes": 0.05}


@pytest.mark.parametrize("case", FEW.values(), ids=FEW.keys())
def test_a_dry_run_has_the_graph_of_the_real_run(case: Case, tmp_path: Path) -> None:
    _check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY.values(), ids=MANY.keys())
def test_a_dry_run_of_any_strategy_has_the_graph_of_the_real_run(case: Case, tmp_path: Path) -> None:
    _check(case, tmp_path)


def peak_of_allocator(case: Case, text: Path) -> int:
    """Return how many bytes PyTorch's allocator had given out on this rank at most in the second iteration.

    Its own events say so, as torch.profiler gives them, from before the model is built; truedag records nothing.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        executor, iterate = _build(case, text, torch.device("cpu"), _routing(case, text, is_dry=False))
        iterate(0)
        with _no_garbage_taken(), record_function("measured"):
            iterate(1)
    executor.close()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    measured = next(event for event in events if event.name() == "measured")
    begin_ns, end_ns = measured.start_ns(), measured.start_ns() + measured.duration_ns()
    live = most = 0
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    for time_ns, change in changes:
        before, live = live, live + change
        if begin_ns <= time_ns <= end_ns:
            most = max(most, before, live)
    return most


# Narrow siblings of deployments, on fewer ranks and with fewer layers; as they are, in the slow tests.
SMALLER = {
    "training": (
        "moe-30b-ep64-tp2-pp8-cpu",
        ("strategy=TP1", "model.num_layers=4", "model.num_experts=8", "workload.global_batch_size=2"),
    ),
    "inference": ("llama3-70b-tp2-pp4-cpu", ("strategy=PP2", "model.num_layers=8")),
}


def _check_memory(name: str, overrides: tuple[str, ...], folder: Path) -> None:
    _, deployment = load_deployment(name, overrides)
    case = Case(str(deployment.strategy), deployment.model, deployment.workload, routing="balanced")
    text = folder / "text.txt"
    text.write_bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes())
    world_size = case.strategy.world_size
    real = run_ranks(world_size, peak_of_allocator, case, text, timeout_s=200)
    run_ranks(world_size, record_case, case, folder, text, timeout_s=200, process_group=False)
    for rank, peak in enumerate(real):
        memory = measure_memory(extract_nodes(read_trace(folder / f"rank-{rank:05d}.trace")))
        assert memory is not None
        assert memory["peak_bytes"] == pytest.approx(peak, rel=0.05), f"rank {rank}"


@pytest.mark.parametrize("deployment", SMALLER.values(), ids=SMALLER.keys())
def test_a_dry_run_needs_the_memory_that_the_allocator_gives_out(
    deployment: tuple[str, tuple[str, ...]], tmp_path: Path
) -> None:
    _check_memory(*deployment, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["moe-30b-ep64-tp2-pp8-cpu", "moe-30b-ep8-tp4-pp2-dp4-cpu", "moe-30b-ep64-tp8-pp2-dp2-cpu",
             "llama3-70b-tp2-pp4-cpu"]
)  # fmt: skip
def test_a_dry_run_of_a_deployment_needs_the_memory_that_the_allocator_gives_out(name: str, tmp_path: Path) -> None:
    _check_memory(name, (), tmp_path)


def test_another_routing_is_another_graph(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    case = Case("DP2-EP2-ETP1", replace(SMALL, num_layers=1), replace(TRAINING, global_batch_size=2))
    ours, _ = record_both(case, tmp_path / "one")
    theirs, _ = record_both(replace(case, routing="balanced"), tmp_path / "other")
    differences = list_differences(ours, theirs)
    assert any("recv_bytes" in line or "participants" in line for line in differences)
