"""Which experts the tokens of every rank go to: a function that all ranks of a world agree on without a word.

Theory of operation: a forward pass of a layer on a rank sends each of the rank's T tokens to K of the layer's E
experts. Which they are is a function of (seed, layer, pass, source) alone, where the source is the rank whose tokens
they are; so a rank knows what every other rank sends it, and what i sends to j is what j receives from i. Passes of a
layer are counted from 0 in each iteration: a training step's microbatches; an inference's prefills, then its decode
steps. No torch.

A routing that was recorded knows how many tokens each expert got, not which: tokens are dealt so that the numbers hold.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from truedag.parallel.errors import RoutingError

Kind = Literal["balanced", "uniform", "zipf", "recorded"]
Experts = NDArray[np.int64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One forward pass of one layer's router on one rank."""

    layer: int
    """0-based, in the whole model."""

    number: int
    """Of the pass, in its iteration."""

    source: int
    """The rank whose tokens they are; ranks that route the same tokens have the same."""

    num_tokens: int
    """How many there are."""


class Routing(Protocol):
    """Where tokens go."""

    def experts(self, place: Place, *, num_experts: int, top_k: int) -> Experts:
        """Return the experts of each token, [T, K]; a token's are different ones."""

    def counts(self, place: Place, *, num_experts: int, top_k: int) -> Counts:
        """Return how many of the tokens go to each expert, [E]."""

    def is_even(self, num_tokens: int, *, num_experts: int, top_k: int) -> bool:
        """Return whether it is known that every source of so many tokens sends each expert as many."""

    def describe(self) -> dict[str, Any]:
        """Return what the graph's `meta.json` says of it."""


@dataclass(frozen=True, slots=True)
class Balanced:
    """All experts get equally many tokens, as far as the number of tokens allows."""

    def experts(self, place: Place, *, num_experts: int, top_k: int) -> Experts:
        """Deal the experts out in turn, beginning where the source before would have ended."""
        slots = np.arange(place.num_tokens * top_k) + place.source * place.num_tokens * top_k
        return (slots % num_experts).reshape(place.num_tokens, top_k)

    def counts(self, place: Place, *, num_experts: int, top_k: int) -> Counts:
        """Return the counts, [E]."""
        return _deal(place.num_tokens * top_k, place.source * place.num_tokens * top_k % num_experts, num_experts)

    def is_even(self, num_tokens: int, *, num_experts: int, top_k: int) -> bool:
        """Return whether none is left over when all are dealt out."""
        return num_tokens * top_k % num_experts == 0

    def describe(self) -> dict[str, Any]:
        """Return its kind."""
        return {"kind": "balanced"}


