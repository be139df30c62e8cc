"""One rank of a dry run, in a process of its own: built, run up to the step to record, recorded.

The processes are forked from a server that has imported this module, and with it torch and megatron-core, once.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from truedag.parallel.environment import prepare_process

prepare_process()

import torch  # noqa: E402
from torch import distributed  # noqa: E402

from truedag.launch.deployment import Deployment  # noqa: E402
from truedag.launch.dry_execution import DryRank, Executed  # noqa: E402
from truedag.launch.dry_world import first_experts  # noqa: E402
from truedag.launch.workload import TrainWorkload, open_source  # noqa: E402
from truedag.parallel.dry import META, DryAdapter, init_dry_world  # noqa: E402
from truedag.parallel.generate import build_generator  # noqa: E402
from truedag.parallel.lone_building import built_alone  # noqa: E402
from truedag.parallel.made_groups import note_groups  # noqa: E402
from truedag.parallel.prompts import Prompts  # noqa: E402
from truedag.parallel.routing import Routing  # noqa: E402
from truedag.parallel.train import build_trainer  # noqa: E402
from truedag.tracer.dry.programs import hash_program, read_part  # noqa: E402
from truedag.tracer.dry.recording import record_dry  # noqa: E402
from truedag.tracer.record.counters import install  # noqa: E402


def run_rank(
    deployment: Deployment, ranks: Sequence[int], trace: Path, routing: Routing | None, *, is_told_apart: bool
) -> Executed:
    """Record the first of some ranks of a deployment into a new file.

    Args:
        deployment: the deployment.
        ranks: those that it stands for, and itself.
        trace: the file.
        routing: where tokens go.
        is_told_apart: whether its program is to be told from others', as it is where its ranks differ in sizes.

    Raises:
        RoutingError: the routing is not that of this deployment.
    """
    rank = ranks[0]
    began = time.monotonic()
    torch.set_num_threads(1)
    install()  # messages are numbered from the groups' beginning
    with note_groups() as groups, built_alone():
        init_dry_world(rank, deployment.world_size)
        executor, iterate = _build(deployment, routing)
    for index in range(deployment.trace.step):
        iterate(index)
    with record_dry(trace, watch=executor.model_chunks) as recording:
        iterate(deployment.trace.step)
    alike, numbers = [tuple(ranks)], None
    if executor.routers is not None and len(ranks) > 1:
        # gloo moves uneven parts of a group one by one.
        heard = executor.routers.hear(deployment.strategy, ranks, moves_part_by_part=deployment.backend.device == "cpu")
        alike = heard.alike()
        numbers = heard.tell([some[0] for some in alike]) if len(alike) > 1 else None
    executor.close()
    distributed.destroy_process_group()
    result = DryRank(
        rank=rank,
        num_events=recording.num_events,
        switched_off=recording.switched_off,
        seconds=time.monotonic() - began,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    program = ""
    if is_told_apart or len(alike) > 1:
        program = hash_program(read_part(trace), first_expert=int(first_experts(deployment)[rank]))
    return Executed(
        rank=result,
        alike=alike,
        program=program,
        numbers=numbers,
        groups=[(one.name, one.description, one.ranks) for one in groups],
    )


def _build(deployment: Deployment, routing: Routing | None) -> tuple[Any, Any]:
    """Return what executes the workload, and the function that runs one iteration; weights play no part in it."""
    workload = deployment.workload
    adapter = DryAdapter(stands_for=deployment.backend.device)
    if isinstance(workload, TrainWorkload):
        trainer = build_trainer(
            deployment.model,
            deployment.strategy,
            workload,
            text=workload.text,
            tokenizer=workload.tokenizer,
            token_dtype=workload.token_dtype,
            device=META,
            adapter=adapter,
            routing=routing,
        )
        return trainer, trainer.step
    generator = build_generator(
        deployment.model,
        deployment.strategy,
        workload,
        prompts=Prompts(open_source(workload, deployment.model)),
        device=META,
        adapter=adapter,
        routing=routing,
    )
    return generator, generator.run
