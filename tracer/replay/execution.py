"""Execute a program's steps, each in memory of its own, in any order that its edges allow.

What no edge brings is poison: in a floating-point tensor whatever `Poison` says, in any other zeros, since kernels
trust indices. A step that lacks bytes of an index, a mask or a counter is not run: it has failed, as has a step whose
producer has.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray

from truedag.tracer.replay.calling import Difference, Value, agrees, call_again
from truedag.tracer.replay.communications import MESSAGE, communicate
from truedag.tracer.replay.memory import Bytes, Mask, Ref, StorageKey, allocate, bytes_of, memory_of, window
from truedag.tracer.replay.program import Program, Step
from truedag.tracer.replay.supply import Supply

_FLOATING = ("float", "bfloat", "complex")
_FEW_RUNS = 8


class Poison(Enum):
    """What stands where no edge brings anything."""

    NAN = "nan"
    ZEROS = "zeros"
    NOISE = "noise"


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes that go from a producer into a step's memory: slices where they are few runs, else one index."""

    src: int
    runs: tuple[slice, ...]
    index: NDArray[np.int64] | None
    end: int  # after the last byte


@dataclass(frozen=True, slots=True)
class Memory:
    """A storage as a step has it."""

    key: StorageKey
    num_bytes: int
    address: int
    begin: int  # what its tensors span
    end: int
    is_floating: bool
    copies: tuple[Copy, ...]
    missing: Mask | None


@dataclass(slots=True)
class Outcome:
    """What became of an execution: steps whose results are not those recorded, and steps that could not be run."""

    different: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)

    @property
    def is_same(self) -> bool:
        """Whether every result of every step was bitwise what was recorded."""
        return not self.different and not self.failed