@functools.lru_cache(maxsize=4096)
def _deal(num_slots: int, first: int, num_experts: int) -> Counts:
    counts = np.bincount((np.arange(num_slots) + first) % num_experts, minlength=num_experts)
    counts.setflags(write=False)
    return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Each token draws its experts at random, without putting them back; `alpha` 0: all are as likely.

    Otherwise the experts' probabilities follow Zipf's law, 1 / n**alpha for the n-th most popular; which that is, is
    drawn for each layer.

    Source: the largest K of log-weights plus Gumbel noise are K draws without replacement (Kool et al. 2019, sec. 2).
    """

    alpha: float = 0.0
    seed: int = 0

    def experts(self, place: Place, *, num_experts: int, top_k: int) -> Experts:
        """Draw them, by a generator of this place alone."""
        key = [self.seed << 32 | place.layer, place.number << 32 | place.source]
        generator = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))
        # The order of exponential variables divided by weights is that of the weights' Gumbel keys.
        waits = generator.standard_exponential((place.num_tokens, num_experts), dtype=np.float32)
        if self.alpha:
            waits /= self._weights(place.layer, num_experts)
        if top_k == num_experts:
            return np.tile(np.arange(num_experts), (place.num_tokens, 1))
        chosen: Experts = np.argpartition(waits, top_k, axis=1)[:, :top_k]
        return chosen

    def counts(self, place: Place, *, num_experts: int, top_k: int) -> Counts:
        """Return the counts, [E], of what `experts` draws."""
        return np.bincount(self.experts(place, num_experts=num_experts, top_k=top_k).ravel(), minlength=num_experts)

    def _weights(self, layer: int, num_experts: int) -> NDArray[np.float32]:
        order = np.random.default_rng([self.seed, layer]).permutation(num_experts)
        weights: NDArray[np.float32] = ((order + 1.0) ** -self.alpha).astype(np.float32)
        return weights

    def is_even(self, num_tokens: int, *, num_experts: int, top_k: int) -> bool:
        """Return whether all experts are taken, so that nothing is drawn."""
        del num_tokens
        return top_k == num_experts

    def describe(self) -> dict[str, Any]:
        """Return its kind and what it is drawn by."""
        if not self.alpha:
            return {"kind": "uniform", "seed": self.seed}
        return {"kind": "zipf", "alpha": self.alpha, "seed": self.seed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What a real run did: how many tokens each expert got, by layer, pass and rank."""

    path: Path
    """Where it was read from."""

    tokens: Mapping[tuple[int, int, int], Counts] = field(repr=False)
    """By (layer, pass, rank): [E]."""

    def experts(self, place: Place, *, num_experts: int, top_k: int) -> Experts:
        """Deal tokens to the experts so that each gets its number; no token gets an expert twice."""
        slots = np.repeat(np.arange(num_experts), self.counts(place, num_experts=num_experts, top_k=top_k))
        # One expert's slots follow each other and are at most T: modulo T they are different tokens.
        return slots.reshape(top_k, place.num_tokens).T

    def counts(self, place: Place, *, num_experts: int, top_k: int) -> Counts:
        """Return the counts, [E].

        Raises:
            RoutingError: the recorded run had no such pass, or another number of tokens or experts.
        """
        counts = self.tokens.get((place.layer, place.number, place.source))
        if counts is None:
            raise RoutingError(
                f"{self.path} says nothing of layer {place.layer}, pass {place.number}, rank {place.source}: "
                "take the routing of a run of the same deployment"
            )
        if len(counts) != num_experts or int(counts.sum()) != place.num_tokens * top_k:
            raise RoutingError(
                f"{self.path}: layer {place.layer}, pass {place.number}, rank {place.source} sent {int(counts.sum())} "
                f"tokens to {len(counts)} experts; here {place.num_tokens} tokens go to {top_k} of {num_experts} "
                "experts each: take the routing of a run of the same deployment"
            )
        return counts

    def is_even(self, num_tokens: int, *, num_experts: int, top_k: int) -> bool:
        """Return that it is not known."""
        del num_tokens, num_experts, top_k
        return False

    def describe(self) -> dict[str, Any]:
        """Return its kind and where it is from."""
        return {"kind": "recorded", "path": str(self.path)}


def parse_routing(text: str, *, seed: int = 0) -> Routing:
    """Return the routing that a text states: balanced, uniform, zipf:ALPHA, or the path of a recorded one.

    Raises:
        RoutingError: it is none of these.
    """
    if text == "balanced":
        return Balanced()
    if text == "uniform":
        return Drawn(seed=seed)
    kind, _, rest = text.partition(":")
    if kind == "zipf":
        try:
            alpha = float(rest)
        except ValueError:
            alpha = 0.0
        if not 0 < alpha < 100:
            raise RoutingError(f"routing {text!r}: zipf takes a positive exponent, for example zipf:1.2")
        return Drawn(alpha=alpha, seed=seed)
    if not Path(text).exists():
        raise RoutingError(f"routing {text!r} is none of balanced, uniform, zipf:ALPHA, and there is no such file")
    return read_routing(Path(text))


_FORMAT = "truedag_routing"


def write_routing(path: Path, tokens: Mapping[tuple[int, int, int], Counts]) -> None:
    """Write how many tokens each expert got, by (layer, pass, rank), as one line of JSON each below a header."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({_FORMAT: 1, "columns": ["layer", "pass", "rank", "tokens"]}) + "\n")
        for (layer, number, rank), counts in sorted(tokens.items()):
            file.write(json.dumps([layer, number, rank, counts.tolist()]) + "\n")


def read_routing(path: Path) -> Recorded:
    """Read what `write_routing` wrote: a file, or a folder of one file from each rank.

    Raises:
        RoutingError: it cannot be read, or is none.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    tokens: dict[tuple[int, int, int], Counts] = {}
    try:
        for file in files:
            header, *lines = file.read_text(encoding="utf-8").splitlines()
            if json.loads(header).get(_FORMAT) != 1:
                raise RoutingError(f"{file} is no routing that this version of truedag reads (it begins {header[:60]})")
            for line in lines:
                layer, number, rank, counts = json.loads(line)
                tokens[layer, number, rank] = np.array(counts, np.int64)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RoutingError(f"{path} cannot be read as a recorded routing: {error}") from error
    if not tokens:
        raise RoutingError(f"{path} holds no recorded routing")
    return Recorded(path=path, tokens=tokens)
