"""The executor: generates tokens with a model under a strategy, in two phases over the same process groups.

Theory of operation: `build_generator` makes the process groups, this rank's chunk of the model and its cache of keys
and values. `Generator.run` is one iteration: all prompts are prefilled, microbatch by microbatch, then all rows decode
in lockstep. A pass goes through the stages from the first to the last, which chooses the tokens and sends them to the
first; stages work on successive passes at the same time, and every rank knows the order and the shapes of all of them.
The first stage takes a pass's tokens when they go into a later pass, and at the latest before it begins the PP-th pass
after it, when an even pipeline has them: a token is seen when it is there, and at most PP passes are under way.

Tokens travel over the group of first and last stage, not over the pipeline's own: on NCCL two messages that cross
between two ranks of one group may wait for each other.

Without sequence parallelism (always in decoding) every tensor-parallel rank has all tokens of its replica, and routes
them all: each token is sent to its experts once by every tensor-parallel rank, and each rank gets its own copies back.
The output is right; the experts compute TP times as much as they had to.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from truedag.model.build import transformer_config
from truedag.model.config import ModelConfig
from truedag.model.kv_cache import KVCache
from truedag.model.parameters import Shard, shards
from truedag.model.sequence_parallel import SequenceParallelSwitch
from truedag.parallel.annotation import ModelNames
from truedag.parallel.chunks import build_chunks, name_chunks, sharding
from truedag.parallel.devices import DeviceAdapter, adapter_of
from truedag.parallel.generation import Generation, GenerationResult, summarize
from truedag.parallel.groups import destroy_groups, init_groups, is_first_stage, is_last_stage
from truedag.parallel.inference import InferenceConfig, Pass, check_inference_fit, passes
from truedag.parallel.injection import RouterWatch
from truedag.parallel.prompts import Prompts
from truedag.parallel.routing import Routing
from truedag.parallel.strategy import Strategy
from truedag.tracer import annotate


def build_generator(
    model: ModelConfig,
    strategy: Strategy,
    inference: InferenceConfig,
    *,
    prompts: Prompts,
    device: torch.device,
    timeout: timedelta = timedelta(minutes=30),
    weights: Path | None = None,
    keep_logits: bool = False,
    adapter: DeviceAdapter | None = None,
    routing: Routing | None = None,
    watch_routing: bool = False,
) -> Generator:
    """Build this rank's part of an inference run. Every rank must call it; it synchronises.

    The default process group must exist: gloo for a CPU device, NCCL for CUDA.

    Args:
        model: what generates.
        strategy: where it runs; its world must be the default process group's.
        inference: how many prompts, how long, and how many tokens.
        prompts: what they say.
        device: where this rank computes.
        timeout: how long an operation on any of the strategy's process groups may take.
        weights: a folder of Hugging Face safetensors; None: seeded weights.
        keep_logits: keep what every token was chosen from; costs memory and copies.
        adapter: what lets megatron-core run on the device; None: the device's own.
        routing: laid over the routers, which else choose by themselves; tensors without memory need one.
        watch_routing: keep how many tokens the routers sent to each expert, for `Generator.routers.tokens`.

    Raises:
        StrategyError: the strategy does not fit the ranks, the model or the prompts.
        DataError: the prompts are not as many or as long as they should be, or have tokens that the model has not.
        ModelError: the weights are not those of the model.
    """
    check_inference_fit(strategy, model, inference, world_size=distributed.get_world_size())
    prompts.check(model, inference)
    adapter = adapter_of(device) if adapter is None else adapter
    adapter.install()
    try:
        generator = Generator(
            model,
            strategy,
            inference,
            prompts=prompts,
            device=device,
            timeout=timeout,
            weights=weights,
            keep_logits=keep_logits,
            adapter=adapter,
        )
        if routing is not None or watch_routing:
            generator.watch_routers(routing)
        return generator
    except BaseException:
        adapter.remove()
        raise


class Generator:
    """One rank of an inference run. Made by `build_generator`; `close` it at the end."""

    def __init__(
        self,
        model: ModelConfig,
        strategy: Strategy,
        inference: InferenceConfig,
        *,
        prompts: Prompts,
        device: torch.device,
        timeout: timedelta,
        weights: Path | None,
        keep_logits: bool,
        adapter: DeviceAdapter,
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.inference = inference
        self._adapter = adapter
        self._device = device
        self._keep_logits = keep_logits
        self.groups: Any = init_groups(strategy, timeout)
        adapter.seed(model.seed)
        # Whether it is, each pass says; a module that was not built for it cannot be switched to it.
        self._config: Any = transformer_config(model, sharding(strategy, sequence_parallel=True))
        with adapter.building():
            self.chunks = build_chunks(model, self._config, strategy, self.groups, device=device, weights=weights)
        (self._chunk,) = self.chunks
        self.routers: RouterWatch | None = None
        self._chunk.to(self._config.params_dtype).eval()
        self._sequence_parallel = SequenceParallelSwitch(self._chunk)
        dp_rank = self.groups.dp.rank()
        self._prompts = inference.prompts_of(dp_rank, strategy.dp)
        self._passes_by_replica: dict[int, list[Pass]] = {}
        self._passes = self._passes_of(dp_rank)
        self.cache = self._build_cache()
        self._tokens_R = torch.zeros(len(self._prompts), dtype=torch.int64, device=device)
        self._prompt_tokens = [
            prompts.read(self._prompts, one.rows, inference).to(device)
            for one in self._passes
            if one.phase == "prefill" and is_first_stage(self.groups)
        ]
        self._names = ModelNames()
        self._annotate()

    @property
    def model_chunks(self) -> list[tuple[str, nn.Module]]:
        """This rank's chunks of the model, with the name each has in the whole."""
        return name_chunks(self.chunks)

    def shards(self) -> list[Shard]:
        """Return this rank's slices of the logical parameters."""
        return [shard for chunk in self.chunks for shard in shards(chunk, self.model)]

    def watch_routers(self, routing: Routing | None) -> None:
        """Keep what the routers choose, or choose for them by a routing, from the next run on. Local."""
        rank = distributed.get_rank()
        self.routers = RouterWatch(self.chunks, routing=routing, share=self._share_of, rank=rank)

    def _share_of(self, rank: int, number: int) -> tuple[int, int]:
        """A router's tokens in a pass: a rank's own part of a prompt that is split over TP, else all of its replica."""
        one = self._passes_of(self.strategy.coordinates(rank)["dp"])[number]
        tokens = one.length * len(one.rows)
        if self._is_split(one):
            return rank, tokens // self.strategy.tp
        return self.strategy.group_of("tp", rank)[0], tokens

    def _passes_of(self, dp_rank: int) -> list[Pass]:
        if dp_rank not in self._passes_by_replica:
            found = list(passes(self.inference, dp_rank=dp_rank, dp_size=self.strategy.dp))
            self._passes_by_replica[dp_rank] = found
        return self._passes_by_replica[dp_rank]

    def run(self, index: int) -> Generation:
        """Generate once, from empty caches. Every rank must call it with the same index; it synchronises.

        Args:
            index: the run's number, with which everything recorded is labelled as its step.
        """
        run = _Run(len(self._prompts), self.strategy.pp)
        if self.routers is not None:
            self.routers.begin()
        self.cache.reset()
        with torch.no_grad(), annotate.scope(step=index):
            incoming = self._receive(0)
            for place, one in enumerate(self._passes):
                self._take_tokens(run, max(place - self.strategy.pp, -1 if one.after is None else one.after))
                hidden = None if incoming is None else incoming.wait()
                incoming = self._receive(place + 1)
                with _scope(one):
                    self._forward(run, place, hidden)
            self._take_tokens(run, len(self._passes) - 1)
            run.outbox.drain()
        first, last = is_first_stage(self.groups), is_last_stage(self.groups)
        return Generation(
            step=index,
            prompts=self._prompts,
            tokens_RT=tuple(map(tuple, run.tokens)) if first else None,
            times_RT=tuple(map(tuple, run.times)) if first else None,
            logits_RTV=torch.stack([torch.stack(row) for row in run.logits]) if last and self._keep_logits else None,
            last_logits=tuple(run.last_logits.values()),
            wall_ns=time.monotonic_ns() - run.start_ns,
        )

    def summarize(self, generation: Generation) -> GenerationResult:
        """Return what all ranks generated. Every rank must call it, outside of a recording: it communicates."""
        is_one = self.groups.tp.rank() == 0
        return summarize(
            generation,
            self.inference,
            speaks=is_one and is_first_stage(self.groups),
            judges=is_one and is_last_stage(self.groups),
            device=self._device,
        )

    def close(self) -> None:
        """Take the process groups and the device adapter away. Every rank must call it. The default group stays."""
        destroy_groups()
        self._adapter.remove()

    def _build_cache(self) -> KVCache:
        model: Any = self._chunk
        return KVCache(
            [layer.layer_number - 1 for layer in model.decoder.layers],
            max_length=self.inference.longest + self.inference.decode_steps,
            num_rows=len(self._prompts),
            num_heads=self.model.kv_heads // self.strategy.tp,
            head_dim=self.model.kv_channels,
            dtype=self._config.params_dtype,
            device=self._device,
        )

    def _forward(self, run: _Run, place: int, hidden: Tensor | None) -> None:
        """Run this stage's part of a pass, and send on what comes out."""
        one = self._passes[place]
        self._sequence_parallel.turn(self._is_split(one))
        if one.phase == "prefill":
            self.cache.prefill(one.rows, one.length)
        else:
            self.cache.decode(one.rows)
        model: Any = self._chunk
        model.set_input_tensor(hidden)
        output: Tensor = model(self._input(place), None, None, inference_context=self.cache, runtime_gather_output=True)
        if not is_last_stage(self.groups):
            run.outbox.send(output, self._neighbour(+1), self.groups.pp)
            return
        # Under sequence parallelism there is one position of each rank's part; the last one's is the sequence's.
        logits_BV = output[:, -1]
        if one.phase == "decode" or not self.inference.decode_steps:
            run.last_logits[one.rows] = logits_BV
        tokens_B = _choose(logits_BV)
        annotate.tensor(tokens_B, "sampled_tokens", role="output")
        if self._keep_logits:
            for row, logits_V in zip(one.rows, logits_BV.clone(), strict=True):
                run.logits[row].append(logits_V)
        if self.strategy.pp == 1:
            self._rows(one).copy_(tokens_B)
        else:
            run.outbox.send(tokens_B, self._neighbour(+1), self.groups.embd)

    def _input(self, place: int) -> Tensor | None:
        """Return the tokens that go into a pass, [B, S]; None where hidden states do."""
        one = self._passes[place]
        if not is_first_stage(self.groups):
            return None
        return self._prompt_tokens[place] if one.phase == "prefill" else self._rows(one).unsqueeze(1)

    def _rows(self, one: Pass) -> Tensor:
        return self._tokens_R[one.rows.start : one.rows.stop]

    def _receive(self, place: int) -> _Incoming | None:
        """Begin to receive the hidden states of a pass; None where there are none."""
        if is_first_stage(self.groups) or place == len(self._passes):
            return None
        one = self._passes[place]
        length = one.length // self.strategy.tp if self._is_split(one) else one.length
        with _scope(one):
            hidden = torch.empty(
                length, len(one.rows), self.model.hidden_size, dtype=self._config.params_dtype, device=self._device
            )
            return _Incoming(hidden, distributed.irecv(hidden, self._neighbour(-1), group=self.groups.pp))

    def _is_split(self, one: Pass) -> bool:
        """Return whether the sequence of a pass is split over the tensor-parallel ranks."""
        return self.inference.sequence_parallel and one.phase == "prefill"

    def _take_tokens(self, run: _Run, last: int) -> None:
        """On the first stage, take the tokens of all passes up to the `last`, and note when they are on the host."""
        if not is_first_stage(self.groups):
            return
        for one in self._passes[run.num_taken : last + 1]:
            with _scope(one):
                tokens_B = self._rows(one)
                if self.strategy.pp > 1:
                    distributed.recv(tokens_B, self._neighbour(-1), group=self.groups.embd)
                tokens = tokens_B.tolist()
            now_ns = time.monotonic_ns() - run.start_ns
            for row, token in zip(one.rows, tokens, strict=True):
                run.tokens[row].append(token)
                run.times[row].append(now_ns)
            run.num_taken += 1

    def _neighbour(self, step: int) -> int:
        """Return the rank of the next (+1) or last (-1) stage; the first follows the last."""
        pp: Any = self.groups.pp
        return distributed.get_global_rank(pp, (pp.rank() + step) % pp.size())

    def _annotate(self) -> None:
        self._names.name_modules(self._chunk)
        self._names.name_buffers(self._chunk)
        self._names.name_parameters(self.shards())
        for name, tensor in self.cache.named_tensors():
            annotate.tensor(tensor, name, role="state")
        annotate.tensor(self._tokens_R, "next_tokens", role="state")
        model: Any = self._chunk
        # As the model calls it: it remembers what it returned.
        self._angles = model.rotary_pos_emb(self.cache.max_sequence_length, packed_seq=False, cp_group=None)
        annotate.tensor(self._angles, "rotary_pos_emb", role="state")
        for one, tokens in zip(self._passes, self._prompt_tokens, strict=False):
            first, end = self._prompts[one.rows.start], self._prompts[one.rows.stop - 1] + 1
            annotate.tensor(tokens, f"prompts[{first}:{end}]", role="input")


