"""The executor: trains a model under a strategy, step by step, through megatron-core.

Theory of operation: `build_trainer` makes the process groups, this rank's chunk of the model, its gradient buffers and
its optimizer. Whoever wants to record starts recording then. `Trainer.step` runs megatron-core's 1F1B schedule over the
microbatches of one step, synchronises the gradients, and takes the optimizer's step. What no observer can see (the
step, the microbatch, the phase, the layer and expert of a module, the name of a tensor) is said through
`truedag.tracer.annotate`, and costs nothing while nobody listens.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import random
from megatron.core.transformer.module import Float16Module
from torch import Tensor, distributed, nn

from truedag.model.build import Sharding, build_chunk, transformer_config
from truedag.model.config import ModelConfig
from truedag.model.parameters import Shard, expert_name, layer_name, shards
from truedag.parallel.cpu import CpuAdapter
from truedag.parallel.data import Batch, TextBatches
from truedag.parallel.groups import destroy_groups, init_groups, is_first_stage, is_last_stage
from truedag.parallel.strategy import Strategy
from truedag.parallel.training import TrainingConfig, check_fit
from truedag.tracer import annotate

CHUNK_NAME = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step came to; the same on every rank, except the time."""

    step: int
    """The step's number."""

    loss: float
    """Mean over all tokens of the global batch, in nats."""

    gradient_norm: float
    """L2 norm of the whole model's gradient, before clipping."""

    num_tokens: int
    """Tokens in the global batch."""

    wall_ns: int
    """From entering the step on this rank to leaving it."""


def build_trainer(
    model: ModelConfig,
    strategy: Strategy,
    training: TrainingConfig,
    *,
    text: Path,
    device: torch.device,
    timeout: timedelta = timedelta(minutes=30),
) -> Trainer:
    """Build this rank's part of a training run. Every rank must call it; it synchronises.

    The default process group must exist: gloo for a CPU device, NCCL for CUDA.

    Args:
        model: what is trained.
        strategy: where it runs; its world must be the default process group's.
        training: batch, sequence and optimizer.
        text: a file whose bytes are the tokens.
        device: where this rank computes.
        timeout: how long an operation on any of the strategy's process groups may take.

    Raises:
        StrategyError: the strategy does not fit the ranks, the model or the batch.
        DataError: the text cannot be read or is too short.
    """
    check_fit(strategy, model, training, world_size=distributed.get_world_size())
    adapter = CpuAdapter()
    if device.type == "cpu":
        adapter.install()
    try:
        return Trainer(model, strategy, training, text=text, device=device, timeout=timeout, adapter=adapter)
    except BaseException:
        adapter.remove()
        raise


