"""The executor beside its arithmetic: what it tells the tracer, what it leaves behind, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_ranks import run_ranks
from small_model import SMALL

from truedag.model.config import ModelConfig
from truedag.parallel.data import Replica, TextBatches
from truedag.parallel.errors import DataError, StrategyError
from truedag.parallel.strategy import Strategy, parse_strategy
from truedag.parallel.text import open_tokens
from truedag.parallel.training import TrainingConfig

MODEL = SMALL
TRAINING = TrainingConfig(global_batch_size=8, micro_batch_size=1, sequence_length=16)
EXPERTS = {(layer, expert) for layer in range(4) for expert in range(4)}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8).tobytes())
    return path


@dataclass(slots=True)
class Told:
    """What a rank told the tracer."""

    contexts: list[tuple[int | None, int | None, str | None]] = field(default_factory=list)
    names: dict[str, set[str]] = field(default_factory=dict)
    chunks: list[str] = field(default_factory=list)
    modules: list[tuple[str | None, int | None, int | None]] = field(default_factory=list)
    categories: list[tuple[str, str | None]] = field(default_factory=list)

    def on_context(self, context: Any) -> None:
        self.contexts.append((context.step, context.microbatch, context.phase))

    def on_tensor(self, named: Any) -> None:
        self.note(named)

    def note(self, named: Any) -> None:
        if named.tensor() is not None:
            self.names.setdefault(named.role, set()).add(named.name)


def listen(model: ModelConfig, strategy: Strategy, training: TrainingConfig, text: Path) -> Told:
    from truedag.parallel.train import build_trainer
    from truedag.tracer import annotate

    told = Told()
    trainer = build_trainer(model, strategy, training, text=text, device=torch.device("cpu"))
    for named in annotate.REGISTRY.tensors:
        told.note(named)
    for name, chunk in trainer.model_chunks:
        told.chunks.append(name)
        for module in chunk.modules():
            if (label := annotate.REGISTRY.modules.get(module)) is not None:
                told.modules.append((label.name, label.layer, label.expert))
                told.categories.append((type(module).__name__, label.category))
    annotate.REGISTRY.listener = told
    trainer.step(3)
    annotate.REGISTRY.listener = None
    trainer.close()
    return told


@pytest.fixture(scope="module")
def told(text: Path) -> list[Told]:
    return run_ranks(8, listen, MODEL, parse_strategy("TP2-PP2-DP2-EP2-ETP1"), TRAINING, text, timeout_s=120)


def test_every_layer_and_expert_is_told_where_it_is(told: list[Told]) -> None:
    strategy = parse_strategy("TP2-PP2-DP2-EP2-ETP1")
    for rank, words in enumerate(told):
        layers = strategy.layers_of_stage(4, strategy.coordinates(rank)["pp"])
        experts = strategy.experts_of_rank(4, rank)
        expected = [(f"decoder.layers.{layer}", layer, None) for layer in layers]
        expected += [
            (f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}", None, expert)
            for layer in layers
            for expert in experts
        ]
        named = [place for place in words.modules if place[0] is not None]
        assert sorted(named, key=repr) == sorted(expected, key=repr)
        assert words.categories.count(("MoELayer", "routing")) == len(layers)


def test_parameters_gradients_and_states_have_their_names_in_the_whole_model(told: list[Told]) -> None:
    everywhere = set().union(*(words.names["parameter"] for words in told))
    assert len({name for name in everywhere if "local_experts" in name}) == 2 * len(EXPERTS)
    assert {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"} <= everywhere
    for rank, words in enumerate(told):
        assert words.names["gradient"] == words.names["parameter"]
        assert {name.removesuffix(".exp_avg") for name in words.names["state"] if name.endswith(".exp_avg")} == (
            words.names["parameter"]
        )
        assert words.names["input"] == ({"tokens"}, {"labels"})[rank // 4], "a stage is given what it needs"
        assert words.names["output"] == {"loss"}


def test_steps_microbatches_and_phases_are_told_as_they_run(told: list[Told]) -> None:
    for words in told:
        assert {step for step, _, _ in words.contexts} == {3, None}
        forward = [microbatch for _, microbatch, phase in words.contexts if phase == "forward"]
        assert list(dict.fromkeys(forward)) == [0, 1, 2, 3]
        assert {phase for _, _, phase in words.contexts} == {None, "forward", "backward", "optimizer"}
        assert {microbatch for _, microbatch, phase in words.contexts if phase != "forward"} == {None}
        assert words.contexts[-1] == (None, None, None)


def test_interleaved_chunks_tell_their_layers_and_each_its_microbatches(text: Path) -> None:
    told = run_ranks(2, listen, MODEL, parse_strategy("PP2-VPP2"), TRAINING, text, timeout_s=60)
    for stage, words in enumerate(told):
        assert words.chunks == ["model.chunks.0", "model.chunks.1"]
        assert [layer for _, layer, _ in words.modules if layer is not None] == [stage, 2 + stage]
        forward = [microbatch for _, microbatch, phase in words.contexts if phase == "forward"]
        for microbatch in range(8):
            assert forward.count(microbatch) >= 2, "every chunk runs every microbatch"
        assert words.names["output"] == {"loss"}


ZERO = replace(TRAINING, global_batch_size=9, distributed_optimizer=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_element_of_a_sharded_state_is_named_by_its_parameter(dtype: Any, text: Path) -> None:
    model = replace(MODEL, dtype=dtype, experts="grouped", attention="fused")
    told = run_ranks(3, listen, model, parse_strategy("DP3"), ZERO, text, timeout_s=60)
    for key in ("exp_avg", "exp_avg_sq", *(["main"] if dtype == "bfloat16" else [])):
        pieces: dict[str, list[tuple[int, int]]] = {}
        whole = set()
        for words in told:
            for name in words.names["state"]:
                if match := re.fullmatch(rf"(.*)\.{key}(?:\[(\d+):(\d+)\])?", name):
                    if match[2] is None:
                        whole.add(match[1])
                    else:
                        pieces.setdefault(match[1], []).append((int(match[2]), int(match[3])))
        assert whole | set(pieces) == told[0].names["parameter"]
        assert not whole & set(pieces)
        assert len(pieces) > 0
        for name, parts in pieces.items():
            starts, ends = zip(*sorted(parts), strict=True)
            assert starts == (0, *ends[:-1]), name


def leave(model: ModelConfig, training: TrainingConfig, text: Path) -> bool:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher
    from torch import distributed

    from truedag.parallel.train import build_trainer

    def world() -> tuple[Any, ...]:
        cuda = (torch.cuda.current_device, torch.cuda.current_stream, torch.cuda.Stream, torch.cuda.stream)
        dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream
        collectives = (distributed.all_gather, distributed.reduce_scatter)
        return (*cuda, *collectives, token_dispatcher.maybe_move_tensor_to_cpu, dispatcher, random.get_cuda_rng_tracker)

    before = world()
    trainer = build_trainer(model, parse_strategy("TP1"), training, text=text, device=torch.device("cpu"))
    during = world()
    trainer.step(0)
    trainer.close()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    return before == world() != during


def test_the_device_adapter_leaves_nothing_behind(text: Path) -> None:
    assert run_ranks(1, leave, MODEL, TRAINING, text, timeout_s=60) == [True]


def losses(model: ModelConfig, strategy: Strategy, training: TrainingConfig, text: Path) -> list[float]:
    from truedag.parallel.train import build_trainer

    trainer = build_trainer(model, strategy, training, text=text, device=torch.device("cpu"))
    results = [trainer.step(0).loss for _ in range(5)]
    trainer.close()
    return results


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_loss_falls_on_a_batch_seen_again(dtype: Any, text: Path) -> None:
    model = replace(MODEL, dtype=dtype, experts="grouped", attention="fused")
    training = replace(TRAINING, learning_rate=1e-3)
    for curve in run_ranks(2, losses, model, parse_strategy("TP2-EP2-ETP1"), training, text, timeout_s=120):
        assert curve[0] == pytest.approx(np.log(256), rel=0.02)
        assert curve[-1] < curve[0] - 0.1


def overflow(model: ModelConfig, training: TrainingConfig, text: Path) -> tuple[list[float | None], bool]:
    from truedag.parallel import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_INITIAL_LOSS_SCALE", 2.0**60)
        trainer = train.build_trainer(model, parse_strategy("TP1"), training, text=text, device=torch.device("cpu"))
    before = [shard.data.clone() for shard in trainer.shards()]
    norms = [trainer.step(0).gradient_norm]
    unchanged = all(torch.equal(shard.data, old) for shard, old in zip(trainer.shards(), before, strict=True))
    trainer.close()
    return norms, unchanged


def test_a_step_whose_float16_gradients_overflow_changes_nothing(text: Path) -> None:
    (found,) = run_ranks(1, overflow, replace(MODEL, dtype="float16"), TRAINING, text, timeout_s=60)
    assert found == ([None], True)


def refuse(model: ModelConfig, strategy: Strategy, training: TrainingConfig, text: Path) -> str:
    from truedag.parallel.train import build_trainer

    with pytest.raises(StrategyError) as refusal:
        build_trainer(model, strategy, training, text=text, device=torch.device("cpu"))
    return str(refusal.value)


def test_a_world_that_does_not_fit_is_refused_before_anything_is_built(text: Path) -> None:
    (message,) = run_ranks(1, refuse, MODEL, parse_strategy("TP2"), TRAINING, text, timeout_s=60)
    assert message == "TP2-PP1-DP1-EP1-ETP1 needs 2 ranks, there are 1"


def rows(text: Path, replica: Replica, step: int, length: int = 16) -> list[list[int]]:
    """The sequences of a rank in a step, each with its last label."""
    source = open_tokens(text, vocab_size=256)
    training = replace(TRAINING, sequence_length=length)
    reader = TextBatches(source, training, replica, device=torch.device("cpu"))
    found = []
    for microbatch in range(training.num_microbatches(replica.dp_size)):
        batch = reader.read(step, microbatch)
        assert batch.tokens_BS is not None
        assert batch.labels_BS is not None
        assert batch.tokens_BS.dtype == batch.labels_BS.dtype == torch.int64
        found += torch.cat([batch.tokens_BS, batch.labels_BS[:, -1:]], dim=1).tolist()
    return found


def batches(text: Path, *, dp_size: int, step: int, length: int = 16) -> list[list[int]]:
    return sorted(
        row for dp_rank in range(dp_size) for row in rows(text, Replica(dp_rank=dp_rank, dp_size=dp_size), step, length)
    )


def test_context_parallel_ranks_share_each_sequence(text: Path) -> None:
    ((first, *_), (second, *_)) = (rows(text, Replica(cp_rank=rank, cp_size=2), step=0) for rank in range(2))
    sequence = list(text.read_bytes()[:17])
    assert first == [*sequence[:4], *sequence[12:17]]
    assert second == [*sequence[4:12], sequence[12]]


def test_a_stage_reads_what_it_needs(text: Path) -> None:
    reader = TextBatches(open_tokens(text, vocab_size=256), TRAINING, Replica(), device=torch.device("cpu"))
    middle = reader.read(0, 0, tokens=False, labels=False)
    assert middle.tokens_BS is None
    assert middle.labels_BS is None


def test_the_global_batch_is_the_same_whatever_the_data_parallel_size(text: Path) -> None:
    for step in range(3):
        assert batches(text, dp_size=1, step=step) == batches(text, dp_size=2, step=step)
        assert batches(text, dp_size=1, step=step) == batches(text, dp_size=8, step=step)


def test_the_text_is_read_through_and_then_from_its_start(text: Path) -> None:
    ring = list(text.read_bytes()) * 2
    expected = [ring[start : start + 17] for start in (place * 16 % 500 for place in range(8 * 6))]
    for step in range(6):
        assert batches(text, dp_size=2, step=step) == sorted(expected[step * 8 : step * 8 + 8])


def test_a_text_that_cannot_feed_the_training_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        batches(tmp_path / "none.txt", dp_size=1, step=0)
    with pytest.raises(DataError, match="500 bytes; sequence_length=500 needs 501"):
        batches(text, dp_size=1, step=0, length=500)
