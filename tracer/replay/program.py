"""A graph with the calls of its nodes: what each node is given by its in-edges, and nothing else.

Theory of operation. Values flow along edges: a node works in memory of its own, into which the bytes are copied that
its in-edges bring (`supply`), from what their producers wrote. Bytes that no edge brings are not there. So nothing is
shared, a node that overwrites memory makes a new value of it, and the order in which independent nodes run does not
matter: what a shared memory would have to keep apart (writing after others have read) is apart.

From the graph come the nodes, and who feeds whom with how many bytes of which type. From the recording of a node's own
call comes what is local to it: its operator, its arguments, and where its tensors lay in their storages.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from truedag.tracer.errors import ReplayError
from truedag.tracer.graph import Graph
from truedag.tracer.record.trace_folder import find_traces
from truedag.tracer.replay.calls import Call, NamedValue, RankRecording
from truedag.tracer.replay.memory import Mask, Ref, StorageKey
from truedag.tracer.replay.sources import Masks, Source, find_sources, learn_from
from truedag.tracer.replay.supply import Edge, Need, Supply, supply
from truedag.tracer.replay.tying import tie_calls, tie_outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A node to execute: a call of each participant, or the named result that it is.

    `inputs` are the tensors that go in, of all calls one after the other.
    """

    node: int
    calls: tuple[Call, ...] = ()
    result: NamedValue | None = None
    inputs: tuple[Ref | None, ...]
    edges: tuple[Edge, ...]
    supplies: tuple[Supply, ...] = ()
    message: int | None = None  # of a receive, the node that sends what it receives

    @property
    def title(self) -> str:
        """What the node is, for a message."""
        if self.result is not None:
            return f"node {self.node} (output {self.result.name})"
        return f"node {self.node} ({self.calls[0].op} on rank {', '.join(str(call.rank) for call in self.calls)})"