class Execution:
    """Executes a program; the copies that each step needs are worked out once.

    `unspecified` are results that an operator does not give again even where it finds what it found when recorded (a
    workspace with room between its numbers): by step. They are not compared.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._memories = {node: self._plan(step, step.supplies) for node, step in program.steps.items()}
        self._feeding = {
            node: {copy.src for memory in memories for copy in memory.copies}
            for node, memories in self._memories.items()
        }
        for node, step in program.steps.items():
            if step.message is not None:
                self._feeding[node].add(step.message)
        self._sources: dict[int, Value] = {
            node: {source.key: source.content} for node, source in program.sources.items()
        }
        self.unspecified = self._find_unspecified()

    def run(self, order: Iterable[int], *, keep: bool = False) -> tuple[Outcome, dict[int, Value]]:
        """Execute all steps in this order, in which every step comes after those that bring it bytes.

        Returns what became of it, and with `keep` what every node left.
        """
        outcome = Outcome()
        values: dict[int, Value | None] = dict(self._sources)
        with _own_randomness():
            for node in order:
                values[node] = self._step(node, self._memories[node], values, Poison.NAN, outcome)
        return outcome, {node: value for node, value in values.items() if value is not None} if keep else {}

    def run_without(
        self,
        node: int,
        supplies: Sequence[Supply],
        kept: Mapping[int, Value],
        later: Sequence[int],
        poison: Poison,
        *,
        no_message: bool = False,
    ) -> Outcome:
        """Execute a step with other supplies than it has, and all those after it that get anything else by that.

        Args:
            node: the step.
            supplies: what it is given instead.
            kept: what every node leaves when nothing is missing.
            later: the steps that come after it, in an order that the edges allow.
            poison: what stands where bytes are missing.
            no_message: whether the step, a receive, is sent nothing.
        """
        outcome = Outcome()
        values: dict[int, Value | None] = {}
        view = _Overlay(values, kept)
        changed = {node}
        with _own_randomness():
            for one in (node, *later):
                memories = self._plan(self._program.steps[one], supplies) if one == node else self._memories[one]
                if one != node and not changed & self._feeding[one]:
                    continue
                before = len(outcome.different) + len(outcome.failed)
                if one == node and no_message:
                    outcome.failed[node] = "nothing is sent to it"
                    values[node] = None
                    changed.add(node)
                    continue
                values[one] = self._step(one, memories, view, poison, outcome)
                if one not in outcome.different and self._differs(one, values[one], kept):
                    outcome.different.append(one)
                if len(outcome.different) + len(outcome.failed) > before:
                    changed.add(one)
                elif one == node:
                    break
                else:
                    del values[one]
        return outcome

    def _step(
        self,
        node: int,
        memories: Sequence[Memory],
        values: Mapping[int, Value | None],
        poison: Poison,
        outcome: Outcome,
    ) -> Value | None:
        step = self._program.steps[node]
        try:
            storages = {memory.key: self._fill(memory, values, poison) for memory in memories}
            value, differences = _execute(step, storages, _message(step, values))
        except _UnfilledError as error:
            outcome.failed[node] = str(error)
            return None
        except (
            RuntimeError,
            IndexError,
            ValueError,
            TypeError,
            KeyError,
        ) as error:  # what operators raise on wrong input
            outcome.failed[node] = f"{type(error).__name__}: {error}"
            return None
        if differences - self.unspecified.get(node, set()):
            outcome.different.append(node)
        return value

    def _differs(self, node: int, value: Value | None, kept: Mapping[int, Value]) -> bool:
        """Whether a communication left something else than it does when nothing is missing: few say what they left."""
        if value is None or not any(call.comm for call in self._program.steps[node].calls):
            return False
        masks = dict.fromkeys(value, slice(None)) | dict(self._program.writes(node))
        return any(not np.array_equal(value[key][masks[key]], kept[node][key][masks[key]]) for key in value)

    def _find_unspecified(self) -> dict[int, set[Difference]]:
        """Which results operators do not give again even in the memory that they had: nobody can hold them to those."""
        found: dict[int, set[Difference]] = {}
        with _own_randomness():
            for node, step in self._program.steps.items():
                if step.result is not None or step.calls[0].comm is not None:
                    continue
                storages = {memory.key: allocate(memory.num_bytes, memory.address) for memory in self._memories[node]}
                elements = [one for call in step.calls for one in call.before]
                for ref, found_then in zip(step.inputs, elements, strict=True):
                    if ref is not None and found_then is not None:
                        place = window(memory_of(storages[ref.key]), ref.layout, ref.offset)
                        place[...] = found_then.reshape(place.shape)
                _, differences = _execute(step, storages, None)
                if differences:
                    found[node] = differences
        for node, step in sorted(self._program.steps.items()):
            for one in step.supplies if len(step.calls) == 1 else ():
                # What it writes into such a result is as little specified as the rest of it.
                unspecified = any(one.need.key in self._keys(src, found.get(src, set())) for src in one.parts)
                if unspecified and one.need.number in step.calls[0].written:
                    found.setdefault(node, set()).add(("after", one.need.number))
        return found

    def _keys(self, node: int, differences: set[Difference]) -> set[StorageKey | None]:
        if not differences:
            return set()
        (call,) = self._program.steps[node].calls
        refs = {"after": call.inputs, "result": call.outputs}
        return {ref.key for kind, number in differences if kind in refs and (ref := refs[kind][number]) is not None}

    def _plan(self, step: Step, supplies: Sequence[Supply]) -> list[Memory]:
        """Put together which bytes go where."""
        by_key: dict[StorageKey, list[Ref]] = {}
        for ref in step.inputs:
            if ref is not None:
                by_key.setdefault(ref.key, []).append(ref)
        memories = []
        for key, refs in by_key.items():
            brought: dict[int, Mask] = {}
            missing: Mask | None = None
            for one in supplies:
                if one.need.key != key:
                    continue
                for src, mask in one.parts.items():
                    brought[src] = brought[src] | mask if src in brought else mask
                if not one.is_whole:
                    missing = one.missing if missing is None else missing | one.missing
            spans = [span for ref in refs if (span := _span(self._program, ref)) is not None]
            memories.append(
                Memory(
                    key=key,
                    num_bytes=max(ref.storage_bytes for ref in refs),
                    address=refs[0].address,
                    begin=min((span[0] for span in spans), default=0),
                    end=max((span[1] for span in spans), default=0),
                    is_floating=all(ref.layout.dtype.startswith(_FLOATING) for ref in refs),
                    copies=tuple(_copy(src, mask) for src, mask in brought.items()),
                    missing=missing,
                )
            )
        return memories

    def _fill(self, memory: Memory, values: Mapping[int, Value | None], poison: Poison) -> torch.UntypedStorage:
        if memory.missing is not None and not memory.is_floating:
            raise _UnfilledError(f"{int(memory.missing.sum())} bytes of a tensor of no floating-point type are missing")
        storage = allocate(memory.num_bytes, memory.address)
        array = memory_of(storage)
        _poison(array[memory.begin : memory.end], poison if memory.is_floating else Poison.ZEROS)
        for copy in memory.copies:
            value = values[copy.src]
            if value is None:
                raise _UnfilledError(f"node {copy.src}, which it reads, has failed")
            source = value.get(memory.key)
            if source is None or len(source) < copy.end:
                raise _UnfilledError(f"node {copy.src} did not leave what it reads")
            if copy.index is not None:
                array[copy.index] = source[copy.index]
            for run in copy.runs:
                array[run] = source[run]
        if memory.missing is not None:  # another argument that lies there may have brought it
            _poison_where(array, memory.missing, poison)
        return storage


class _UnfilledError(Exception):
    """A step cannot be run: what it would go by is not there."""


class _Overlay(Mapping[int, Value | None]):
    """Values that changed, before those that did not."""

    def __init__(self, changed: Mapping[int, Value | None], kept: Mapping[int, Value]) -> None:
        self._changed, self._kept = changed, kept

    def __getitem__(self, node: int) -> Value | None:
        return self._changed[node] if node in self._changed else self._kept[node]

    def __iter__(self) -> Iterator[int]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Leave the program's random state and number of threads as they were."""
    num_threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)


