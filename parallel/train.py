"""The executor: trains a model under a strategy, step by step, through megatron-core.

Theory of operation: `build_trainer` makes the process groups, this rank's chunk of the model, its gradient buffers and
its optimizer. Whoever wants to record starts recording then. `Trainer.step` runs megatron-core's 1F1B schedule,
interleaved where a stage has several chunks, over the microbatches of one step, synchronises the gradients, and takes
the optimizer's step. What no observer can see (the step, the microbatch, the phase, the layer and expert of a module,
the name of a tensor) is said through `truedag.tracer.annotate`, and costs nothing while nobody listens.
"""

from __future__ import annotations

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
from megatron.core.transformer.module import Float16Module
from torch import Tensor, distributed, nn

from truedag.model.build import transformer_config
from truedag.model.config import ModelConfig
from truedag.model.parameters import Shard, shards
from truedag.parallel.annotation import ModelNames
from truedag.parallel.chunks import build_chunks, name_chunks, sharding
from truedag.parallel.data import Batch, Replica, TextBatches
from truedag.parallel.devices import DeviceAdapter, adapter_of
from truedag.parallel.groups import destroy_groups, init_groups
from truedag.parallel.injection import RouterWatch
from truedag.parallel.routing import Routing
from truedag.parallel.strategy import Strategy
from truedag.parallel.text import TokenSource, TokenType, open_tokens
from truedag.parallel.training import TrainingConfig, check_fit
from truedag.tracer import annotate

