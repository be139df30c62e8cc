"""What a run measured of itself, in the words in which people declare it."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from pydantic import ValidationError

from truedag.launch.deployment import RunRecord
from truedag.launch.rank_state import read_states
from truedag.launch.run_folder import RunFolder
from truedag.launch.workload import TrainWorkload


def measured_rates(folder: Path) -> dict[str, float]:
    """Return tokens_per_second, tokens_per_second_per_gpu and time_to_first_token_ms of a run; {}: it measured none.

    A training is counted in the tokens of its global batch, a generation in the tokens that it generated. The recorded
    iteration counts only where there is no other.
    """
    run = RunFolder(root=folder)
    try:
        deployment = RunRecord.model_validate_json(run.record.read_bytes()).deployment
        states = read_states(run.ranks)
    except (OSError, ValidationError):
        return {}
    if not states:
        return {}
    first, workload, ranks = states[min(states)], deployment.workload, deployment.world_size
    if isinstance(workload, TrainWorkload):
        steps = [step for step in first.steps if not step.recorded] or first.steps
        if not steps:
            return {}
        tokens = workload.global_batch_size * workload.sequence_length
        rate = tokens / (median(step.wall_ns for step in steps) / 1e9)
        return {"tokens_per_second": rate, "tokens_per_second_per_gpu": rate / ranks}
    runs = [one for one in first.generations if not one.recorded] or first.generations
    if not runs:
        return {}
    rate = median(one.generated_tokens_per_s_per_rank for one in runs)
    return {
        "tokens_per_second": rate * ranks,
        "tokens_per_second_per_gpu": rate,
        "time_to_first_token_ms": median(median(one.time_to_first_token_ns) for one in runs) / 1e6,
    }
