"""Lays a routing over a model's routers, or writes down the one that they choose.

Theory of operation: megatron-core's router hands the choice of experts to an object for replays, where it has one. Ours
lets the router choose as ever, so that the same operators run, and then writes other experts and their scores into the
results' memory, which no operator sees. Gradients go to the scores that were written, for the backward pass asks the
same memory. Where a tensor has no memory nothing is written: the device adapter asks `counts_of` what the router would
have found.

A pass that is computed again in the backward pass is routed as it was before: the first time ran without gradients, and
what is computed again comes in the same order.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from truedag.parallel.errors import RoutingError
from truedag.parallel.routing import Counts, Place, Recorded, Routing
from truedag.parallel.strategy import Strategy
from truedag.parallel.token_numbers import Exchange, NumbersOfRanks


class TokenShare(Protocol):
    """Which tokens a rank routes in a pass."""

    def __call__(self, rank: int, number: int) -> tuple[int, int]:
        """Return the rank whose tokens they are, and how many."""


class RoutedLayer:
    """What one layer's router of this rank does; megatron-core's `router_replay`."""

    def __init__(self, layer: int, router: Any, routing: Routing | None, share: TokenShare, rank: int) -> None:
        self.layer = layer
        self.seen: dict[int, Counts] = {}
        """By pass: the tokens that each expert got, where nothing was laid over the router."""
        self._router = router
        self._routing = routing
        self._share = share
        self._rank = rank
        self._next = 0
        self._again: deque[int] = deque()
        self._counts: dict[tuple[int, int], Counts] = {}
        self.number = -1
        """The pass that the router chose for last."""

    def begin(self) -> None:
        """Say that an iteration begins."""
        self._next = 0
        self._again.clear()
        self.seen.clear()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        compute: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return the scores of the chosen experts and which they are, [T, K] each; called by megatron-core's router.

        Raises:
            RoutingError: the experts are in groups, of which a token chooses some: only a recorded routing keeps to it.
        """
        if group_topk and not isinstance(self._routing, Recorded | None):
            raise RoutingError(
                "the model's tokens choose among groups of experts (num_expert_groups), which no drawn routing knows: "
                "take one that was recorded from a real run"
            )
        values, indices = compute(scores, topk, num_groups=num_groups, group_topk=group_topk)
        self.number = self._count_pass()
        if scores.device.type != "meta":
            self._lay_over(scores, values, indices)
        return values, indices

    @property
    def num_passes(self) -> int:
        """How many passes there were since the iteration began."""
        return self._next

    def counts_of(self, rank: int) -> Counts:
        """Return how many tokens of the current pass another rank sends to each expert, [E]: those that it drops not.

        Raises:
            RoutingError: no routing was given.
        """
        return self.counts_in(self.number, rank)

    def counts_in(self, number: int, rank: int) -> Counts:
        """Return what `counts_of` does, of any pass."""
        if self._routing is None:
            raise RoutingError("the experts of tensors without memory cannot be chosen by their values: give a routing")
        config = self._router.config
        source, num_tokens = self._share(rank, number)
        known = self._counts.get((number, source))
        if known is None:
            place = Place(layer=self.layer, number=number, source=source, num_tokens=num_tokens)
            known = self._routing.counts(place, num_experts=config.num_moe_experts, top_k=self._router.topk)
            if (factor := config.moe_expert_capacity_factor) is not None:
                slots = num_tokens * self._router.topk
                known = np.minimum(known, math.ceil(slots / config.num_moe_experts * factor))
            self._counts[number, source] = known
        return known

    def is_even(self, number: int, ranks: Sequence[int]) -> bool:
        """Return whether each of some ranks sends each expert as many tokens of a pass as any other does."""
        if self._routing is None:
            return False
        num_tokens = {self._share(rank, number)[1] for rank in ranks}
        return len(num_tokens) == 1 and self._routing.is_even(
            num_tokens.pop(), num_experts=self._router.config.num_moe_experts, top_k=self._router.topk
        )

    def _count_pass(self) -> int:
        if self._again and torch.is_grad_enabled():
            return self._again.popleft()
        number, self._next = self._next, self._next + 1
        if self._router.training and not torch.is_grad_enabled():
            self._again.append(number)
        return number

    def _lay_over(self, scores: Tensor, values: Tensor, indices: Tensor) -> None:
        num_tokens, num_experts = scores.shape
        chosen = indices.detach().cpu().numpy()
        if self._routing is None:
            self.seen.setdefault(self.number, np.bincount(chosen.ravel(), minlength=num_experts))
            return
        source, expected = self._share(self._rank, self.number)
        assert num_tokens == expected, f"layer {self.layer} routes {num_tokens} tokens, {expected} were expected"
        place = Place(layer=self.layer, number=self.number, source=source, num_tokens=num_tokens)
        wanted = self._routing.experts(place, num_experts=num_experts, top_k=chosen.shape[1])
        if scores.device.type != "cpu":
            raise RoutingError(f"a routing can be laid over routers on the CPU only, these are on {scores.device}")
        chosen[...] = wanted
        values.detach().numpy()[...] = np.take_along_axis(scores.detach().numpy(), wanted, axis=1)


class RouterWatch:
    """All routers of this rank's chunks. Local."""

    def __init__(self, chunks: Sequence[nn.Module], *, routing: Routing | None, share: TokenShare, rank: int) -> None:
        self.layers: list[RoutedLayer] = []
        chunk: Any
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                if (router := getattr(layer.mlp, "router", None)) is None:
                    continue
                routed = RoutedLayer(layer.layer_number - 1, router, routing, share, rank)
                router.router_replay = layer.mlp.token_dispatcher.routed = routed
                self.layers.append(routed)
        self._rank = rank

    def begin(self) -> None:
        """Say that an iteration begins: a training step, or a generation."""
        for layer in self.layers:
            layer.begin()

    def tokens(self) -> dict[tuple[int, int, int], Counts]:
        """Return what the routers of this rank chose in the iteration, by (layer, pass, rank): tokens by expert."""
        return {
            (layer.layer, number, self._rank): counts for layer in self.layers for number, counts in layer.seen.items()
        }

    def hear(self, strategy: Strategy, ranks: Sequence[int], *, moves_part_by_part: bool) -> NumbersOfRanks:
        """Return what ranks hear of the routing in the iteration; of passes that are the same to all of them, nothing.

        Args:
            strategy: the world's.
            ranks: ascending, of this rank's stage, with the passes that this rank had.
            moves_part_by_part: whether uneven parts of a group are moved one by one.
        """
        heard = NumbersOfRanks(ranks, moves_part_by_part=moves_part_by_part)
        size = strategy.ep * strategy.etp
        exchange_of = heard.ranks // size
        places = {one: np.flatnonzero(exchange_of == one) for one in np.unique(exchange_of).tolist()}
        members = {one: range(one * size, (one + 1) * size) for one in places}
        everyone = [rank for ranks_of_one in members.values() for rank in ranks_of_one]
        is_even: dict[int, bool] = {}
        for layer in self.layers:
            for number in range(layer.num_passes):
                # All layers of a model with experts have equally many.
                if number not in is_even:
                    is_even[number] = layer.is_even(number, everyone)
                if is_even[number]:
                    continue
                heard.begin_pass()
                for one, own in places.items():
                    counts = np.stack([layer.counts_in(number, rank) for rank in members[one]])
                    heard.hear(Exchange(counts=counts, ep=strategy.ep, etp=strategy.etp), one * size, own)
        return heard