# Of half-precision training; megatron-core's own, 2**32, makes every run begin with steps that are skipped.
_INITIAL_LOSS_SCALE = 2.0**16


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step came to; the same on every rank, except the time."""

    step: int
    """The step's number."""

    loss: float
    """Mean over all tokens of the global batch, in nats."""

    gradient_norm: float | None
    """L2 norm of the whole model's gradient, before clipping; None: a float16 gradient overflowed at this loss scale,
    so the step changed nothing but the scale."""

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
    weights: Path | None = None,
    tokenizer: Path | None = None,
    token_dtype: TokenType | None = None,
    adapter: DeviceAdapter | None = None,
    routing: Routing | None = None,
    watch_routing: bool = False,
) -> Trainer:
    """Build this rank's part of a training run. Every rank must call it; it synchronises.

    The default process group must exist: gloo for a CPU device, NCCL for CUDA.

    Args:
        model: what is trained.
        strategy: where it runs; its world must be the default process group's.
        training: batch, sequence and optimizer.
        text: a text, whose bytes are the tokens where there is no tokenizer, or a file of token ids.
        device: where this rank computes.
        timeout: how long an operation on any of the strategy's process groups may take.
        weights: a folder of Hugging Face safetensors to start from; None: seeded weights.
        tokenizer: a Hugging Face ``tokenizer.json`` for the text.
        token_dtype: what a raw file of token ids consists of.
        adapter: what lets megatron-core run on the device; None: the device's own.
        routing: laid over the routers, which else choose by themselves; tensors without memory need one.
        watch_routing: keep how many tokens the routers sent to each expert, for `Trainer.routers.tokens`.

    Raises:
        StrategyError: the strategy does not fit the ranks, the model or the batch.
        DataError: the text cannot be read, is too short, or has tokens that the model has not.
        ModelError: the weights are not those of the model.
    """
    check_fit(strategy, model, training, world_size=distributed.get_world_size())
    source = open_tokens(text, vocab_size=model.vocab_size, tokenizer=tokenizer, token_dtype=token_dtype)
    adapter = adapter_of(device) if adapter is None else adapter
    adapter.install()
    try:
        trainer = Trainer(
            model, strategy, training, source=source, device=device, timeout=timeout, weights=weights, adapter=adapter
        )
        if routing is not None or watch_routing:
            trainer.watch_routers(routing)
        return trainer
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
        source: TokenSource,
        device: torch.device,
        timeout: timedelta,
        weights: Path | None,
        adapter: DeviceAdapter,
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.training = training
        self._adapter = adapter
        self.groups: Any = init_groups(strategy, timeout)
        adapter.seed(model.seed)
        replica = Replica(
            dp_rank=self.groups.dp.rank(),
            dp_size=strategy.dp,
            cp_rank=self.groups.cp.rank(),
            cp_size=strategy.cp,
        )
        self._batches = TextBatches(source, training, replica, device=device)
        self._device = device
        self._config: Any = transformer_config(
            model,
            sharding(strategy, sequence_parallel=training.sequence_parallel, recompute=training.recompute),
        )
        with adapter.building():
            self.chunks = build_chunks(model, self._config, strategy, self.groups, device=device, weights=weights)
        self.routers: RouterWatch | None = None
        self._ddp = [
            _wrap(self._config, chunk, training, self.groups, place) for place, chunk in enumerate(self.chunks)
        ]
        self._optimizer = get_megatron_optimizer(
            _optimizer_config(model, training), self._ddp, use_gloo_process_groups=False
        )
        self._config.finalize_model_grads_func = _finalize
        no_sync = [ddp.no_sync for ddp in self._ddp]
        self._config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        if model.dtype == "float16":
            self._config.grad_scale_func = self._optimizer.scale_loss
        self._names = ModelNames()
        for chunk in self.chunks:
            self._names.name_modules(chunk)
            self._names.name_buffers(chunk)
        self._names.name_parameters(self.shards())
        self._names.name_gradients(self.shards())
        self._state_named = False

    @property
    def model_chunks(self) -> list[tuple[str, nn.Module]]:
        """This rank's chunks of the model, with the name each has in the whole."""
        return name_chunks(self.chunks)

    def shards(self) -> list[Shard]:
        """Return this rank's slices of the logical parameters."""
        return [shard for chunk in self.chunks for shard in shards(chunk, self.model)]

    def watch_routers(self, routing: Routing | None) -> None:
        """Keep what the routers choose, or choose for them by a routing, from the next step on. Local."""
        rank = distributed.get_rank()
        self.routers = RouterWatch(self.chunks, routing=routing, share=self._share_of, rank=rank)

    def _share_of(self, rank: int, number: int) -> tuple[int, int]:
        """A router's tokens: each rank has its own part of a microbatch, but for what is not split over TP."""
        del number
        tokens = self.training.micro_batch_size * self.training.sequence_length // self.strategy.cp
        if self._config.sequence_parallel:
            return rank, tokens // self.strategy.tp
        return self.strategy.group_of("tp", rank)[0], tokens

    def step(self, index: int) -> StepResult:
        """Run one training step. Every rank must call it with the same index; it synchronises.

        Args:
            index: the step's number: chooses the batch and labels what is recorded.
        """
        start_ns = time.monotonic_ns()
        if self.routers is not None:
            self.routers.begin()
        with annotate.scope(step=index):
            with annotate.scope(phase="optimizer"):
                for ddp in self._ddp:
                    ddp.zero_grad_buffer()
                self._optimizer.zero_grad()
            iterators = [self._microbatches(index, chunk) for chunk in self.chunks]
            losses: list[Tensor] = get_forward_backward_func()(
                forward_step_func=partial(_forward_step, self.strategy.cp),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self._ddp,
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
            self._state_named = self._names.name_optimizer_state(self._optimizer, self.shards())
        return StepResult(
            step=index,
            loss=loss,
            gradient_norm=None if gradient_norm is None else float(gradient_norm),
            num_tokens=self.training.global_batch_size * self.training.sequence_length,
            wall_ns=wall_ns,
        )

    def gather_parameters(self) -> None:
        """Gather what other ranks have updated. Every rank must call it; it synchronises.

        Only overlap_param_gather leaves that to the next step: whoever reads parameters between steps calls it first.
        """
        if self.training.overlap_param_gather:
            for ddp in self._ddp:
                ddp.start_param_sync(force_sync=True)

    def close(self) -> None:
        """Take the process groups and the device adapter away. Every rank must call it. The default group stays."""
        destroy_groups()
        self._adapter.remove()

    def _microbatches(self, step: int, chunk: Any) -> Iterator[_Microbatch]:
        """Yield a chunk's microbatches of a step; it is given what it needs of each, and no more."""
        for number in range(self.training.num_microbatches(self.strategy.dp)):
            read = partial(self._batches.read, step, number, tokens=chunk.pre_process, labels=chunk.post_process)
            yield _Microbatch(number=number, read=read)

    def _mean_loss(self, losses: list[Tensor]) -> float:
        """Return the global mean loss on every rank, from the last stage's losses of its microbatches."""
        loss = torch.stack(losses).mean() if losses else torch.zeros((), device=self._device)
        loss /= self.groups.dp_cp.size()
        distributed.all_reduce(loss, group=self.groups.dp_cp)
        distributed.all_reduce(loss, group=self.groups.pp)
        annotate.tensor(loss, "loss", role="output")
        return loss.item()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Microbatch:
    """A microbatch of a step, not read yet."""

    number: int
    read: Callable[[], Batch]


def _forward_step(
    cp_size: int, microbatches: Iterator[_Microbatch], chunk: nn.Module
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """megatron-core's forward_step_func: runs the chunk's next microbatch, and says which one it is."""
    microbatch = next(microbatches)
    with annotate.scope(microbatch=microbatch.number, phase="forward"):
        batch = microbatch.read()
        if batch.tokens_BS is not None:
            annotate.tensor(batch.tokens_BS, "tokens", role="input")
        if batch.labels_BS is not None:
            annotate.tensor(batch.labels_BS, "labels", role="input")
        # Rotary embeddings need no positions, and the core attention makes its own mask.
        output: Tensor = chunk(batch.tokens_BS, None, None, labels=batch.labels_BS)
    return output, partial(_loss, microbatch.number, cp_size)


def _loss(microbatch: int, cp_size: int, losses_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return a microbatch's loss to go backward from, and a copy of the mean: the schedule divides the first in place.

    The schedule multiplies the loss by the context-parallel size, for a part of a sequence's mean is what it expects.
    """
    with annotate.scope(microbatch=microbatch, phase="forward"):
        loss = losses_BS.float().mean()
        return loss / cp_size if cp_size > 1 else loss, loss.detach().clone()


def _finalize(*args: Any, **kwargs: Any) -> None:
    """Synchronise the gradients, as megatron-core does."""
    with annotate.scope(phase="backward"):
        finalize_model_grads(*args, **kwargs)


def _wrap(config: Any, chunk: nn.Module, training: TrainingConfig, groups: Any, place: int) -> Any:
    """Return a chunk with megatron-core's gradient buffers; `place` is its number among the stage's chunks."""
    module = Float16Module(config, chunk) if config.bf16 or config.fp16 else chunk
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=training.overlap_grad_reduce,
        overlap_param_gather=training.overlap_param_gather,
        use_distributed_optimizer=training.distributed_optimizer,
        bucket_size=training.bucket_size,
    )
    return DistributedDataParallel(
        config=config, ddp_config=ddp_config, module=module, disable_bucketing=place > 0, pg_collection=groups
    )


def _optimizer_config(model: ModelConfig, training: TrainingConfig) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer=training.optimizer,
        lr=training.learning_rate,
        min_lr=training.learning_rate,
        weight_decay=training.weight_decay,
        clip_grad=training.clip_grad,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_epsilon,
        sgd_momentum=training.adam_beta1,
        initial_loss_scale=_INITIAL_LOSS_SCALE,
        bf16=model.dtype == "bfloat16",
        fp16=model.dtype == "float16",
        use_distributed_optimizer=training.distributed_optimizer,
        overlap_param_gather=training.overlap_param_gather,
    )