class _Incoming:
    """Hidden states that are on their way."""

    def __init__(self, hidden_SBH: Tensor, work: Any) -> None:
        self._hidden_SBH = hidden_SBH
        self._work = work

    def wait(self) -> Tensor:
        """Return the hidden states, [S, B, H], when they are there."""
        self._work.wait()
        return self._hidden_SBH


class _Outbox:
    """Messages that are on their way; their memory is kept until they have arrived."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._under_way: deque[tuple[Any, Tensor]] = deque()

    def send(self, tensor: Tensor, rank: int, group: Any) -> None:
        """Begin to send a tensor; where `limit` are under way, wait for the oldest first."""
        tensor = tensor.contiguous()
        self._under_way.append((distributed.isend(tensor, rank, group=group), tensor))
        while len(self._under_way) > self._limit:
            self._under_way.popleft()[0].wait()

    def drain(self) -> None:
        """Wait until all have arrived."""
        while self._under_way:
            self._under_way.popleft()[0].wait()


class _Run:
    """What happens to the rows of a rank in one run."""

    def __init__(self, num_rows: int, num_stages: int) -> None:
        self.start_ns = time.monotonic_ns()
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self.times: list[list[int]] = [[] for _ in range(num_rows)]
        self.logits: list[list[Tensor]] = [[] for _ in range(num_rows)]
        self.last_logits: dict[range, Tensor] = {}
        self.num_taken = 0
        # At most `num_stages` passes are under way, so this never waits for a stage that is behind.
        self.outbox = _Outbox(2 * num_stages)


def _scope(one: Pass) -> AbstractContextManager[None]:
    return annotate.scope(phase=one.phase, microbatch=one.microbatch, decode_step=one.decode_step)


def _choose(logits_BV: Tensor) -> Tensor:
    """Return the token with the largest logit of each row, int64 [B]; of equal ones the lowest, so all ranks agree."""
    return logits_BV.argmax(dim=-1)
