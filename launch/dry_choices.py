"""Which of a class's ranks a dry run executes where the routing makes them differ, and what it knows of the others.

Theory of operation. Ranks of a class that have the same numbers of tokens have the same sizes: a choice. A few choices
are executed, and the sizes of the others are derived from their numbers (`tracer/dry/derived_sizes.py`), if this can be
trusted. So

- each number that differs from choice to choice differs between executed ones too;
- the last two that were executed are held out: what the others say of them must be what they have, to the byte;
- a choice of which the forms that fit say different things is executed, and decides between them;
- a number of 0 or 1 may change the program, as an expert without tokens does. It is trusted where an executed rank of
  the same program has such a number of the same role, and to have none where one has none; where such ranks ran another
  program, all of them are executed.

If that leads to nothing, all choices are executed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from truedag.parallel.token_numbers import ROLES, TokenNumbers
from truedag.tracer.dry.derived_sizes import Derivation, Sample
from truedag.tracer.dry.forms import Bools
from truedag.tracer.dry.sizes import Names, Sizes

_FEWEST = 3  # executed at first, and two that are held out
_MOST_AT_ONCE = 8
_SPECIAL = 2  # numbers below it


class Choices:
    """Choices of one class that branch in the same way."""

    def __init__(self, ranks: Sequence[int], told: TokenNumbers, rows: Sequence[int]) -> None:
        """Say which they are.

        Args:
            ranks: the first of each choice, ascending.
            told: what ranks of the class hear.
            rows: theirs in it.
        """
        self.ranks = list(ranks)
        self._values = told.values[list(rows)]
        self._varies = (self._values != self._values[:1]).any(axis=0)
        few = (self._values < _SPECIAL) & self._varies  # what all have of an expert that gets none says nothing
        # [choices, roles and values] whether it has such a number; then whether it has none.
        has = np.stack(
            [
                ((self._values == value) & few & (told.roles == role)).any(axis=1)
                for role in range(len(ROLES))
                for value in range(_SPECIAL)
            ],
            axis=1,
        )
        self._special = np.concatenate([has, ~has], axis=1)
        self._random = random.Random(len(self.ranks))  # noqa: S311 - which ranks are looked at is no secret
        self._wanted: list[int] = []
        self._executed: list[int] = []
        self._samples: dict[int, Sample] = {}
        self.derivation: Derivation | None = None
        """Of the ranks of `derived`."""
        self.derived: dict[int, int] = {}
        """By rank: its place in the derivation."""
        self.program = ""
        """Of those that are derived, and those that they are derived from."""
        self.problem = ""
        """Why all are executed; '': they are not."""
        self.is_settled = False

    def choose(self, programs: Mapping[int, str], trace_of: Callable[[int], Path]) -> list[int]:
        """Return which ranks are to be executed next; none: all is known.

        Args:
            programs: of executed ranks.
            trace_of: their traces.
        """
        known = [place for place in dict.fromkeys([0, *self._wanted]) if self.ranks[place] in programs]
        self._executed += [place for place in known if place not in self._executed]
        rest = [place for place in range(len(self.ranks)) if place not in self._executed]
        if len(self._executed) < _FEWEST + 2:
            wanted = self._cover()
        elif self.problem or not rest:
            wanted = rest
        else:
            wanted = self._look(programs, trace_of, rest)
        if wanted and 2 * (len(self._executed) + len(wanted)) > len(self.ranks) + _FEWEST:
            wanted = rest  # little would be left to derive
        if wanted:
            self.derivation, self.derived = None, {}
        self.is_settled = not wanted
        self._wanted = wanted
        if self.is_settled:
            self._samples.clear()  # they are large
        return [self.ranks[place] for place in wanted]

    def _shuffled(self, places: Sequence[int]) -> list[int]:
        return self._random.sample(places, len(places))

    def _cover(self) -> list[int]:
        """Return choices between which every number differs that differs at all, and two more."""
        chosen = self._executed or [0]
        rest = self._shuffled([place for place in range(len(self.ranks)) if place not in chosen])
        while rest:
            same = self._varies & (self._values[chosen] == self._values[chosen[0]]).all(axis=0)
            if len(chosen) >= _FEWEST and not same.any():
                break
            gain = (self._values[rest][:, same] != self._values[chosen[0], same]).sum(axis=1)
            chosen = [*chosen, rest.pop(int(gain.argmax()))]
        return [place for place in [*chosen, *rest[:2]] if place not in self._executed]

    def _look(self, programs: Mapping[int, str], trace_of: Callable[[int], Path], rest: list[int]) -> list[int]:
        """Return which of the rest have to be executed, the derivation of all the others made."""
        self.program, _ = Counter(programs[self.ranks[place]] for place in self._executed).most_common(1)[0]
        alike = [place for place in self._executed if programs[self.ranks[place]] == self.program]
        trusted = np.any(self._special[alike], axis=0)
        is_other = {place: bool((self._special[place] & ~trusted).any()) for place in rest}
        num = len(trusted) // 2
        if any(not (self._special[place] & ~trusted)[:num].any() for place in self._executed if place not in alike):
            self.problem = "what gets no token, or one, makes their programs differ from rank to rank"
            return rest
        feared: Bools = self._special[[place for place in self._executed if place not in alike]].any(axis=0) & ~trusted
        wanted = [place for place in rest if (self._special[place] & feared).any()]
        asked = [place for place in rest if not is_other[place]]
        wanted += self._probe([place for place in rest if is_other[place] and place not in wanted], trusted | feared)
        if len(alike) < _FEWEST + 2:
            return wanted or rest[:_MOST_AT_ONCE]
        return [*wanted, *self._derive(alike, asked, trace_of)] if asked else wanted

    def _probe(self, others: Sequence[int], seen: Bools) -> list[int]:
        """Return choices that show what a special number does which no executed one has."""
        found: list[int] = []
        for place in others:
            if (self._special[place] & ~seen).any():
                found.append(place)
                seen = seen | self._special[place]
        return found

    def _derive(self, alike: Sequence[int], asked: Sequence[int], trace_of: Callable[[int], Path]) -> list[int]:
        """Derive some choices; return which of them are not known, or what may tell more."""
        for place in alike:
            if place not in self._samples:
                self._samples[place] = Sample.read(trace_of(self.ranks[place]), self._values[place])
        samples = [self._samples[place] for place in alike]
        derivation = Derivation(samples, self._values[asked])
        if derivation.problem:
            self.problem = derivation.problem
            return list(asked)
        if not self._foretells(samples[:-2], alike[-2:]):
            return self._shuffled(asked)[:_MOST_AT_ONCE]
        unknown = [place for place, is_known in zip(asked, derivation.is_known.tolist(), strict=True) if not is_known]
        self.derivation, self.derived = derivation, {self.ranks[place]: at for at, place in enumerate(asked)}
        return self._shuffled(unknown)[:_MOST_AT_ONCE]

    def _foretells(self, samples: Sequence[Sample], held: Sequence[int]) -> bool:
        """Whether samples alone say of executed choices what these have."""
        derivation = Derivation(samples, self._values[list(held)])
        if derivation.problem or not derivation.is_known.all():
            return False
        names = Names()
        base = Sizes.of(samples[0].part, names)
        return all(
            derivation.sizes(at, base, names).same_as(Sizes.of(self._samples[place].part, names))
            for at, place in enumerate(held)
        )