class Trainer:
    """One rank of a training run. Made by `build_trainer`; `close` it at the end."""

    def __init__(
        self,
        model: ModelConfig,
        strategy: Strategy,
        training: TrainingConfig,
        *,
        text: Path,
        device: torch.device,
        timeout: timedelta,
        adapter: CpuAdapter,
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.training = training
        self._adapter = adapter
        self.groups: Any = init_groups(strategy, timeout)
        if device.type != "cpu":
            random.model_parallel_cuda_manual_seed(model.seed)
        self._batches = TextBatches(
            text, training, dp_rank=self.groups.dp.rank(), dp_size=self.groups.dp.size(), device=device
        )
        self._device = device
        self._config: Any = transformer_config(model, _sharding(strategy, training))
        self.chunk = build_chunk(
            model,
            self._config,
            pre_process=is_first_stage(self.groups),
            post_process=is_last_stage(self.groups),
            pg_collection=self.groups,
            device=device,
        )
        self._ddp = _wrap(self._config, self.chunk, self.groups)
        self._optimizer = get_megatron_optimizer(
            _optimizer_config(model, training), [self._ddp], use_gloo_process_groups=False
        )
        self._config.finalize_model_grads_func = _finalize
        self._config.no_sync_func = self._ddp.no_sync
        if model.dtype == "float16":
            self._config.grad_scale_func = self._optimizer.scale_loss
        self._named: list[Tensor] = []
        self._state_named = False
        self._annotate_model()

    @property
    def model_chunks(self) -> list[tuple[str, nn.Module]]:
        """This rank's chunks of the model, with the name each has in the whole."""
        return [(CHUNK_NAME, self.chunk)]

    def shards(self) -> list[Shard]:
        """Return this rank's slices of the logical parameters."""
        return list(shards(self.chunk, self.model))

    def step(self, index: int) -> StepResult:
        """Run one training step. Every rank must call it with the same index; it synchronises.

        Args:
            index: the step's number: chooses the batch and labels what is recorded.
        """
        start_ns = time.monotonic_ns()
        with annotate.scope(step=index):
            with annotate.scope(phase="optimizer"):
                self._ddp.zero_grad_buffer()
                self._optimizer.zero_grad()
            losses: list[Tensor] = get_forward_backward_func()(
                forward_step_func=_ForwardStep(),
                data_iterator=self._batches.microbatches(index),
                model=[self._ddp],
                num_microbatches=self.training.num_microbatches(self.strategy.dp),
                seq_length=self.training.sequence_length,
                micro_batch_size=self.training.micro_batch_size,
                forward_only=False,
            )
            with annotate.scope(phase="optimizer"):
                _, gradient_norm, _ = self._optimizer.step()
                loss = self._mean_loss(losses)
        wall_ns = time.monotonic_ns() - start_ns
        if not self._state_named:
            self._annotate_optimizer_state()
        return StepResult(
            step=index,
            loss=loss,
            gradient_norm=float(gradient_norm),
            num_tokens=self.training.global_batch_size * self.training.sequence_length,
            wall_ns=wall_ns,
        )

    def close(self) -> None:
        """Take the process groups and the device adapter away. Every rank must call it. The default group stays."""
        destroy_groups()
        self._adapter.remove()

    def _mean_loss(self, losses: list[Tensor]) -> float:
        """Return the global mean loss on every rank, from the last stage's losses of its microbatches."""
        loss = torch.stack(losses).mean() if losses else torch.zeros((), device=self._device)
        loss /= self.groups.dp.size()
        distributed.all_reduce(loss, group=self.groups.dp)
        distributed.all_reduce(loss, group=self.groups.pp)
        annotate.tensor(loss, "loss", role="output")
        return loss.item()

    def _annotate_model(self) -> None:
        chunk: Any = self.chunk
        for layer in chunk.decoder.layers:
            number = layer.layer_number - 1
            annotate.module(layer, name=layer_name(number), layer=number)
            if hasattr(layer.mlp, "experts"):  # what the MoE layer does itself is moving tokens
                annotate.module(layer.mlp, category="routing")
                annotate.module(layer.mlp.experts, category="computation")
            experts = getattr(getattr(layer.mlp, "experts", None), "local_experts", ())
            for index, expert in enumerate(experts):
                expert_number = layer.mlp.local_expert_indices[index]
                annotate.module(expert, name=expert_name(number, expert_number), expert=expert_number)
        for shard in self.shards():
            self._name(shard.data, shard.name, "parameter")
            self._name(shard.gradient, shard.name, "gradient")

    def _annotate_optimizer_state(self) -> None:
        """Name the states that the optimizer made in its first step."""
        for shard in self.shards():
            for optimizer in self._optimizer.chained_optimizers:
                for key, state in optimizer.optimizer.state.get(shard.parameter, {}).items():
                    if isinstance(state, Tensor) and state.shape == shard.parameter.shape:
                        self._name(state if shard.index is None else state[shard.index], f"{shard.name}.{key}", "state")
        self._state_named = True

    def _name(self, tensor: Tensor, name: str, role: annotate.Role) -> None:
        """Name a tensor for good: a name lasts as long as its tensor object, and a shard makes a new one each time."""
        annotate.tensor(tensor, name, role=role)
        self._named.append(tensor)


class _ForwardStep:
    """megatron-core's forward_step_func: counts the microbatches of a step, and says which one runs."""

    def __init__(self) -> None:
        self._microbatch = itertools.count()

    def __call__(self, batches: Iterator[Batch], chunk: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        microbatch = next(self._microbatch)
        with annotate.scope(microbatch=microbatch, phase="forward"):
            batch = next(batches)
            annotate.tensor(batch.tokens_BS, "tokens", role="input")
            annotate.tensor(batch.labels_BS, "labels", role="input")
            # Rotary embeddings need no positions, and the core attention makes its own mask.
            output: Tensor = chunk(batch.tokens_BS, None, None, labels=batch.labels_BS)
        return output, partial(_loss, microbatch)


def _loss(microbatch: int, losses_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return a microbatch's mean loss twice: to go backward from, and (the schedule divides that in place) a copy."""
    with annotate.scope(microbatch=microbatch, phase="forward"):
        loss = losses_BS.float().mean()
        return loss, loss.detach().clone()


def _finalize(*args: Any, **kwargs: Any) -> None:
    """Synchronise the gradients, as megatron-core does."""
    with annotate.scope(phase="backward"):
        finalize_model_grads(*args, **kwargs)


def _wrap(config: Any, chunk: nn.Module, groups: Any) -> Any:
    """Return the chunk with megatron-core's gradient buffers: one all-reduce per buffer, after the last backward."""
    module = Float16Module(config, chunk) if config.bf16 or config.fp16 else chunk
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False
    )
    return DistributedDataParallel(config=config, ddp_config=ddp_config, module=module, pg_collection=groups)


def _sharding(strategy: Strategy, training: TrainingConfig) -> Sharding:
    return Sharding(
        tp=strategy.tp,
        pp=strategy.pp,
        ep=strategy.ep,
        etp=strategy.etp,
        sequence_parallel=training.sequence_parallel and strategy.tp > 1,
    )


def _optimizer_config(model: ModelConfig, training: TrainingConfig) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer=training.optimizer,
        lr=training.learning_rate,
        min_lr=training.learning_rate,
        weight_decay=training.weight_decay,
        clip_grad=training.clip_grad,
        bf16=model.dtype == "bfloat16",
        fp16=model.dtype == "float16",
        use_distributed_optimizer=False,
    )