class Program:
    """All of a graph that is needed to execute it, `steps` and `sources` by node."""

    def __init__(self, graph: Graph, traces: Path) -> None:
        """Read it.

        Args:
            graph: merged from the traces.
            traces: the folder of the traces, recorded with their arguments.

        Raises:
            ReplayError: the arguments were not recorded, or the edges of a node do not say what it is given.
        """
        recordings = {one.rank: one for one in map(RankRecording, find_traces(traces))}
        nodes = graph.nodes.collect()
        calls = tie_calls(graph, nodes, recordings)
        named = [value for recording in recordings.values() for value in recording.named_values()]
        refs = [ref for mine in calls.values() for call in mine for ref in (*call.inputs, *call.outputs, *call.scratch)]
        sizes: dict[StorageKey, int] = {}
        for ref in (*refs, *(value.ref for value in named)):
            if ref is not None:
                sizes[ref.key] = max(ref.storage_bytes, sizes.get(ref.key, 0))
        self._masks = Masks(sizes)
        self._written: dict[tuple[int, StorageKey], Mask] = {}
        self._writes_of: dict[int, list[tuple[StorageKey, Mask]]] = {}
        edges = graph.edges.collect().with_row_index("row")
        self.edges = edges.filter(pl.col("kind") != "order")
        self.num_order_edges = len(edges) - len(self.edges)
        self._into: dict[int, list[Edge]] = {}
        self._messages: dict[int, int] = {}
        columns = ("row", "kind", "src", "dst", "bytes", "dtype", "shape")
        for row, kind, src, dst, count, dtype, shape in self.edges.select(columns).rows():
            if kind == "p2p":
                self._messages[dst] = src
            elif count:
                edge = Edge(row=row, src=src, num_bytes=count, type=(dtype, tuple(shape)))
                self._into.setdefault(dst, []).append(edge)
        self.steps: dict[int, Step] = {}
        self.sources: dict[int, Source] = {}
        self._add_calls(calls)
        results = tie_outputs(nodes, named)
        needs = {node: self._needs(step) for node, step in self.steps.items()}
        readers = [(needs[node], self._into.get(node, [])) for node in needs]
        readers += [
            ([self._result_need(one) for one in some], self._into.get(node, [])) for node, some in results.items()
        ]
        self.sources = find_sources(nodes, named, readers, self.written, self._masks)
        for node, step in self.steps.items():
            self.steps[node] = self._supplied(step, needs[node])
        self._add_results(results)
        self._check_sources()
        for _, step in sorted(self.steps.items()):
            learn_from(self.sources, step.supplies, dict(_found(step)))

    def written(self, node: int, key: StorageKey) -> Mask | None:
        """Return which bytes of a storage a node wrote; None: nothing of it."""
        source = self.sources.get(node)
        if source is not None:
            return source.mask if source.key == key else None
        return self._written.get((node, key))

    @cached_property
    def feeds(self) -> list[tuple[int, int]]:
        """The pairs of nodes between which some edge carries bytes."""
        pairs = self.edges.filter(pl.col("bytes") > 0).select("src", "dst").unique().sort("src", "dst")
        return [(src, dst) for src, dst in pairs.rows()]

    def edge(self, row: int) -> tuple[int, int, int]:
        """Return where an edge begins and ends, and its bytes, by its row among the graph's edges."""
        src, dst, num_bytes = self._edge_of[row]
        return src, dst, num_bytes

    def is_message(self, row: int) -> bool:
        """Whether an edge is a message's, by its row."""
        return row in self._message_rows

    @cached_property
    def _message_rows(self) -> frozenset[int]:
        return frozenset(self.edges.filter(pl.col("kind") == "p2p")["row"].to_list())

    def later(self, node: int) -> Sequence[int]:
        """Return the steps after a node, in an order that the edges allow: that of their numbers."""
        return self._numbers[bisect_right(self._numbers, node) :]

    @cached_property
    def _numbers(self) -> list[int]:
        return sorted(self.steps)

    @cached_property
    def _edge_of(self) -> dict[int, tuple[int, int, int]]:
        rows = self.edges.select("row", "src", "dst", "bytes").rows()
        return {row: (src, dst, num_bytes) for row, src, dst, num_bytes in rows}

    def writes(self, node: int) -> list[tuple[StorageKey, Mask]]:
        """Return what a step wrote: of which storages, which bytes."""
        return self._writes_of.get(node, [])

    def unfed(self) -> Counter[str]:
        """Count the arguments that no edge brings anything, by operator: their content does not matter."""
        found: Counter[str] = Counter()
        for step in self.steps.values():
            fed = {one.need.number for one in step.supplies}
            inputs = enumerate(step.inputs)
            count = sum(ref is not None and ref.layout.num_bytes > 0 and i not in fed for i, ref in inputs)
            if count:
                found[step.calls[0].op] += count
        return found

    def unsaid(self) -> Counter[str]:
        """Count the arguments that changed although their operator does not say that it writes them, by operator."""
        calls = [call for step in self.steps.values() for call in step.calls]
        return Counter(call.op for call in calls for _ in call.written - call.declared)

    def mask(self, ref: Ref) -> Mask:
        """Return which bytes of its storage a tensor has."""
        return self._masks.of(ref)

    def _add_calls(self, calls: dict[int, tuple[Call, ...]]) -> None:
        for node, mine in calls.items():
            inputs = tuple(ref for call in mine for ref in call.inputs)
            self.steps[node] = Step(
                node=node,
                calls=mine,
                inputs=inputs,
                edges=tuple(self._into.get(node, ())),
                message=self._messages.get(node),
            )
            for call in mine:
                for key, mask in self._writes(call):
                    self._writes_of.setdefault(node, []).append((key, mask))
                    before = self._written.get((node, key))
                    self._written[node, key] = mask if before is None else before | mask

    def _writes(self, call: Call) -> Iterator[tuple[StorageKey, Mask]]:
        """Which bytes of which storage a call writes; a new storage as a whole."""
        written = {ref.key for number in call.written if (ref := call.inputs[number]) is not None}
        given = {ref.key for ref in call.inputs if ref is not None}
        for number in call.written:
            ref = call.inputs[number]
            if ref is not None:
                yield ref.key, self._masks.of(ref)
        for ref in (*call.outputs, *call.scratch):
            if ref is not None and ref.key in written:  # its argument, which may have been resized to hold it
                yield ref.key, self._masks.of(ref)
            elif ref is not None and ref.key not in given:
                yield ref.key, self._masks.whole(ref.key)

    def _needs(self, step: Step) -> list[Need]:
        needs: list[Need] = []
        number = 0
        for call in step.calls:
            for place, ref in enumerate(call.inputs):
                if ref is not None and ref.layout.num_bytes:
                    needs.append(self._need(number, ref, is_written=place in call.declared))
                number += 1
        return needs

    def _need(self, number: int, ref: Ref, *, is_written: bool) -> Need:
        kind = (ref.layout.dtype, ref.layout.sizes)
        return Need(number=number, key=ref.key, mask=self._masks.of(ref), type=kind, is_written=is_written)

    def _result_need(self, value: NamedValue) -> Need:
        return self._need(0, value.ref, is_written=False)

    def _supplied(self, step: Step, needs: Sequence[Need]) -> Step:
        supplies = supply(needs, step.edges, self.written)
        if supplies is None:
            raise ReplayError(
                f"the edges into {step.title} do not say what it is given: {_describe(step.edges)}; "
                f"it takes {_describe_needs(needs)}"
            )
        owners: dict[StorageKey, dict[int, Mask]] = {}
        for one in supplies:
            for src, mask in one.parts.items():
                for other, theirs in owners.setdefault(one.need.key, {}).items():
                    if other != src and bool((theirs & mask).any()):
                        raise ReplayError(f"nodes {other} and {src} both give {step.title} the same bytes")
                before = owners[one.need.key].get(src)
                owners[one.need.key][src] = mask if before is None else before | mask
        return replace(step, supplies=tuple(supplies))

    def _check_sources(self) -> None:
        """Refuse a graph that has from outside what one of its own nodes had written: there an edge is missing.

        The order is that of the nodes' numbers: they were numbered by time as far as the edges allowed it.
        """
        writers: dict[StorageKey, list[tuple[int, Mask]]] = {}
        for node, step in sorted(self.steps.items()):
            for one in step.supplies:
                for src, mask in one.parts.items():
                    for writer, made in reversed(writers.get(one.need.key, [])) if src in self.sources else ():
                        if bool((made & mask).any()):
                            raise ReplayError(
                                f"{step.title} is given what was there before the recording (node {src}), "
                                f"and {self.steps[writer].title} had written it: an edge is missing"
                            )
            for call in step.calls:
                if not call.is_contentless:
                    for key, mask in self._writes(call):
                        writers.setdefault(key, []).append((node, mask))

    def _add_results(self, results: dict[int, list[NamedValue]]) -> None:
        """Tell which of the values of a name each output is: they come in the same order, and its edges must fit."""
        used: set[int] = set()
        for node, candidates in sorted(results.items()):
            edges = tuple(self._into.get(node, ()))
            for value in candidates:
                if id(value) in used:
                    continue
                supplies = supply([self._result_need(value)], edges, self.written)
                if supplies:
                    used.add(id(value))
                    self.steps[node] = Step(
                        node=node, result=value, inputs=(value.ref,), edges=edges, supplies=tuple(supplies)
                    )
                    break
            else:
                raise ReplayError(f"the edges into node {node}, an output, do not say what it is: {_describe(edges)}")


def _found(step: Step) -> Iterator[tuple[int, tuple[Ref, np.ndarray]]]:
    """What a step found in its tensors when it was recorded, by their numbers."""
    elements = [one for call in step.calls for one in call.before]
    elements = [step.result.elements] if step.result is not None else elements
    for number, (ref, one) in enumerate(zip(step.inputs, elements, strict=True)):
        if ref is not None and one is not None:
            yield number, (ref, one)


def _describe(edges: Sequence[Edge]) -> str:
    return ", ".join(
        f"{one.num_bytes} bytes of a {one.type[0]}{list(one.type[1])} from node {one.src}" for one in edges
    )


def _describe_needs(needs: Sequence[Need]) -> str:
    return ", ".join(f"{need.type[0]}{list(need.type[1])} of {int(need.mask.sum())} bytes" for need in needs)