def _span(program: Program, ref: Ref) -> tuple[int, int] | None:
    places = np.flatnonzero(program.mask(ref))
    return (int(places[0]), int(places[-1]) + 1) if len(places) else None


def _copy(src: int, mask: Mask) -> Copy:
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    if len(edges) <= 2 * _FEW_RUNS:
        return Copy(src, tuple(slice(a, b) for a, b in edges.reshape(-1, 2).tolist()), None, int(edges[-1]))
    return Copy(src, (), np.flatnonzero(mask), int(edges[-1]))


def _poison(array: Bytes, poison: Poison) -> None:
    if poison is Poison.NOISE:
        array[...] = np.frombuffer(random.Random(len(array)).randbytes(len(array)), np.uint8)  # noqa: S311
    else:
        array[...] = 0xFF if poison is Poison.NAN else 0


def _poison_where(array: Bytes, mask: Mask, poison: Poison) -> None:
    block = np.empty(int(mask[: len(array)].sum()), np.uint8)
    _poison(block, poison)
    array[mask[: len(array)]] = block


def _message(step: Step, values: Mapping[int, Value | None]) -> Bytes | None:
    """What a receive is sent; None: the step is none, or nothing was."""
    if step.message is None:
        return None
    value = values[step.message]
    if value is None:
        raise _UnfilledError(f"node {step.message}, whose message it receives, has failed")
    return value[MESSAGE]


def _execute(
    step: Step, storages: Mapping[StorageKey, torch.UntypedStorage], message: Bytes | None
) -> tuple[Value, set[Difference]]:
    """Run a step in its memory; return what it left, and what of it is not as recorded."""
    if step.result is not None:
        ref = step.result.ref
        is_same = agrees(bytes_of(storages[ref.key]), ref, step.result.elements)
        return {}, set() if is_same else {("result", 0)}
    if step.calls[0].comm is not None:
        return communicate(step.calls, storages, message)
    (call,) = step.calls
    return call_again(call, storages)
