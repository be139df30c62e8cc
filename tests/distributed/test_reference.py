"""Another implementation's models, loaded from their safetensors, have the same logits here whatever the strategy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron_ranks import run_ranks
from transformers_models import DECODE_STEPS, MODELS, PROMPT_LENGTHS, VOCABULARY

from truedag.model.checkpoint import logical_names
from truedag.model.config import ModelConfig, RopeScaling
from truedag.model.huggingface import read_huggingface
from truedag.parallel.inference import InferenceConfig
from truedag.parallel.strategy import Strategy, parse_strategy

ERROR = 1e-4
DENSE = ["llama", "llama-tied", "mistral", "qwen2", "qwen3"]
SPARSE = ["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "dots1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of transformers, written by a process that holds neither truedag nor megatron-core."""
    place = tmp_path_factory.mktemp("models")
    script = Path(__file__).parent / "transformers_models.py"
    done = subprocess.run([sys.executable, script, place], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return place


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits:
    """A last-stage rank's part of the vocabulary's logits, [B, S, V/TP]."""

    tp: int
    values: Any


def forward(folders: list[Path], models: list[ModelConfig], strategies: list[Strategy]) -> list[list[Logits | None]]:
    """Run each model under each strategy on this rank."""
    pairs = zip(folders, models, strict=True)
    return [[logits(place, model, strategy) for strategy in strategies] for place, model in pairs]


@contextmanager
def built(place: Path, model: ModelConfig, strategy: Strategy) -> Iterator[tuple[Any, Any]]:
    """This rank's chunk of a model with the weights of a folder, and the strategy's groups."""
    import torch

    from truedag.model.build import Sharding, build_chunk, transformer_config
    from truedag.parallel.cpu import CpuAdapter
    from truedag.parallel.groups import destroy_groups, init_groups, is_first_stage, is_last_stage

    adapter = CpuAdapter()
    adapter.install()
    groups = init_groups(strategy, timedelta(seconds=60))
    sharding = Sharding(
        tp=strategy.tp, pp=strategy.pp, ep=strategy.ep, etp=strategy.etp, sequence_parallel=strategy.tp > 1
    )
    chunk = build_chunk(
        model,
        transformer_config(model, sharding),
        pre_process=is_first_stage(groups),
        post_process=is_last_stage(groups),
        pg_collection=groups,
        device=torch.device("cpu"),
        weights=place,
    )
    yield chunk, groups
    destroy_groups()
    adapter.remove()


def logits(place: Path, model: ModelConfig, strategy: Strategy) -> Logits | None:
    import torch
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from truedag.parallel.groups import is_last_stage

    def step(batches: Iterator[Any], chunk: Any) -> Any:
        return chunk(next(batches), None, None), lambda output, non_loss_data: output

    with built(place, model, strategy) as (chunk, groups):
        tokens_BS = torch.from_numpy(np.load(place / "tokens.npy"))
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([tokens_BS]),
            model=[chunk.eval()],
            num_microbatches=1,
            seq_length=tokens_BS.shape[1],
            micro_batch_size=tokens_BS.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        return Logits(tp=groups.tp.rank(), values=outputs[0].detach().numpy()) if is_last_stage(groups) else None


def error(ranks: list[Logits | None], place: Path) -> float:
    """Return the largest difference from transformers' logits, over 1 or the largest of these if that is less."""
    expected = np.load(place / "logits.npy")
    parts = [part for part in ranks if part is not None]
    width = expected.shape[2] // len({part.tp for part in parts})
    differences = []
    for part in parts:
        here = expected[:, :, part.tp * width : (part.tp + 1) * width]
        assert part.values.shape == here.shape
        differences.append(np.abs(part.values - here).max())
    return float(max(differences) / min(1.0, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("names", "world_size", "notations"),
    [
        pytest.param([*DENSE, *SPARSE], 1, ["TP1"], id="all-1"),
        pytest.param(DENSE, 4, ["TP2-PP2"], id="dense-4"),
        pytest.param(SPARSE, 4, ["TP2-PP2-EP2-ETP1", "TP2-PP2-EP1-ETP2"], id="sparse-4"),
        pytest.param(SPARSE, 8, ["EP2-TP2-PP2"], id="sparse-8"),
    ],
)
def test_the_logits_are_those_of_transformers(
    names: list[str], world_size: int, notations: list[str], folder: Path
) -> None:
    folders = [folder / name for name in names]
    models = [ModelConfig(**read_huggingface(place)) for place in folders]
    strategies = [parse_strategy(notation) for notation in notations]
    ranks = run_ranks(world_size, forward, folders, models, strategies, timeout_s=200)
    for index, place in enumerate(folders):
        for number, strategy in enumerate(strategies):
            difference = error([rank[index][number] for rank in ranks], place)
            print(f"{place.name}: {difference:.1e} under {strategy.describe()}")
            assert difference <= ERROR


def decode(folders: list[Path], models: list[ModelConfig], strategies: list[Strategy]) -> list[list[Any]]:
    """Generate with each model under each strategy on this rank; return tokens, rows and logits."""
    import torch

    from truedag.parallel.generate import build_generator
    from truedag.parallel.prompts import Prompts

    inference = InferenceConfig(
        num_prompts=len(PROMPT_LENGTHS), prompt_lengths=PROMPT_LENGTHS, decode_steps=DECODE_STEPS
    )
    results: list[list[Any]] = []
    for place, model in zip(folders, models, strict=True):
        tokens = np.load(place / "tokens.npy")
        prompts = [tokens[row, :length].tolist() for row, length in enumerate(PROMPT_LENGTHS)]
        results.append([])
        for strategy in strategies:
            generator = build_generator(
                model,
                strategy,
                inference,
                prompts=Prompts(prompts),
                device=torch.device("cpu"),
                weights=place,
                keep_logits=True,
            )
            generation = generator.run(0)
            summary = generator.summarize(generation)
            found = None if generation.logits_RTV is None else generation.logits_RTV.numpy()
            results[-1].append((summary.tokens, generation.prompts, found))
            generator.close()
    return results


@pytest.mark.parametrize(
    ("names", "world_size", "notations"),
    [
        pytest.param([*DENSE, *SPARSE], 1, ["TP1"], id="all-1"),
        pytest.param(DENSE, 4, ["TP2-PP2"], id="dense-4"),
        pytest.param(SPARSE, 4, ["TP2-PP2-EP2-ETP1"], id="sparse-4"),
        pytest.param(["mixtral", "glm4_moe"], 8, ["EP2-TP2-PP2"], id="sparse-8"),
    ],
)
def test_prefill_and_sixteen_decode_steps_are_those_of_transformers(
    names: list[str], world_size: int, notations: list[str], folder: Path
) -> None:
    folders = [folder / name for name in names]
    models = [ModelConfig(**read_huggingface(place)) for place in folders]
    strategies = [parse_strategy(notation) for notation in notations]
    ranks = run_ranks(world_size, decode, folders, models, strategies, timeout_s=200)
    for index, place in enumerate(folders):
        tokens, logits = np.load(place / "generated.npy"), np.load(place / "generated_logits.npy")
        for number, strategy in enumerate(strategies):
            seen, differences = set(), []
            for rank in ranks:
                found_tokens, prompts, found = rank[index][number]
                assert np.array_equal(found_tokens, tokens)
                if found is not None:
                    wanted = logits[prompts.start : prompts.stop]
                    assert found.shape == wanted.shape == (len(prompts), DECODE_STEPS + 1, VOCABULARY)
                    differences.append(np.abs(found - wanted).max())
                    seen.update(prompts)
            assert seen == set(range(len(PROMPT_LENGTHS)))
            difference = max(differences) / min(1.0, np.abs(logits).max())
            print(f"{place.name}: {difference:.1e} under {strategy.describe()}")
            assert difference <= ERROR


# What a model's description must not be without, and what it would be otherwise.
OTHERWISE: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_scaling": None}),
    ("llama", {"rope_scaling": RopeScaling(factor=8.0, original_max_position=64)}),
    ("llama", {"norm_epsilon": 0.1}),
    ("mistral", {"rope_base": 20_000.0}),
    ("qwen2_moe", {"normalize_top_k": True}),
    ("qwen3_moe", {"normalize_top_k": False}),
    ("mixtral", {"top_k": 3}),
    ("mixtral", {"capacity_factor": 0.5}),
    ("glm4_moe", {"rotary_percent": 1.0}),
    ("glm4_moe", {"router_scaling": 1.0}),
    ("glm4_moe", {"num_expert_groups": None, "top_k_groups": None}),
]


def test_a_model_described_otherwise_has_other_logits(folder: Path) -> None:
    folders = [folder / name for name, _ in OTHERWISE]
    models = [ModelConfig(**{**read_huggingface(folder / name), **changes}) for name, changes in OTHERWISE]
    (found,) = run_ranks(1, forward, folders, models, [parse_strategy("TP1")], timeout_s=100)
    for (name, changes), here in zip(OTHERWISE, found, strict=True):
        assert error(here, folder / name) > 10 * ERROR, (name, changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a rank holds of a model, and what it read for it."""

    names: set[str]
    held_bytes: int
    read_bytes: int


def read(place: Path, model: ModelConfig, strategy: Strategy) -> Reading:
    from truedag.model.checkpoint import Checkpoint
    from truedag.model.parameters import buffers, shards
    from truedag.model.weights import load

    with built(place, model, strategy) as (chunk, groups):
        held = [*shards(chunk, model), *buffers(chunk)]
        return Reading(
            names={shard.name for shard in held},
            held_bytes=sum(shard.data.nbytes for shard in held),
            read_bytes=load(
                chunk,
                Checkpoint(place, model),
                tp=(groups.tp.rank(), groups.tp.size()),
                etp=(groups.expt_tp.rank(), groups.expt_tp.size()),
            ),
        )


def test_a_rank_reads_what_it_holds_and_no_more(folder: Path) -> None:
    sparse = "TP2-PP2-EP2-ETP1"
    for name, notation in (("llama-tied", "TP2-PP2"), ("mixtral", sparse), ("dots1", sparse)):
        place = folder / name
        model = ModelConfig(**read_huggingface(place))
        ranks = run_ranks(4, read, place, model, parse_strategy(notation), timeout_s=60)
        assert set().union(*(rank.names for rank in ranks)) == set(logical_names(model))
        assert all(rank.read_bytes == rank.held_bytes for rank in ranks)
        stored = sum(file.stat().st_size for file in place.glob("*.safetensors"))
        assert all(rank.read_bytes < 0.4 * stored for rank in ranks)


def test_every_model_is_run_on_one_rank_and_on_several() -> None:
    assert set(MODELS) == {*DENSE, *SPARSE}
